"""What a person sees of a run: a progress line while it goes on, a table at its end."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from cascadeserve.replay.client import Outcome
from cascadeserve.replay.summary import is_void

if TYPE_CHECKING:
    from rich.console import Console

    from cascadeserve.replay.ledger import LiveCounts
    from cascadeserve.report import ServingReport

# Drawing takes a few milliseconds, during which nothing is sent: far less than 1 % of the time, so p99 lag stays clear.
_REFRESH_S = 1.0
_MAX_ERRORS_SHOWN = 8
_WORTH_TELLING = 0.005


def _milliseconds(value_s: float | None) -> str:
    return "-" if value_s is None else f"{value_s * 1e3:.1f} ms"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.2%}"


async def watch(live: LiveCounts, requests: int, console: Console) -> None:
    """Show progress until cancelled; on anything but a terminal, nothing."""
    if not console.is_terminal:
        return
    columns = (TextColumn("replay"), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, auto_refresh=False, transient=True) as progress:
        task = progress.add_task("", total=requests)
        while True:
            counts = live.by_outcome
            bad = counts[Outcome.FAILED] + counts[Outcome.LOST] + live.duplicated
            text = (
                f"sent {live.sent}/{requests}  answered {counts[Outcome.ANSWERED]}  refused {counts[Outcome.REFUSED]}"
                f"  failed or lost {bad}  p95 {_milliseconds(live.quantile_s(0.95))}"
            )
            progress.update(task, completed=live.sent, description=text, refresh=True)
            await asyncio.sleep(_REFRESH_S)


def tabulate(report: ServingReport) -> Table:
    """Lay a report out as a table."""
    ledger = report.ledger
    table = Table(title=None if report.complete else "stopped early", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    lines = [
        ("duration", f"{report.duration_s:.1f} s"),
        ("offered", f"{report.offered_rate_per_s:.1f} rows/s"),
        ("answered", f"{report.answered_rate_per_s:.1f} rows/s"),
        ("p50 / p95 / p99", " / ".join(_milliseconds(value) for value in (report.p50_s, report.p95_s, report.p99_s))),
        ("goodput", "-" if report.slo_s is None else f"{_percent(report.goodput)} in {_milliseconds(report.slo_s)}"),
        ("accuracy", _percent(report.accuracy)),
        *((f"stage {stage.stage}", f"{stage.rows} rows, {_percent(stage.share)}") for stage in report.stages),
        ("gears", " > ".join(span.gear for span in report.gears[:_MAX_ERRORS_SHOWN]) or "-"),
        ("sent", f"{ledger.sent} requests, {report.rows_sent} rows"),
        ("answered correct / wrong", f"{ledger.answered_correct} / {ledger.answered_wrong}"),
        ("not certified", str(report.uncertified)),
        ("refused / failed", f"{ledger.refused} / {ledger.failed}"),
        ("lost / duplicated", f"{ledger.lost} / {ledger.duplicated}"),
        ("generator lag p99", _milliseconds(report.generator_lag_p99_s) + (" - RUN VOID" if is_void(report) else "")),
    ]
    if report.stolen_frac is not None and report.stolen_frac >= _WORTH_TELLING:
        lines.append(("taken by the host", f"{report.stolen_frac:.1%} of the machine's time"))
    for name, value in lines:
        table.add_row(name, value)
    for text, count in list(report.errors.items())[:_MAX_ERRORS_SHOWN]:
        table.add_row("error", f"{count} x {text}")
    return table
