"""How the time and the memory of a plan grow, as a picture."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.figure import Figure

from cascadeserve.artefacts import write_atomically

if TYPE_CHECKING:
    from pathlib import Path

    from benchmarks.planner_speed import PlannerSpeed

_INK, _GRID, _LINE, _CPU, _BAR = "#2b2f36", "#e3e5e8", "#2c6fbb", "#8a8f98", "#b3262e"
_BAR_S, _BAR_MIB = 30.0, 2048.0
_STYLE: Any = {
    "font.size": 9.0,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": _GRID,
    "axes.axisbelow": True,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    # the same figures give the same bytes
    "svg.hashsalt": "cascadeserve",
}


def draw_growth(path: Path, found: PlannerSpeed) -> None:
    """Draw seconds and memory over models, endpoints and ranges, and write it as SVG."""
    size = found.bar.size
    curves = (
        ("models", found.by_models, f"{size.endpoints} endpoints, {size.ranges} ranges"),
        ("endpoints", found.by_endpoints, f"{size.models} models, {size.ranges} ranges"),
        ("ranges", found.by_ranges, f"{size.models} models, {size.endpoints} endpoints"),
    )
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(9.0, 4.2), layout="constrained")
        axes = figure.subplots(2, 3, sharex="col", sharey="row", height_ratios=(3.0, 2.0))
        for (what, points, rest), (time, memory) in zip(curves, axes.T, strict=True):
            counts = [getattr(point.size, what) for point in points]
            wall_s = [point.wall_s for point in points]
            time.plot(counts, wall_s, color=_LINE, marker="o", markersize=4.0, label="by the clock")
            cpu_s = [point.cpu_s for point in points]
            time.plot(counts, cpu_s, color=_CPU, marker="o", markersize=3.0, label="of the processor")
            peaks = [point.peak_rss_bytes / 2**20 for point in points]
            memory.plot(counts, peaks, color=_LINE, marker="o", markersize=4.0)
            time.axhline(_BAR_S, color=_BAR, linewidth=1.2, linestyle=(0, (5, 3)))
            memory.axhline(_BAR_MIB, color=_BAR, linewidth=1.2, linestyle=(0, (5, 3)))
            time.set_title(rest, fontsize=9.0)
            time.set_xscale("log", base=2)
            memory.set_xticks(counts, [str(count) for count in counts])
            memory.minorticks_off()
            memory.set_xlabel("ranges of rates" if what == "ranges" else what)
        # when all is drawn: a row shares its axis
        for each in axes[:, 0]:
            each.set_ylim(bottom=0.0)
        axes[0, 0].legend(frameon=False, loc="upper left")
        axes[0, 0].set_ylabel("seconds")
        axes[1, 0].set_ylabel("most memory, MiB")
        content = io.BytesIO()
        figure.savefig(content, format="svg", metadata={"Date": None})
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content.getvalue())
