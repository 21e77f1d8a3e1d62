"""The page about a gear plan: one HTML file that loads nothing, for the screen and for paper."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cascadeserve.artefacts import write_atomically
from cascadeserve.cluster import GpuDevice
from cascadeserve.errors import UsageError
from planner.derived import (
    bound_points,
    costs_by_endpoint,
    layout_rates,
    plan_cost,
    range_end,
    rate_text,
    row_work_s,
    scaling,
)
from planner.explain import certificate_claims
from planner.explain_layouts import (
    SEVERAL_FAMILIES,
    cost_sentences,
    device_names,
    layout_words,
    memory_words,
    scaling_sentence,
    serves_sentence,
    step_words,
    transition_sentences,
)
from planner.explain_pictures import draw_front, draw_rates, highest_rate_per_s, marks

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from cascadeserve.cluster import Cluster
    from cascadeserve.gear_plan import Gear, GearPlan, LadderEntry, Layout, PlannedFamily, Stage
    from planner.explain_pictures import FrontPicture, Mark, RatePicture
    from planner.profile import Profile

_SPACE = "\N{NO-BREAK SPACE}"


@dataclass(frozen=True)
class EntryView:
    """A ladder entry; work in device-seconds per row, and as a share of the dearest entry's."""

    entry: LadderEntry
    mark: Mark
    work_s: float
    work_share: float
    is_reference: bool


@dataclass(frozen=True)
class StageView:
    """A stage of a gear; batches in rows."""

    stage: Stage
    min_batch: int
    max_batch: int
    max_wait_s: float


@dataclass(frozen=True)
class GearView:
    """A gear; `share` of the goal's rows, None without a prior."""

    gear: Gear
    entry: EntryView
    stages: list[StageView]
    share: float | None
    end: str


@dataclass(frozen=True)
class LayoutGears:
    """The gears of one family under one layout; `serves` and `scaling` are sentences, or empty."""

    layout: Layout
    serves: str
    gears: list[GearView]
    picture: RatePicture
    scaling: str

    @property
    def predicted(self) -> bool:
        """Whether any gear has predictions."""
        return any(view.gear.predicted is not None for view in self.gears)

    @property
    def accurate(self) -> bool:
        """Whether any gear states an accuracy."""
        return any(view.entry.entry.accuracy is not None for view in self.gears)

    @property
    def weighted(self) -> bool:
        """Whether the shares of the goal's rows are known."""
        return any(view.share is not None for view in self.gears)


@dataclass(frozen=True)
class DeviceTimes:
    """Kinds of device, and per model the time of one row and of a full batch on each, seconds."""

    kinds: list[str]
    rows: list[tuple[str, int, list[tuple[float, float]]]]


@dataclass(frozen=True)
class FamilyView:
    """One family of the plan."""

    name: str
    family: PlannedFamily
    summary: str
    claims: list[str]
    entries: list[EntryView]
    front: FrontPicture | None
    layouts: list[LayoutGears]
    devices: DeviceTimes | None
    max_rate_per_s: float
    # of the entries that gears use, the degraded ones aside
    accuracies: list[float]

    @property
    def predicted(self) -> bool:
        """Whether any gear has predictions."""
        return any(part.predicted for part in self.layouts)

    @property
    def accurate(self) -> bool:
        """Whether any entry states its accuracy."""
        return any(view.entry.accuracy is not None for view in self.entries)


@dataclass(frozen=True)
class Grid:
    """Instances [models][endpoints] of a layout, 0 where a model does not stand; memory [endpoints] in words."""

    layout: Layout
    endpoints: list[str]
    rows: list[tuple[str, list[int]]]
    memory: list[str]


@dataclass(frozen=True)
class Way:
    """From one layout to another, in words."""

    title: str
    steps: list[str]
    sentences: list[str]


def check_page() -> None:
    """Refuse before anything is read what cannot be written afterwards.

    Raises:
        UsageError: there is no Jinja.

    """
    try:
        import jinja2  # noqa: F401, PLC0415 - only the page needs it
    except ModuleNotFoundError as error:
        raise UsageError(f"a page needs the package {error.name!r}: pip install 'cascadeserve[examples]'") from error


def write_page(
    path: Path, plan: GearPlan, cluster: Cluster | None, profiles: Mapping[str, Profile], changed: str | None = None
) -> None:
    """Write the page; folders are made. The rest is for `render_page`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, render_page(plan, cluster, profiles, changed).encode())


def render_page(
    plan: GearPlan, cluster: Cluster | None, profiles: Mapping[str, Profile], changed: str | None = None
) -> str:
    """Text of the page; the same input gives the same text.

    With `cluster` it says what the endpoints are and cost, with `profiles`, by device kind, what memory is taken.
    `changed` is a sentence about files that are not those of the plan.
    """
    import jinja2  # noqa: PLC0415 - only the page needs it

    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("planner", "."), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {
        "percent": _percent,
        "points": _points,
        "ms": _ms,
        "bound": bound_points,
        "rate": rate_text,
        "at": _at,
        "px": _px,
        "layout_words": layout_words,
    }
    cost = plan_cost(plan, costs_by_endpoint(cluster))
    return environment.get_template("explain_page.html.jinja").render(
        plan=plan,
        changed=changed,
        families=[_family(plan, name, cluster) for name in plan.families],
        grids=[_grid(plan, layout, cluster, profiles) for layout in plan.layouts],
        ways=[
            Way(
                title=f"From {layout_words(way.from_layout)} to {layout_words(way.to_layout)}",
                steps=list(map(step_words, way.steps)),
                sentences=list(transition_sentences(plan, way)),
            )
            for way in plan.transitions
        ],
        devices=_devices(cluster),
        several_families=SEVERAL_FAMILIES if len(plan.families) > 1 else "",
        costs=[] if cost is None else list(cost_sentences(plan, cost)),
    )


def _family(plan: GearPlan, name: str, cluster: Cluster | None) -> FamilyView:
    family = plan.families[name]
    work_s = {entry.name: row_work_s(family, entry) for entry in family.ladder}
    entries = {
        entry.name: EntryView(
            entry=entry,
            mark=mark,
            work_s=work_s[entry.name],
            work_share=work_s[entry.name] / max(work_s.values()),
            is_reference={stage.model for stage in entry.stages} == {family.reference_model},
        )
        for entry, mark in zip(family.ladder, marks(len(family.ladder)), strict=True)
    }
    mark_of = {entry: view.mark for entry, view in entries.items()}
    upper_per_s = highest_rate_per_s(family, [layout.name for layout in plan.layouts])
    planned = {gear.ladder_entry for gear in family.gears if not gear.degraded}
    rates, several = layout_rates(plan, family), len(plan.layouts) > 1
    return FamilyView(
        name=name,
        family=family,
        summary=summarise(plan, name),
        claims=list(certificate_claims(family)),
        entries=list(entries.values()),
        front=draw_front(family, mark_of, work_s),
        layouts=[
            LayoutGears(
                layout=layout,
                serves=serves_sentence(plan, family, layout.name),
                gears=[_gear(family, gear, entries) for gear in family.gears_of(layout.name)],
                picture=draw_rates(family, layout.name, mark_of, upper_per_s, rates),
                scaling=_scaling(plan, family, layout, several=several),
            )
            for layout in plan.layouts
        ],
        devices=_device_times(plan, family, cluster),
        max_rate_per_s=upper_per_s,
        accuracies=[entry.accuracy for entry in family.ladder if entry.accuracy is not None and entry.name in planned],
    )


def summarise(plan: GearPlan, name: str) -> str:
    """One sentence on what a family's plan promises."""
    family = plan.families[name]
    endpoints = {endpoint for layout in plan.layouts for endpoint in layout.instances}
    count = f"{len(endpoints)} endpoint{'' if len(endpoints) == 1 else 's'}"
    rate = rate_text(highest_rate_per_s(family, [layout.name for layout in plan.layouts]))
    if family.certificate is not None:
        loss = (
            f"and certified to lose at most {_points(family.certificate.epsilon)} of accuracy against "
            f"{family.reference_model}"
        )
    elif all({stage.model for stage in entry.stages} == {family.reference_model} for entry in family.ladder):
        loss = f"and every answer that of {family.reference_model}"
    else:
        loss = "and nothing certified about the accuracy"
    share = ""
    if family.guaranteed_share < 1.0:
        share = f" For that it has {family.guaranteed_share:.0%} of the device time, whatever the other families do."
    return (
        f"Planned for up to {rate} rows per second on {count}, with {_percent(family.percentile)} of the requests "
        f"within {_ms(family.slo_s)}, {loss}.{share}"
    )


def _gear(family: PlannedFamily, gear: Gear, entries: Mapping[str, EntryView]) -> GearView:
    stages = []
    for stage in entries[gear.ladder_entry].entry.stages:
        trigger = gear.triggers.get(stage.model)
        if trigger is None:
            stages.append(StageView(stage, 1, family.models[stage.model].max_batch, 0.0))
        else:
            stages.append(StageView(stage, trigger.min_batch, trigger.max_batch, trigger.max_wait_s))
    share = None if family.expected is None else family.expected.gears.get(gear.name)
    return GearView(gear, entries[gear.ladder_entry], stages, share, range_end(family, gear))


def _scaling(plan: GearPlan, family: PlannedFamily, layout: Layout, *, several: bool) -> str:
    return scaling_sentence(scaling(plan, family, layout), layout.name, several=several)


def _device_times(plan: GearPlan, family: PlannedFamily, cluster: Cluster | None) -> DeviceTimes | None:
    """None where all devices take the same times."""
    groups = device_names(plan, family, cluster)
    if len(groups) < 2:  # noqa: PLR2004 - one group has nothing to compare
        return None
    rows = [
        (
            name,
            model.max_batch,
            [(model.batch_busy_s(1, group[0]), model.batch_busy_s(model.max_batch, group[0])) for group in groups],
        )
        for name, model in family.models.items()
    ]
    return DeviceTimes(list(groups.values()), rows)


def _grid(plan: GearPlan, layout: Layout, cluster: Cluster | None, profiles: Mapping[str, Profile]) -> Grid:
    endpoints = list(layout.instances)
    standing = [
        part
        for family in plan.families.values()
        for name, model in family.models.items()
        for part in model.composed_of or (name,)
    ]
    rows = [
        (model, [layout.instances[endpoint].get(model, 0) for endpoint in endpoints])
        for model in dict.fromkeys(standing)
    ]
    return Grid(layout, endpoints, rows, [memory_words(layout, each, cluster, profiles) for each in endpoints])


def _devices(cluster: Cluster | None) -> dict[str, str]:
    """What each endpoint is, in words."""
    devices = {}
    for endpoint in cluster.endpoints if cluster is not None else ():
        what = endpoint.device_kind or ("GPU" if isinstance(endpoint.device, GpuDevice) else "CPU")
        slots = f"{endpoint.slots} slot{'' if endpoint.slots == 1 else 's'}"
        devices[endpoint.name] = f"{what}, {slots}"
    return devices


def _percent(share: float, digits: int | None = None) -> str:
    return f"{share:.{digits}%}" if digits is not None else f"{100.0 * share:.4g}%"


def _points(gap: float) -> str:
    return f"{bound_points(gap)}{_SPACE}points"


def _ms(seconds: float) -> str:
    if seconds >= 1.0:
        return f"{seconds:.2f}{_SPACE}s"
    digits = next(digits for digits, from_s in ((0, 0.1), (1, 0.01), (2, 0.001), (3, 0.0)) if seconds >= from_s)
    return f"{1e3 * seconds:.{digits}f}{_SPACE}ms"


def _at(per_cent: float) -> str:
    return f"{per_cent:.3f}%"


def _px(pixels: float) -> str:
    return f"{pixels:.1f}"
