"""The demo's plots."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from matplotlib.axes import Axes

    from cascadeserve.demo.report import DemoReport, SloCurve, SloPoint
    from cascadeserve.report import GearSpan

TITLES = {
    "best_single_direct": "largest model,\nTriton alone",
    "best_single": "largest model,\norchestrator",
    "cascade": "cascade",
}
_COLOURS = {"best_single_direct": "#8a8f98", "best_single": "#3b6ea8", "cascade": "#d1662a"}
_INK = "#2b2f36"
_SLO_COLOUR = "#b3262e"
_GRID = "#e3e5e8"
_GEAR_COLOURS = ("#c6dbef", "#9ecae1", "#fdd0a2", "#fdae6b", "#f79256", "#e6550d", "#d9a0c0", "#b07aa1")
_STYLE: Any = {
    "font.size": 10,
    "font.family": "DejaVu Sans",
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
    "legend.frameon": False,
}


def draw(report: DemoReport) -> dict[str, Figure]:
    """All figures by name."""
    with mpl.rc_context(_STYLE):
        return {
            "rates": sustained_rates(report),
            "timeline": timeline(report),
            "latency": latency_over_rate(report),
            "models": who_answered(report),
            "slo_curve": slo_curve(report.slo_curve),
        }


def sustained_rates(report: DemoReport) -> Figure:
    """Bars of the three sustained rates."""
    figure = Figure(figsize=(7.2, 2.6), layout="constrained")
    axes = figure.subplots()
    names = list(TITLES)
    rates = [getattr(report, name).sustained_rows_per_s for name in names]
    axes.barh(range(len(names)), rates, color=[_COLOURS[name] for name in names], height=0.62)
    for place, (name, rate) in enumerate(zip(names, rates, strict=True)):
        times = f"  =  {report.saving:.2f} x" if name == "cascade" and report.saving else ""
        axes.text(rate, place, f"  {rate:,.0f}{times}", va="center", ha="left")
    axes.set_yticks(range(len(names)), [TITLES[name] for name in names])
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, max([*rates, 1.0]) * 1.25)
    axes.set_xlabel(f"rows per second sustained with p95 within {report.slo_s * 1e3:.1f} ms, on one core")
    return figure


def timeline(report: DemoReport) -> Figure:
    """Rate, gear, latency and accuracy of the bursty load over time, one above the other."""
    shown, bins = report.timeline.report, report.timeline.bins
    middle_s = (np.arange(len(bins.offered_rate_per_s)) + 0.5) * bins.bin_s
    figure = Figure(figsize=(9.0, 7.4), layout="constrained")
    rate, gear, latency, accuracy = figure.subplots(4, 1, sharex=True, height_ratios=[3, 2, 3, 2.2])

    edges_s = np.arange(len(middle_s) + 1) * bins.bin_s
    rate.stairs(bins.offered_rate_per_s, edges_s, fill=True, color=_GRID, label="offered")
    rate.stairs(bins.answered_rate_per_s, edges_s, color=_COLOURS["cascade"], linewidth=1.5, label="answered")
    if single := max(report.best_single_direct.sustained_rows_per_s, report.best_single.sustained_rows_per_s):
        rate.axhline(single, color=_COLOURS["best_single"], linestyle="--", linewidth=1.2, label="largest model's most")
    rate.set_ylim(0, max(bins.offered_rate_per_s) * 1.3)
    rate.set_ylabel("rows per second")
    rate.legend(loc="upper left", ncols=3, fontsize=9)

    _draw_gears(gear, shown.gears, [line.entry.name for line in report.ladder])
    for name, style in (("p50_s", "-"), ("p95_s", "--")):
        values_ms = [np.nan if value is None else value * 1e3 for value in getattr(bins, name)]
        latency.plot(middle_s, values_ms, style, color=_INK, linewidth=1.3, label=name.removesuffix("_s"))
    latency.axhline(report.slo_s * 1e3, color=_SLO_COLOUR, linewidth=1.2, label=f"SLO {report.slo_s * 1e3:.1f} ms")
    latency.set_yscale("log")
    _label_decades(latency)
    latency.set_ylabel("latency, ms")
    latency.legend(loc="upper left", ncols=3, fontsize=9)
    low, high = latency.get_ylim()
    latency.set_ylim(low, high * (high / low) ** 0.25)

    shares = [np.nan if value is None else value * 100 for value in bins.accuracy]
    accuracy.plot(middle_s, shares, color=_COLOURS["cascade"], linewidth=1.3, label="cascade")
    if report.reference_accuracy is not None:
        accuracy.axhline(report.reference_accuracy * 100, color=_COLOURS["best_single"], linestyle="--", linewidth=1.2,
                         label="largest model, mean")  # fmt: skip
    accuracy.set_ylabel("accuracy, %")
    low, high = accuracy.get_ylim()
    accuracy.set_ylim(low - 0.3 * (high - low), min(high, 100.4))
    accuracy.set_xlabel("seconds")
    accuracy.set_xlim(0, shown.duration_s)
    accuracy.legend(loc="lower left", ncols=2, fontsize=9)
    figure.align_ylabels()
    return figure


def _draw_gears(axes: Axes, spans: Sequence[GearSpan], ladder: Sequence[str]) -> None:
    names = _in_ladder_order({span.gear for span in spans}, ladder)
    for span in spans:
        place = names.index(span.gear)
        colour = _GEAR_COLOURS[place % len(_GEAR_COLOURS)]
        # a gear that a few rows were answered in must not vanish between two pixels
        width_s = max(span.end_s - span.start_s, 0.05)
        axes.broken_barh([(span.start_s, width_s)], (place - 0.4, 0.8), color=colour, linewidth=0)
    axes.set_yticks(range(len(names)), [name.replace("-", "-\n") for name in names], fontsize=8)
    axes.set_ylim(-0.6, max(len(names), 1) - 0.4)
    axes.grid(visible=False, axis="y")
    axes.set_ylabel("gear", labelpad=9)


def _in_ladder_order(gears: Iterable[str], ladder: Sequence[str]) -> list[str]:
    """Gears from the one for the lowest rates up, as far as their names tell."""

    def place(gear: str) -> tuple[int, str]:
        found = [index for index, entry in enumerate(ladder) if entry in gear]
        return (max(found) if found else len(ladder), gear)

    return sorted(gears, key=place)


def latency_over_rate(report: DemoReport) -> Figure:
    """95th percentile of every run of the search over its rate."""
    figure = Figure(figsize=(7.2, 3.8), layout="constrained")
    axes = figure.subplots()
    for name, title in TITLES.items():
        result = getattr(report, name)
        valid = [probe for probe in result.probes if probe.verdict != "void" and probe.p95_s is not None]
        for kind, marker, size in (("probe", "o", 26), ("confirmation", "D", 46)):
            mine = [probe for probe in valid if probe.kind == kind]
            filled = [_COLOURS[name] if probe.verdict == "sustained" else "none" for probe in mine]
            axes.scatter([probe.rate_per_s for probe in mine], [(probe.p95_s or 0.0) * 1e3 for probe in mine], s=size,
                         marker=marker, facecolors=filled, edgecolors=_COLOURS[name], linewidths=1.3)  # fmt: skip
        axes.plot([], [], "o", color=_COLOURS[name], label=title.replace("\n", " "))
    axes.plot([], [], "o", markerfacecolor="none", markeredgecolor=_INK, label="not sustained")
    axes.plot([], [], "D", color=_INK, label="run of 20 s")
    axes.axhline(report.slo_s * 1e3, color=_SLO_COLOUR, linewidth=1.2, label=f"SLO {report.slo_s * 1e3:.1f} ms")
    axes.set_yscale("log")
    _label_decades(axes)
    axes.set_xlim(left=0)
    axes.set_xlabel("rows per second")
    axes.set_ylabel("p95 latency, ms")
    figure.legend(loc="outside right upper", fontsize=9)
    return figure


def _label_decades(axes: Axes) -> None:
    """Label the axis 5, 10, 20, 50 and so on, not 10 to the power of."""
    axes.yaxis.set_major_locator(mpl.ticker.LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(mpl.ticker.FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(mpl.ticker.NullFormatter())


def who_answered(report: DemoReport) -> Figure:
    """Share of the rows of the bursty load by the model that answered them."""
    shares = report.timeline.rows_by_model
    figure = Figure(figsize=(7.2, 0.55 + 0.38 * len(shares)), layout="constrained")
    axes = figure.subplots()
    axes.barh(range(len(shares)), [share * 100 for share in shares.values()], color=_COLOURS["cascade"], height=0.6)
    for place, share in enumerate(shares.values()):
        axes.text(share * 100, place, f"  {share:.1%}", va="center")
    axes.set_yticks(range(len(shares)), list(shares))
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, 110)
    axes.set_xlabel("% of the rows answered")
    return figure


def slo_curve(curve: SloCurve) -> Figure:
    """Saving over SLO, simulated as a line, measured as points."""
    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    axes = figure.subplots()
    axes.plot(*_points(curve.simulated), "-o", color=_COLOURS["cascade"], markersize=4, label="simulated")
    axes.plot(*_points(curve.measured), "D", color=_INK, label="measured")
    axes.axhline(1.0, color=_COLOURS["best_single"], linestyle="--", linewidth=1.2, label="largest model")
    axes.set_xscale("log")
    multiples = sorted({point.slo_multiple for point in (*curve.simulated, *curve.measured)})
    axes.set_xticks(multiples, [f"{multiple:g} x" for multiple in multiples])
    axes.xaxis.set_minor_locator(mpl.ticker.NullLocator())
    axes.set_xlabel("SLO, multiples of the largest model's time for one row")
    axes.set_ylabel("saving")
    axes.set_ylim(0, max([point.saving for point in (*curve.simulated, *curve.measured)], default=1.0) * 1.25)
    axes.legend(fontsize=9, loc="upper right", ncols=3)
    return figure


def _points(points: Sequence[SloPoint]) -> tuple[list[float], list[float]]:
    return [point.slo_multiple for point in points], [point.saving for point in points]
