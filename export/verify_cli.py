"""`cascadeserve verify`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.progress import track
from rich.table import Column, Table
from rich.text import Text

from cascadeserve.cluster import Cluster, CpuDevice, Endpoint
from cascadeserve.errors import ExportRefused, UsageError
from cascadeserve.local_stack import free_ports
from cascadeserve.local_triton.server import LocalTriton
from cascadeserve.local_triton.working_copy import model_names, prepare_working_copy
from cascadeserve.triton_config import has_tensorrt_accelerator, read_config
from export.config_lint import lint_repository
from export.loading import load_family
from export.served import ServedModels
from export.verify import Measured, expected_answers, measure, sample_rows, verdict

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from export.family import Family, FamilyModel
    from export.parity import Outputs

    Check = Callable[[str], list["_Row"]]

_START_TIMEOUT_S = 120.0
_NEEDS_GPU = "needs a GPU, not checked"


@dataclass(frozen=True)
class _Row:
    """What became of one model; `problem` says what is wrong with it, `measured` is None where nothing was."""

    name: str
    version: str = ""
    measured: Measured | None = None
    problem: str | None = None


@click.command()
@click.argument("reference", metavar="FAMILY")
@click.option("--repository", type=click.Path(path_type=Path), required=True, help="Model repository to verify.")
@click.option("--model", "names", multiple=True, help="Model to verify, repeatable [default: the whole family].")
@click.option("--url", metavar="HOST:PORT", help="gRPC address of a Triton that serves it [default: one is started].")
@click.option(
    "--state", type=click.Path(path_type=Path), help="Folder for the working copy [default: a temporary one]."
)
@click.option(
    "--tolerance", type=click.FloatRange(min=0.0, min_open=True), default=1e-4, show_default=True,
    help="Largest difference of a score from the source's; a tenth of it between batches.",
)  # fmt: skip
def verify(
    reference: str, repository: Path, names: tuple[str, ...], url: str | None, state: Path | None, tolerance: float
) -> None:
    """Serve a repository on a real Triton and hold its answers against the family's source.

    Every config is checked first against what Triton and its native backends read. Then rows of the family's sample go
    to the newest version of every model, in batches of several sizes and beside several others. Label, certainty and
    scores must be the source's; a variant is held within its limits.
    """
    if url is not None and not re.fullmatch(r"\S+:\d{1,5}", url):
        raise UsageError(f"--url: {url!r} is no address; give host and port of Triton's gRPC service")
    family = load_family(reference)
    models = _chosen(family, names)
    _refuse_absent(models, model_names(repository), repository)
    console = Console()
    _lint(repository, names, console)
    on_gpu = [] if url else [model.name for model in models if _is_for_tensorrt(repository, model)]
    if on_gpu and (names or len(on_gpu) == len(models)):
        raise UsageError(
            f"model {on_gpu[0]!r} is made for TensorRT, which needs a GPU; give --url of a Triton that has one"
        )
    checked = [model for model in models if model.name not in on_gpu]
    rows = sample_rows(family)
    expected = {model.name: expected_answers(family, model, rows) for model in _progress(checked, "asking the source")}
    check = partial(_check, family, checked, repository, expected, rows, tolerance, load=url is None)
    found = {row.name: row for row in (check(url) if url else _on_local_triton(repository, state, check))}
    console.print(_table(models, found))
    for row in found.values():
        if row.problem is not None:
            version = f" version {row.version}" if row.version else ""
            raise ExportRefused(f"{row.name}{version}: {row.problem}")


def _progress(models: Sequence[FamilyModel], description: str) -> Iterable[FamilyModel]:
    return track(models, description=description, console=Console(stderr=True), transient=True)


def _chosen(family: Family, names: tuple[str, ...]) -> list[FamilyModel]:
    known = [model.name for model in family.models]
    if unknown := [name for name in names if name not in known]:
        raise UsageError(f"--model: {unknown[0]!r} is not in family {family.name!r}; models are {', '.join(known)}")
    return [model for model in family.models if not names or model.name in names]


def _refuse_absent(models: Sequence[FamilyModel], present: Sequence[str], repository: Path) -> None:
    for model in models:
        if model.name not in present:
            raise ExportRefused(
                f"{model.name}: {repository} holds no such model; export the family, or choose others with --model"
            )


def _is_for_tensorrt(repository: Path, model: FamilyModel) -> bool:
    return has_tensorrt_accelerator(read_config(repository / model.name / "config.pbtxt"))


def _lint(repository: Path, names: tuple[str, ...], console: Console) -> None:
    """Print what is wrong with the configs, of all models unless some are named; refuse what is an error."""
    refused = None
    for path, findings in lint_repository(repository).items():
        if names and path.partition("/")[0] not in names:
            continue
        for finding in findings:
            style = "dim" if finding.severity == "warning" else "red"
            console.print(Text(f"{path}: {finding}", style), soft_wrap=True)
            if finding.severity == "error" and refused is None:
                where = ": ".join(filter(None, (str(repository / path), finding.field)))
                refused = f"{where}: {finding.problem}"
    if refused is not None:
        raise ExportRefused(refused)


def _check(
    family: Family,
    models: Sequence[FamilyModel],
    repository: Path,
    expected: dict[str, Outputs],
    rows: Outputs,
    tolerance: float,
    address: str,
    *,
    load: bool,
) -> list[_Row]:
    """Check one model after the other at a Triton, which loads and unloads them in turn if `load`."""
    served = ServedModels(address)
    found = []
    try:
        served.check_live()
        for model in _progress(models, "asking Triton"):
            version, measured, problem = "", None, None
            try:
                if load:
                    served.load(model.name)
                version = served.newest_version(model.name)
                outputs = _outputs(repository, model)
                run = partial(served.answer, model.name, version, family.inputs, outputs)
                measured = measure(model, expected[model.name], run, rows, tolerance)
                problem = verdict(model, measured, tolerance)
            except ExportRefused as error:
                # the other models are checked all the same
                problem = str(error).removeprefix(f"{model.name}: ")
            found.append(_Row(model.name, version, measured, problem))
            if load:
                # what stays loaded costs memory and nothing else
                with contextlib.suppress(ExportRefused):
                    served.unload(model.name)
    finally:
        served.close()
    return found


def _outputs(repository: Path, model: FamilyModel) -> tuple[str, ...]:
    """Outputs of a model that can be held against the source's; it may keep its scores to itself."""
    config = read_config(repository / model.name / "config.pbtxt")
    outputs = tuple(entry.name for entry in config.output if entry.name in {"label", "certainty", "scores"})
    if missing := {"label", "certainty"} - set(outputs):
        raise ExportRefused(f"{model.name}: its config has no output {min(missing)!r}; export it again")
    return outputs


def _on_local_triton(repository: Path, state: Path | None, check: Check) -> list[_Row]:
    with contextlib.ExitStack() as stack:
        if state is None:
            state = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cascadeserve-verify-")))
        return asyncio.run(_serve(repository, state.resolve(), check))


async def _serve(repository: Path, state: Path, check: Check) -> list[_Row]:
    """Run `check` against a Triton on loopback, on one core, with no model loaded; it is gone afterwards."""
    http, grpc, metrics = (f"127.0.0.1:{port}" for port in free_ports(3))
    device = CpuDevice(cores=(min(os.sched_getaffinity(0)),))
    endpoint = Endpoint(name="verify", http=http, grpc=grpc, metrics=metrics, device=device)
    copy = prepare_working_copy(repository, Cluster(schema_version=1, endpoints=(endpoint,)), state)
    with (state / "verify.log").open("wb") as log:
        server = LocalTriton(endpoint, repository=copy, models=[], state=state, log=log)
        try:
            await server.start(ready_timeout_s=_START_TIMEOUT_S)
            # in a thread, so that Ctrl-C is heard here and ends the server, whereupon the thread's calls fail
            return await asyncio.to_thread(check, grpc)
        finally:
            await server.stop()


def _table(models: Sequence[FamilyModel], found: dict[str, _Row]) -> Table:
    table = Table(
        Column("model", no_wrap=True), "version", "max error", "label agreement", "batch difference", "verdict"
    )
    for model in models:
        row = found.get(model.name)
        if row is None:
            table.add_row(model.name, "", "", "", "", _NEEDS_GPU)
            continue
        numbers = ("", "", "")
        if row.measured is not None:
            numbers = (
                f"{row.measured.max_abs_error:.1e}",
                f"{row.measured.label_agreement:.4f}",
                f"{row.measured.batch_difference:.1e}",
            )
        table.add_row(row.name, row.version, *numbers, "ok" if row.problem is None else "[red]failed[/red]")
    return table
