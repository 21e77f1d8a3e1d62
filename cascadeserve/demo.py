"""`cascadeserve demo`: the digits cascade answers a burst on a real Triton; then the largest model alone."""

from __future__ import annotations

import asyncio
import importlib
import sys
from pathlib import Path
from typing import Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from cascadeserve.artefacts import Artefact, write_json
from cascadeserve.errors import CascadeServeError, UsageError
from cascadeserve.gear_plan import read_gear_plan
from cascadeserve.local_stack import LocalStack
from cascadeserve.report import Ledger, ServingReport

_EXAMPLE = Path("examples/digits")
_REFERENCE = "digits_resnet"
_SLO_S = 0.15
# rows per second: within the largest model's reach, far beyond it, within it again
_BURST = ((5, 100), (8, 300), (8, 900), (8, 100))
_NUM_ROWS = 4_000
_REFERENCE_RATE_PER_S = 300


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
    if report.ledger.lost or report.ledger.duplicated or report.ledger.failed:
        raise CascadeServeError("requests failed, were lost or answered twice; the logs under --state say more")


async def _demo(output: Path, state: Path, console: Console) -> DemoReport:
    stack = LocalStack(state, plan=_EXAMPLE / "gear_plan.json", repository=Path("model_repository"))
    rows = state / "rows.npz"
    console.print(f"drawing {_NUM_ROWS} rows from the replay split of the digits family")
    labels = _write_rows(rows)
    console.print("starting tritonserver and the orchestrator")
    async with stack.running():
        burst = ",".join(f"{duration_s}x{rate_per_s}" for duration_s, rate_per_s in _BURST)
        console.print(f"replaying a burst: {burst} (seconds x rows per second)")
        cascade, cascade_answers = await stack.replay(
            output / "cascade", stack.url, "digits", rows, f"--steps={burst}", f"--slo={_SLO_S}"
        )
        console.print(f"putting the same rows to {_REFERENCE} alone")
        used = np.unique(cascade_answers["row_index"])
        reference_answers = await _ask_reference(stack, output, rows, used)
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


async def _ask_reference(stack: LocalStack, output: Path, rows: Path, used: Any) -> dict[str, Any]:  # noqa: ANN401
    """Records of asking the largest model directly, once for every row that was used."""
    alone = rows.with_name("alone.npz")
    with np.load(rows) as drawn:
        np.savez(alone, **{name: drawn[name][used] for name in drawn.files})
    options = [f"--rate={_REFERENCE_RATE_PER_S}", f"--duration={len(used) / _REFERENCE_RATE_PER_S:.2f}"]
    with stack.log.with_name("reference.log").open("wb") as log:
        _, answers = await stack.replay(
            output / "reference", stack.triton_url, _REFERENCE, alone, *options, "--rows-per-request=20",
            "--timeout=20", log=log,
        )  # fmt: skip
    return answers


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


def _write_rows(path: Path) -> np.ndarray[Any, np.dtype[np.int64]]:
    sys.path.insert(0, str(Path.cwd()))
    data = importlib.import_module("examples.digits.data")
    rows = data.rows("replay", _NUM_ROWS)
    np.savez(path, **{"input:image": rows.inputs, "label": rows.labels})
    labels: np.ndarray[Any, np.dtype[np.int64]] = rows.labels
    return labels


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
