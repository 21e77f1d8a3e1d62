"""`cascadeserve demo`: the digits cascade answers a burst on a real Triton; then the largest model alone."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import os
import socket
import sys
from pathlib import Path
from typing import IO, Any

import aiohttp
import click
import numpy as np
from rich.console import Console
from rich.table import Table

from cascadeserve.artefacts import Artefact, read_json, write_json
from cascadeserve.errors import CascadeServeError, ServerStartFailed, UsageError
from cascadeserve.gear_plan import read_gear_plan
from cascadeserve.local_triton.working_copy import prepare_state_directory
from cascadeserve.process import spawn, stop
from cascadeserve.report import Ledger, ServingReport

_EXAMPLE = Path("examples/digits")
_REFERENCE = "digits_resnet"
_SLO_S = 0.15
# rows per second: within the largest model's reach, far beyond it, within it again
_BURST = ((5, 100), (8, 300), (8, 900), (8, 100))
_NUM_ROWS = 4_000
_START_TIMEOUT_S = 90.0


class DemoReport(Artefact, frozen=True, kw_only=True):
    """What the demo prints; accuracies are shares of the rows that the cascade answered."""

    cascade: ServingReport
    # share of the answered rows by the model that answered them
    rows_by_model: dict[str, float]
    cascade_accuracy: float
    reference_accuracy: float
    ledger: Ledger


@click.command()
@click.option("--output", type=click.Path(path_type=Path), default="demo", show_default=True, help="For the reports.")
@click.option("--state", type=click.Path(path_type=Path), default=".cascadeserve/demo", show_default=True)
def demo(output: Path, state: Path) -> None:
    """Start a real Triton and the orchestrator, replay a burst, print the ledger.

    Then the rows that the cascade answered are put to the largest model alone. Run it from a checkout.
    """
    if not (_EXAMPLE / "gear_plan.json").exists():
        raise UsageError(f"{_EXAMPLE} is not here; run the demo from the top of a checkout")
    console = Console()
    report = asyncio.run(_demo(output, state.resolve(), console))
    write_json(output / "report.json", report)
    _show(report, console)
    if report.ledger.lost or report.ledger.duplicated:
        raise CascadeServeError("requests were lost or answered twice; the server's log says more")


async def _demo(output: Path, state: Path, console: Console) -> DemoReport:
    prepare_state_directory(state)
    ports = _free_ports(5)
    cluster = state / "cluster.toml"
    cluster.write_text(_cluster_text(ports))
    rows = state / "rows.npz"
    console.print(f"drawing {_NUM_ROWS} rows from the replay split of the digits family")
    labels = _write_rows(rows)
    orchestrator_url, triton_url = f"http://127.0.0.1:{ports[3]}", f"http://127.0.0.1:{ports[0]}"
    # Triton has core 0 (cluster file); whatever else there is goes to the orchestrator and the load generator
    others = sorted(os.sched_getaffinity(0) - {0}) or [0]
    cores = ",".join(map(str, others))
    with (state / "up.log").open("wb") as log:
        console.print("starting tritonserver and the orchestrator")
        up = await spawn(
            [
                *_cascadeserve("up"),
                f"--plan={_EXAMPLE / 'gear_plan.json'}",
                f"--cluster={cluster}",
                f"--state={state / 'up'}",
                f"--http-port={ports[3]}",
                f"--grpc-port={ports[4]}",
                f"--cores={cores}",
            ],
            log=log,
        )
        try:
            await _wait_ready(orchestrator_url, up, state / "up.log")
            burst = ",".join(f"{duration_s}x{rate_per_s}" for duration_s, rate_per_s in _BURST)
            console.print(f"replaying a burst: {burst} (seconds x rows per second)")
            cascade, cascade_answers = await _replay(
                output / "cascade", orchestrator_url, "digits", rows, cores, f"--steps={burst}", f"--slo={_SLO_S}"
            )
            console.print(f"the same rows through {_REFERENCE} alone")
            used = np.unique(cascade_answers["row_index"])
            alone = state / "alone.npz"
            with np.load(rows) as drawn:
                np.savez(alone, **{name: drawn[name][used] for name in drawn.files})
            duration_s = len(used) / 300
            _, reference_answers = await _replay(
                output / "reference", triton_url, _REFERENCE, alone, cores,
                "--rate=300", f"--duration={duration_s:.2f}", "--rows-per-request=20", "--timeout=20", log=log,
            )  # fmt: skip
        finally:
            await stop(up, kill_after_s=40.0)
    reference_labels = np.full(len(labels), -1)
    reference_labels[used[reference_answers["row_index"]]] = reference_answers["label"]
    answered = cascade_answers["label"] >= 0
    index = cascade_answers["row_index"][answered]
    paired = reference_labels[index] >= 0
    return DemoReport(
        cascade=cascade,
        rows_by_model=_rows_by_model(cascade_answers),
        cascade_accuracy=float(np.mean((cascade_answers["label"][answered] == labels[index])[paired])),
        reference_accuracy=float(np.mean((reference_labels[index] == labels[index])[paired])),
        ledger=cascade.ledger,
    )


def _rows_by_model(answers: dict[str, Any]) -> dict[str, float]:
    """Which model a stage is depends on the gear that the request was in."""
    family = read_gear_plan(_EXAMPLE / "gear_plan.json").families["digits"]
    entries = {gear.name: family.entry(gear.ladder_entry) for gear in family.gears}
    gear_of_row = np.repeat(answers["gear"], np.diff(answers["row_offset"]))
    answered = answers["label"] >= 0
    pairs, counts = np.unique(np.stack([gear_of_row[answered], answers["stage"][answered]]), axis=1, return_counts=True)
    shares = dict.fromkeys(family.models, 0.0)
    for gear, stage, count in zip(*pairs, counts, strict=True):
        shares[entries[str(answers["gear_names"][gear])].stages[stage].model] += float(count / answered.sum())
    return shares


def _cascadeserve(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "cascadeserve", *arguments]


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _cluster_text(ports: list[int]) -> str:
    """The example's cluster on free ports."""
    text = (_EXAMPLE / "cluster.toml").read_text()
    for kind, port in (("http", 8000), ("grpc", 8001), ("metrics", 8002)):
        text = text.replace(f'{kind} = "127.0.0.1:{port}"', f'{kind} = "127.0.0.1:{ports[port - 8000]}"')
    return text


def _write_rows(path: Path) -> np.ndarray[Any, np.dtype[np.int64]]:
    sys.path.insert(0, str(Path.cwd()))
    data = importlib.import_module("examples.digits.data")
    rows = data.rows("replay", _NUM_ROWS)
    np.savez(path, **{"input:image": rows.inputs, "label": rows.labels})
    labels: np.ndarray[Any, np.dtype[np.int64]] = rows.labels
    return labels


async def _wait_ready(url: str, up: asyncio.subprocess.Process, log: Path) -> None:
    loop = asyncio.get_running_loop()
    give_up_s = loop.time() + _START_TIMEOUT_S
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2.0)) as session:
        while loop.time() < give_up_s and up.returncode is None:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with session.get(f"{url}/v2/health/ready") as response:
                    if response.status == 200:  # noqa: PLR2004
                        return
            await asyncio.sleep(0.1)
    raise ServerStartFailed(f"the servers did not come up; {log} says why")


async def _replay(
    output: Path, url: str, model: str, rows: Path, cores: str, *options: str, log: IO[bytes] | None = None
) -> tuple[ServingReport, dict[str, Any]]:
    report, records = output.with_suffix(".json"), output.with_suffix(".npz")
    output.parent.mkdir(parents=True, exist_ok=True)
    command = [f"--url={url}", f"--model={model}", f"--rows={rows}", f"--cores={cores}"]
    process = await spawn(
        _cascadeserve("replay", *command, f"--report={report}", f"--records={records}", *options), log=log
    )
    try:
        status = await process.wait()
    finally:
        await stop(process, kill_after_s=5.0)
    if not report.exists():
        raise CascadeServeError(f"the load generator ended with status {status} and wrote no report")
    with np.load(records) as arrays:
        return read_json(report, ServingReport), {name: arrays[name] for name in arrays.files}


def _show(report: DemoReport, console: Console) -> None:
    cascade = report.cascade
    ledger = Table("sent", "correct", "wrong", "refused", "failed", "lost", "duplicated", title="ledger of the burst")
    ledger.add_row(
        *(
            str(count)
            for count in (
                report.ledger.sent,
                report.ledger.answered_correct,
                report.ledger.answered_wrong,
                report.ledger.refused,
                report.ledger.failed,
                report.ledger.lost,
                report.ledger.duplicated,
            )
        )
    )
    console.print(ledger)
    models = Table("model", "share of rows", title="who answered")
    for model, share in report.rows_by_model.items():
        models.add_row(model, f"{share:.1%}")
    console.print(models)
    gears = Table("from", "to", "gear", title="gears")
    for span in cascade.gears:
        gears.add_row(f"{span.start_s:.1f} s", f"{span.end_s:.1f} s", span.gear)
    console.print(gears)
    console.print(
        f"accuracy on the rows answered: cascade {report.cascade_accuracy:.2%}, "
        f"{_REFERENCE} alone {report.reference_accuracy:.2%}"
    )
