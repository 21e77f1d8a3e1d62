"""The timeline of a simulated load as a picture: rate, layouts, gears, latency, and which model answered."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np

from cascadeserve.artefacts import write_atomically
from cascadeserve.errors import UsageError
from planner.explain_layouts import short_name

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from cascadeserve.gear_plan import GearPlan, PlannedFamily
    from planner.simulator import Simulation

    Floats = NDArray[np.float64]

SUFFIXES = (".svg", ".png")

# a point of a curve stands for at least this long, and there are about this many of them
_LEAST_BIN_S = 1.0
_BINS = 240
_SIZE_INCHES = (11.0, 8.0)
_DPI = 130
# a latency this far under the SLO needs a logarithmic axis to be seen
_LOG_SPAN = 30.0
# how far above the offered rate the demand is shown
_ROOM = 1.4
# what a letter takes of the picture's width; a gear too short for its name has it in the legend only
_LETTER_FRAC = 0.0085
# letters in a line of the legend of gears, below the picture, and what an entry has beside its name
_LEGEND_LETTERS, _KEY_LETTERS = 150, 6

_INK, _GRID, _OFFERED, _DEMAND, _MEDIAN, _WRONG = "#333333", "#dddddd", "#8a8f98", "#1f4e9c", "#7fa6d9", "#c62828"
# from careful to fast
_GEARS = ("#2c6fbb", "#3fa7a3", "#8cbf4d", "#e3b23c", "#e07b39", "#9a5ba5", "#5b6b7b", "#b08968")
_LAYOUTS = ("#7b8794", "#52606d", "#323f4b")
_MODELS = ("#cfe3d4", "#8fc1a9", "#4f9a94", "#2b6777", "#1d4157", "#6b5b95", "#a89bb9", "#d6cfe0")
_STYLE: Any = {
    "font.size": 9.0,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "text.color": _INK,
    # the same run gives the same bytes
    "svg.hashsalt": "cascadeserve",
}


def check_plot(path: Path) -> None:
    """Refuse before anything is simulated what cannot be drawn afterwards.

    Raises:
        UsageError: the suffix is unknown, or there is no matplotlib.

    """
    if path.suffix not in SUFFIXES:
        raise UsageError(f"{path}: a plot is written as {' or '.join(SUFFIXES)}; give the file such a name")
    try:
        import matplotlib.figure  # noqa: F401, PLC0415 - takes a second, and only plots need it
    except ModuleNotFoundError as error:
        raise UsageError(f"a plot needs the package {error.name!r}: pip install 'cascadeserve[planner]'") from error


def draw_timeline(path: Path, simulation: Simulation, plan: GearPlan, family: str, title: str) -> None:
    """Draw a run of a family and write it; the suffix tells the format."""
    import matplotlib as mpl  # noqa: PLC0415 - takes a second, and only plots need it
    from matplotlib.figure import Figure  # noqa: PLC0415

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=_SIZE_INCHES, layout="constrained")
        _fill(figure, simulation, plan, plan.families[family], title)
        content = io.BytesIO()
        kind = path.suffix.removeprefix(".")
        figure.savefig(content, format=kind, dpi=_DPI, metadata={"Date": None} if kind == "svg" else None)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content.getvalue())


def _fill(figure: Figure, simulation: Simulation, plan: GearPlan, family: PlannedFamily, title: str) -> None:
    several = len(plan.layouts) > 1
    heights = (3.0, *((0.3,) if several else ()), 0.55, 3.0, 2.0)
    rate, *layouts, gears, latency, models = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    figure.suptitle(title, x=0.012, ha="left", fontsize=11, fontweight="bold")
    duration_s = simulation.load.duration_s
    bin_s = max(_LEAST_BIN_S, duration_s / _BINS)
    edges = bin_s * np.arange(int(np.ceil(duration_s / bin_s - 1e-9)) + 1)
    edges[-1] = duration_s
    where = np.clip(np.searchsorted(edges, simulation.load.times_s, side="right") - 1, 0, len(edges) - 2)
    _draw_rate(rate, simulation, edges, where)
    if several:
        _draw_layouts(layouts[0], simulation, [layout.name for layout in plan.layouts])
    _draw_gears(figure, gears, simulation, family)
    _draw_latency(latency, simulation, family.slo_s, edges, where)
    _draw_models(models, simulation, family, edges, where)
    models.set_xlabel("seconds from the start of the load")
    models.set_xlim(0.0, duration_s)
    for axes in (rate, latency):
        axes.grid(axis="y", color=_GRID, linewidth=0.7)
        axes.set_axisbelow(True)
    figure.align_ylabels([rate, latency, models])


def _legend(axes: Axes) -> None:
    if not axes.get_legend_handles_labels()[1]:
        return
    # beside the picture, where it hides nothing
    axes.legend(loc="upper left", bbox_to_anchor=(1.005, 1.04), frameon=False, borderaxespad=0.0)


def _steps(axes: Axes, values: Floats, edges: Floats, **style: Any) -> None:  # noqa: ANN401 - of the line
    """One value per bin; gaps where it is NaN."""
    axes.plot(edges, np.append(values, values[-1]), drawstyle="steps-post", **style)


def _quantiles(values: Floats, where: NDArray[np.int64], bins: int, share: float) -> Floats:
    """Quantile of the values of each bin, NaN where it has none; what lies in no bin is left out."""
    order = np.argsort(where, kind="stable")
    groups = np.split(values[order], np.searchsorted(where[order], np.arange(bins + 1)))[1:-1]
    return np.array([np.quantile(each, share) if len(each) else np.nan for each in groups])


def _draw_rate(axes: Axes, simulation: Simulation, edges: Floats, where: NDArray[np.int64]) -> None:
    load, bins, width_s = simulation.load, len(edges) - 1, np.diff(edges)
    offered = np.bincount(where, weights=load.rows, minlength=bins) / width_s
    axes.stairs(offered, edges, fill=True, color=_OFFERED, alpha=0.5, label="offered")
    refused = np.isnan(simulation.latency_s)
    if refused.any():
        per_s = np.bincount(where[refused], weights=load.rows[refused], minlength=bins) / width_s
        axes.stairs(per_s, edges, fill=True, color=_WRONG, alpha=0.8, label="of it refused")
    # a backlog makes the demand of single ticks jump to any height
    ticks = np.searchsorted(edges, simulation.tick_s, side="left") - 1
    demand = _quantiles(simulation.tick_demand_per_s, ticks, bins, 0.5)
    _steps(axes, demand, edges, color=_DEMAND, linewidth=1.2, label="demand seen,\nwith backlog")
    axes.set_ylim(0.0, _ROOM * float(offered.max()))
    axes.set_ylabel("rows per second")
    _legend(axes)


def _draw_layouts(axes: Axes, simulation: Simulation, names: list[str]) -> None:
    colours = [_LAYOUTS[index % len(_LAYOUTS)] for index in range(len(names))]
    _draw_bar(axes, "layout", simulation, simulation.tick_layout, names, colours)
    for start_s, end_s, changing in _stretches(simulation, simulation.tick_changing):
        if changing:
            axes.axvspan(start_s, end_s, facecolor="none", edgecolor="white", hatch="////", linewidth=0)


def _draw_gears(figure: Figure, axes: Axes, simulation: Simulation, family: PlannedFamily) -> None:
    from matplotlib.patches import Patch  # noqa: PLC0415

    # gears of several layouts with one name do the same, and the bar above tells the layout
    labels = list(map(short_name, family.gears))
    kinds = list(dict.fromkeys(labels))
    degraded = {label for label, gear in zip(labels, family.gears, strict=True) if gear.degraded}
    colour_of = {kind: _WRONG if kind in degraded else _GEARS[index % len(_GEARS)] for index, kind in enumerate(kinds)}
    _draw_bar(axes, "gear", simulation, simulation.tick_gear, labels, [colour_of[label] for label in labels])
    for moment_s, _, _ in _stretches(simulation, simulation.tick_layout)[1:]:
        axes.axvline(moment_s, color=_INK, linewidth=1.6, linestyle=(0, (2, 1)))
    seen = {labels[which] for _, _, which in _stretches(simulation, simulation.tick_gear)}
    shown = [kind for kind in kinds if kind in seen]
    if shown:
        columns = _LEGEND_LETTERS // (max(map(len, shown)) + _KEY_LETTERS)
        figure.legend(
            handles=[Patch(color=colour_of[kind], label=kind) for kind in shown], loc="outside lower left",
            frameon=False, ncols=max(1, min(columns, len(shown))), fontsize=8, title="gears", title_fontsize=8,
            alignment="left",
        )  # fmt: skip


def _stretches(simulation: Simulation, values: NDArray[Any]) -> list[tuple[float, float, int]]:
    """Start and end, in seconds, of what stays as it is from tick to tick while the load lasts, and what it is."""
    duration_s = simulation.load.duration_s
    shown = simulation.tick_s <= duration_s
    tick_s, which = simulation.tick_s[shown], values[shown].astype(np.int64)
    begins = np.flatnonzero(np.diff(which, prepend=-1))
    starts_s = tick_s[begins]
    # the first tick shows what was in force from the start
    starts_s[:1] = 0.0
    ends_s = np.append(starts_s[1:], duration_s)[: len(starts_s)]
    return list(zip(starts_s.tolist(), ends_s.tolist(), which[begins].tolist(), strict=True))


def _draw_bar(
    axes: Axes, what: str, simulation: Simulation, values: NDArray[Any], names: list[str], colours: list[str]
) -> None:
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    axes.tick_params(bottom=False)
    axes.set_ylim(0.0, 1.0)
    axes.set_ylabel(what, rotation=0, ha="right", va="center")
    for start_s, end_s, which in _stretches(simulation, values):
        axes.axvspan(start_s, end_s, color=colours[which], linewidth=0)
        if end_s - start_s > _LETTER_FRAC * len(names[which]) * simulation.load.duration_s:
            style = {"ha": "center", "va": "center", "color": "white", "fontsize": 8}
            axes.text((start_s + end_s) / 2, 0.5, names[which], style)


def _draw_latency(axes: Axes, simulation: Simulation, slo_s: float, edges: Floats, where: NDArray[np.int64]) -> None:
    answered = ~np.isnan(simulation.latency_s)
    latency_s, where = simulation.latency_s[answered], where[answered]
    for share, colour, label in ((0.95, _DEMAND, "p95"), (0.5, _MEDIAN, "p50")):
        found = _quantiles(latency_s, where, len(edges) - 1, share)
        _steps(axes, 1e3 * found, edges, color=colour, linewidth=1.4, label=label)
    axes.axhline(1e3 * slo_s, color=_WRONG, linewidth=1.2, linestyle=(0, (5, 3)), label=f"SLO {1e3 * slo_s:.3g} ms")
    if len(latency_s) and slo_s > _LOG_SPAN * np.median(latency_s):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0.0)
    axes.set_ylabel("latency of answers, ms")
    _legend(axes)


def _draw_models(
    axes: Axes, simulation: Simulation, family: PlannedFamily, edges: Floats, where: NDArray[np.int64]
) -> None:
    """Share of the answered rows by the model whose answer was taken."""
    names = list(family.models)
    entries = [family.entry(gear.ladder_entry) for gear in family.gears]
    most = max(len(entry.stages) for entry in entries)
    model_of = np.array(
        [
            [names.index(entry.stages[min(stage, len(entry.stages) - 1)].model) for stage in range(most)]
            for entry in entries
        ]
    )
    answered = simulation.stage >= 0
    request = np.repeat(np.arange(len(simulation.load.rows)), simulation.load.rows)[answered]
    model = model_of[simulation.gear[request], simulation.stage[answered]]
    bins = len(edges) - 1
    counts = np.bincount(model * bins + where[request], minlength=len(names) * bins).reshape(len(names), bins)
    total = counts.sum(axis=0)
    shares = np.divide(100.0 * counts, total, out=np.zeros(counts.shape), where=total > 0)
    base = np.zeros(bins)
    for index in np.flatnonzero(counts.sum(axis=1)):
        top = base + shares[index]
        axes.stairs(top, edges, baseline=base, fill=True, color=_MODELS[index % len(_MODELS)], label=names[index])
        base = top
    axes.set_ylim(0.0, 100.0)
    axes.set_ylabel("answered by, %")
    _legend(axes)
