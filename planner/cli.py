"""`cascadeserve record` and `cascadeserve profile`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from cascadeserve.artefacts import write_json
from cascadeserve.cluster import CpuDevice, Endpoint, read_cluster
from cascadeserve.errors import InvalidArtefact, UsageError
from cascadeserve.replay.payload import InputRows, match_inputs
from planner import profiling
from planner.front_cost import NUM_PHASES, FrontSession
from planner.host import describe_host, find_server, is_local, resident_bytes
from planner.probing import PROBE_ROWS, choose_probe_rows
from planner.profile import FrontCost, ModelProfile, PartProfile, Profile, batch_busy_s, check_profile
from planner.profile_table import show_profile
from planner.recording import (
    Recorder,
    choose_models,
    partial_folder,
    read_rows_file,
    record_family,
    write_family,
)
from planner.triton_calls import TritonCalls

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from planner.recording import AnyRecords, Chosen, RowsFile
    from planner.records_files import Split
    from planner.triton_calls import ServedModel

_FILE = click.Path(dir_okay=False, path_type=Path)
_FOLDER = click.Path(file_okay=False, path_type=Path)
_MODEL_HELP = "NAME or NAME:VERSION [default: the newest], repeatable, ordered cheap to dear."
_PROBE_HELP = "Calibration rows that the plan will carry, to see if what is served answers as recorded; 0: none."
_DEFAULT_BATCHES = "1,2,4,8,16,32,64"


def _choose_endpoint(cluster_path: Path, name: str | None) -> Endpoint:
    cluster = read_cluster(cluster_path)
    names = [endpoint.name for endpoint in cluster.endpoints]
    if name is None and len(names) > 1:
        raise UsageError(f"--endpoint: the cluster has several endpoints, name one of {', '.join(names)}")
    if name is not None and name not in names:
        raise UsageError(f"--endpoint: {name!r} is not in {cluster_path}; endpoints are {', '.join(names)}")
    return cluster.endpoint(name or names[0])


@contextlib.contextmanager
def _progress(**totals: int) -> Iterator[Callable[[str, int], None]]:
    """Show bars named by `totals` on a terminal; yields the function that advances one of them."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    # drawn by our own thread twice a second at most: the cores measured may be the ones that draw
    with Progress(*columns, console=console, refresh_per_second=2, disable=not console.is_terminal) as progress:
        tasks = {name: progress.add_task(name, total=total) for name, total in totals.items()}
        yield lambda name, steps: progress.advance(tasks[name], steps)


@contextlib.contextmanager
def _continued_by_running_again(partial: Path) -> Iterator[None]:
    try:
        yield
    except (KeyboardInterrupt, asyncio.CancelledError):
        click.echo(f"what is done so far is in {partial}; the same command goes on from there", err=True)
        raise


@click.command(short_help="Record what every model of a family answers to labelled rows.")
@click.option("--cluster", "cluster_path", type=_FILE, required=True, help="Cluster file.")
@click.option("--endpoint", "endpoint_name", default=None, help="Endpoint to ask; may be left out if there is one.")
@click.option("--rows", "rows_path", type=_FILE, required=True, help=".npz: `input:<TENSOR>`, `label`, maybe `group`.")
@click.option("--split", type=click.Choice(["search", "calibration", "test"]), required=True, help="What they are for.")
@click.option("--family", required=True, help="Name of the family.")
@click.option("--model", "models", multiple=True, required=True, help=_MODEL_HELP)
@click.option("--repository", type=_FOLDER, default="model_repository", show_default=True, help="What Triton serves.")
@click.option("--output", type=_FILE, required=True, help="Records file to write (.npz).")
@click.option("--keep-scores", is_flag=True, help="Keep the scores of all classes too (FP16).")
@click.option("--probe-rows", type=click.IntRange(min=0), default=PROBE_ROWS, show_default=True, help=_PROBE_HELP)
@click.option("--batch", type=click.IntRange(min=1), default=32, show_default=True, help="Rows per call.")
def record(
    *,
    cluster_path: Path,
    endpoint_name: str | None,
    rows_path: Path,
    split: Split,
    family: str,
    models: tuple[str, ...],
    repository: Path,
    output: Path,
    keep_scores: bool,
    probe_rows: int,
    batch: int,
) -> None:
    """Put every row of a file to every model, through a running Triton, and keep the answers.

    The endpoint must serve this repository (`cascadeserve triton`, `prepare`). An interrupted run is continued by the
    same command. A records file is never overwritten: plans and certificates name it by its content.
    """
    if output.exists():
        raise UsageError(f"--output: {output} exists; a records file is not overwritten, name another or remove it")
    endpoint = _choose_endpoint(cluster_path, endpoint_name)
    chosen = choose_models(repository, models)
    rows_file = read_rows_file(rows_path)
    if rows_file.rows.labels is None:
        raise InvalidArtefact("is missing; records need the right label of every row", path=rows_path, field="label")
    partial = partial_folder(output)

    async def run(on_rows: Callable[[str, int], None]) -> AnyRecords:
        server = TritonCalls(endpoint.grpc)
        try:
            recorder = Recorder(server, rows_file, batch, keep_scores, partial, on_rows)
            return await record_family(recorder, chosen, family=family, split=split, device_kind=endpoint.kind)
        finally:
            await server.close()

    with _continued_by_running_again(partial), _progress(**dict.fromkeys(chosen, len(rows_file.rows))) as on_rows:
        records = asyncio.run(run(on_rows))
    certifies = split == "calibration"
    write_family(output, records, choose_probe_rows(records, rows_file.rows.inputs, probe_rows) if certifies else None)
    table = Table("model", "accuracy", "mean certainty", title=f"{output}: {len(records)} rows, {split}")
    for model, answers in records.models.items():
        right = float(np.mean(answers.label == records.truth))
        table.add_row(model, f"{right:.2%}", f"{float(np.mean(answers.certainty)):.3f}")
    Console().print(table)


def _parse_batches(text: str) -> list[int]:
    try:
        batches = sorted({int(part) for part in text.split(",")})
    except ValueError as error:
        raise UsageError(f"--batches {text}: give numbers of rows such as 1,8,64") from error
    if batches[0] < 1:
        raise UsageError(f"--batches {text}: a batch has at least one row")
    return batches


@contextlib.contextmanager
def _beside_the_device(endpoint: Endpoint) -> Iterator[None]:
    """Keep off the cores that are the device, if there are others: they are being measured."""
    allowed = os.sched_getaffinity(0)
    device = set(endpoint.device.cores) if isinstance(endpoint.device, CpuDevice) and is_local(endpoint.grpc) else set()
    os.sched_setaffinity(0, allowed - device or allowed)
    try:
        yield
    finally:
        os.sched_setaffinity(0, allowed)


@click.command(short_help="Measure how long the device is busy with batches of every model.")
@click.option("--cluster", "cluster_path", type=_FILE, required=True, help="Cluster file.")
@click.option("--endpoint", "endpoint_name", default=None, help="Endpoint to measure; may be left out if there is one.")
@click.option("--model", "models", multiple=True, required=True, help=_MODEL_HELP)
@click.option("--rows", "rows_path", type=_FILE, required=True, help=".npz with `input:<TENSOR>`: what is sent.")
@click.option("--repository", type=_FOLDER, default="model_repository", show_default=True, help="What Triton serves.")
@click.option("--output", type=_FILE, required=True, help="Profile to write (JSON).")
@click.option("--batches", default=_DEFAULT_BATCHES, show_default=True, help="Batch sizes, rows.")
@click.option("--repeats", type=click.IntRange(min=1), default=None, help="Windows per cell [default: 5].")
@click.option("--quick", is_flag=True, help="Short windows: four small models in less than a minute.")
@click.option(
    "--allow-reload",
    is_flag=True,
    help="Also measure load_s and memory_bytes: every model is unloaded once and loaded again.",
)
@click.option("--front", is_flag=True, help="Also measure the orchestrator's own cost, by running one for 15 s.")
@click.option("--pid", type=click.IntRange(min=1), default=None, help="The server's process, if it is not found.")
def profile(
    *,
    cluster_path: Path,
    endpoint_name: str | None,
    models: tuple[str, ...],
    rows_path: Path,
    repository: Path,
    output: Path,
    batches: str,
    repeats: int | None,
    quick: bool,
    allow_reload: bool,
    front: bool,
    pid: int | None,
) -> None:
    """Measure, through a running Triton, busy time by batch size and concurrency, alone and in pairs.

    Nothing else may use the endpoint meanwhile; batches of others are noticed and refused. Models are unloaded only
    with --allow-reload, because an orchestrator in front of the endpoint would fail its requests; without it load_s
    and memory_bytes stay null. Memory is read from /proc (CPU endpoints of this machine). An interrupted run is
    continued by the same command.
    """
    endpoint = _choose_endpoint(cluster_path, endpoint_name)
    chosen = choose_models(repository, models)
    effort = profiling.QUICK if quick else profiling.THOROUGH
    if repeats is not None:
        effort = profiling.Effort(repeats, effort.window_s, effort.min_batches, effort.budget_s)
    session = _ProfileSession(endpoint, chosen, read_rows_file(rows_path), effort, partial_folder(output))
    server_pid = pid or (find_server(int(endpoint.grpc.rpartition(":")[2])) if is_local(endpoint.grpc) else None)
    with _continued_by_running_again(session.partial), _beside_the_device(endpoint):
        measured = asyncio.run(
            session.run(_parse_batches(batches), 1 if quick else 2, allow_reload=allow_reload, server_pid=server_pid)
        )
        if front:
            cost = asyncio.run(session.measure_front(measured, cluster_path, rows_path))
            measured = msgspec.structs.replace(measured, front=cost)
    check_profile(measured)
    write_json(output, measured)
    shutil.rmtree(session.partial, ignore_errors=True)
    show_profile(measured, output)


class _ProfileSession:
    """One run of `profile` against one endpoint."""

    def __init__(
        self, endpoint: Endpoint, models: dict[str, Chosen], rows: RowsFile, effort: profiling.Effort, partial: Path
    ) -> None:
        self.partial = partial
        self._endpoint = endpoint
        self._models = models
        self._rows = rows
        self._effort = effort
        self._inputs: dict[str, tuple[InputRows, ...]] = {}
        self._encoded: dict[tuple[str, int], list[bytes]] = {}

    async def run(
        self, batches: list[int], pair_batches: int, *, allow_reload: bool, server_pid: int | None
    ) -> Profile:
        server = TritonCalls(self._endpoint.grpc)
        try:
            version = await server.server_version()
            served = [await server.describe(model, chosen.version) for model, chosen in self._models.items()]
            if allow_reload and (several := next((model for model in served if len(model.versions) > 1), None)):
                raise UsageError(
                    f"--allow-reload: versions {', '.join(map(str, several.versions))} of {several.name!r} are loaded "
                    "together, so its memory cannot be told apart; serve only the one to profile"
                )
            slots = self._endpoint.slots
            cells = profiling.plan_cells(served, batches, slots=slots, pair_batches=pair_batches)
            self._inputs = {model.name: match_inputs(self._rows.rows, model.signature) for model in served}
            profiler = profiling.Profiler(server, self._requester(server), self._effort)
            key = profiling.progress_key(
                self._rows.digest, self._models, version, self._endpoint, cells,
                self._effort.window_s, self._effort.min_batches, [model.instances for model in served],
            )  # fmt: skip
            total = len(cells) * self._effort.repeats
            with _progress(measuring=total) as advance:
                visits = await profiler.repeat_all(
                    cells,
                    key=key,
                    checkpoint=self.partial / "repeats.json",
                    on_visit=lambda: advance("measuring", 1),
                )
            found: dict[str, ModelProfile] = {}
            for model in served:
                one = profiling.model_profile(model, cells, visits, slots=slots)
                one = msgspec.structs.replace(one, digest=self._models[model.name].digest, version=model.version)
                if allow_reload and not model.composed_of:
                    measured = await self._reload(profiler, model, model.name, one.max_batch, server_pid)
                    one = msgspec.structs.replace(one, **measured)
                found[model.name] = one
            parts: dict[str, PartProfile] = {}
            for name, part_version in {part: v for model in served for part, v in model.composed_of.items()}.items():
                part = await server.describe(name, part_version)
                parts[name] = PartProfile(instances=part.instances, backend=part.backend)
                if allow_reload:
                    users = [model.name for model in served if name in model.composed_of]
                    largest = found[users[0]].max_batch
                    measured = await self._reload(profiler, part, users[0], largest, server_pid, ensembles=users)
                    parts[name] = msgspec.structs.replace(parts[name], **measured)
        finally:
            await server.close()
        return Profile(
            schema_version=1,
            device_kind=self._endpoint.kind,
            slots=slots,
            server_version=version,
            repeats=len(visits),
            host=describe_host() if is_local(self._endpoint.grpc) else None,
            models=found,
            parts=parts,
            pairs=profiling.pair_entries(cells, visits),
        )

    async def measure_front(self, measured: Profile, cluster: Path, rows: Path) -> FrontCost:
        """What an orchestrator in front of the endpoint costs, on the cores that are left to this process."""
        cheapest = min(measured.models, key=lambda name: batch_busy_s(measured.models[name], 1, 1))
        server = TritonCalls(self._endpoint.grpc)
        try:
            model = await server.describe(cheapest, measured.models[cheapest].version)
        finally:
            await server.close()
        one = measured.models[cheapest]
        front = FrontSession(
            cluster=cluster,
            endpoint=self._endpoint.name,
            model=model,
            busy_s=batch_busy_s(one, 1, 1) + one.overhead_s,
            rows=rows,
            state=self.partial / "front",
            cores=sorted(os.sched_getaffinity(0)),
        )
        with _progress(orchestrator=NUM_PHASES) as advance:
            return await front.measure(lambda: advance("orchestrator", 1))

    async def _reload(
        self, profiler: profiling.Profiler, model: ServedModel, through: str, largest_batch: int,
        server_pid: int | None, *, ensembles: Sequence[str] = (),
    ) -> dict[str, float | None]:  # fmt: skip
        """Return `load_s` and `memory_bytes` of a model, asked `through` itself or one of the `ensembles` with it."""
        # what a process holds says nothing of the memory of a GPU
        readable = server_pid if isinstance(self._endpoint.device, CpuDevice) else None
        load_s, memory_bytes = await profiler.measure_reload(
            through,
            largest_batch,
            lambda: None if readable is None else resident_bytes(readable),
            part=model.name,
            ensembles=ensembles,
        )
        each_bytes = None if memory_bytes is None else memory_bytes // model.instances
        return {"load_s": load_s, "memory_bytes": each_bytes}

    def _requester(self, server: TritonCalls) -> Callable[[str, int], list[bytes]]:
        """Encoded calls by model and batch size, made once; their rows go round through the file."""

        def requests(model: str, batch: int) -> list[bytes]:
            if (model, batch) not in self._encoded:
                count, version = len(self._rows.rows), self._models[model].version
                self._encoded[model, batch] = [
                    server.encode(
                        model, version, self._inputs[model], [(turn * batch + row) % count for row in range(batch)]
                    )
                    for turn in range(profiling.VARIANTS)
                ]
            return self._encoded[model, batch]

        return requests
