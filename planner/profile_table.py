"""A profile as tables on the screen."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from planner.profile import batch_busy_s, typical_spread_frac, work_rate

if TYPE_CHECKING:
    from pathlib import Path

    from planner.profile import ModelProfile, PartProfile, Profile

# from which spread on (`BusyEntry.spread_frac`) it is worth a word
_DISTURBED_FRAC = 0.1


def show_profile(measured: Profile, output: Path) -> None:
    """Print the busy times by model and batch size, pairs and the orchestrator's cost; `output` is the file's name."""
    console = Console()
    sizes = sorted({entry.batch for model in measured.models.values() for entry in model.busy})
    title = f"{output}: busy time of one batch in ms, {measured.repeats} repeats"
    table = Table("model", "in flight", *map(str, sizes), "overhead ms", "memory MB", "load s", title=title)
    for name, model in measured.models.items():
        for concurrency in range(1, measured.slots + 2):
            busy = (
                f"{batch_busy_s(model, size, concurrency) * 1e3:.2f}" if size <= model.max_batch else "-"
                for size in sizes
            )
            rest = ("", "", "")
            if concurrency == 1:
                rest = (f"{model.overhead_s * 1e3:.2f}", *_memory_and_load(model))
            table.add_row(name if concurrency == 1 else "", str(concurrency), *busy, *rest)
        for part in model.composed_of:
            table.add_row(f"  {part}", "", *[""] * len(sizes), "", *_memory_and_load(measured.parts[part]))
    console.print(table)
    if (spread := typical_spread_frac(measured)) > _DISTURBED_FRAC:
        console.print(f"windows of one cell differ by {spread:.0%}: something else uses the device; add --repeats")
    if measured.pairs:
        pairs = Table("side by side", "rows", "ms per batch", "work per second", title="pairs at slots + 1 in flight")
        for pair in measured.pairs:
            pairs.add_row(
                " + ".join(pair.models),
                " + ".join(map(str, pair.batches)),
                " + ".join(f"{each_s * 1e3:.2f}" for each_s in pair.interval_s),
                f"{work_rate(measured, pair):.2f}",
            )
        console.print(pairs)
    if (front := measured.front) is not None:
        console.print(
            f"orchestrator, us of its core: {front.request_s * 1e6:.0f} per request, {front.answer_s * 1e6:.0f} per "
            f"answer, {front.batch_s * 1e6:.0f} per batch, {front.row_s * 1e6:.0f} per row; "
            f"{front.path_s * 1e6:.0f} us of latency beside that"
        )


def _memory_and_load(one: ModelProfile | PartProfile) -> tuple[str, str]:
    memory = "-" if one.memory_bytes is None else f"{one.memory_bytes / 1e6:.0f}"
    return memory, "-" if one.load_s is None else f"{one.load_s:.2f}"
