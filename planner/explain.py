"""A gear plan in words and tables; what cluster and profiles add is said where they are given."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table

from planner.derived import (
    alike_endpoints,
    bound_points,
    busy_when_sustained,
    costs_by_endpoint,
    device_limits,
    plan_cost,
    row_work_s,
    scaling,
)
from planner.explain_layouts import (
    SEVERAL_FAMILIES,
    cost_sentences,
    entry_words,
    layout_words,
    memory_words,
    scaling_sentence,
    serves_sentence,
    step_words,
    transition_sentences,
)

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from cascadeserve.cluster import Cluster
    from cascadeserve.gear_plan import Gear, GearPlan, Layout, PlannedFamily
    from planner.profile import Profile


def explain_plan(plan: GearPlan, cluster: Cluster | None, profiles: Mapping[str, Profile]) -> Iterator[Table | str]:
    """Yield what a terminal prints, in order; `profiles` is by device kind."""
    for name in plan.families:
        yield from _family_parts(plan, name)
    if len(plan.families) > 1 and len(plan.layouts) > 1:
        yield f"When layouts come and go: {SEVERAL_FAMILIES[0].lower()}{SEVERAL_FAMILIES[1:]}"
    yield from (_layout_line(layout, cluster, profiles) for layout in plan.layouts)
    for way in plan.transitions:
        steps = "; ".join(map(step_words, way.steps))
        yield f"from {layout_words(way.from_layout)} to {layout_words(way.to_layout)}: {steps}"
        yield "  " + " ".join(transition_sentences(plan, way))
    if (cost := plan_cost(plan, costs_by_endpoint(cluster))) is not None:
        yield " ".join(cost_sentences(plan, cost))
    if plan.made_from is not None:
        made = plan.made_from
        inputs = ", ".join(f"{what} {digest.removeprefix('sha256:')[:12]}" for what, digest in made.digests.items())
        yield f"made by planner {made.planner_version}, policy {made.policy}, seed {made.seed}, from {inputs}"


def _family_parts(plan: GearPlan, name: str) -> Iterator[Table | str]:
    family = plan.families[name]
    yield (
        f"{name}: {family.percentile:.0%} of the requests within {_ms(family.slo_s)} ms, of up to "
        f"{family.max_rows_per_request} row(s) each; arrivals with index of dispersion {family.dispersion:g}"
    )
    if (share := family.guaranteed_share) < 1.0:
        yield (
            f"{name} has {share:.0%} of the device time whatever the others do, for which its gears are planned; "
            "of what the others leave it may use more, and then serves higher rates in each gear"
        )
    yield "models: " + ", ".join(f"{name}:{model.version}" for name, model in family.models.items())
    yield from _own_times(plan, family)
    yield _ladder_table(family)
    for layout in plan.layouts:
        yield from _gears_of(plan, family, layout)
    if family.expected is not None:
        yield (
            f"At the rates of the goal {family.expected.accuracy:.2%} of the rows are answered rightly "
            f"(over time instead of rows: {family.expected.accuracy_over_time:.2%})."
        )
    yield from certificate_claims(family)
    if family.certificate is not None:
        yield "This assumes: " + " ".join(family.certificate.assumptions)


def _gears_of(plan: GearPlan, family: PlannedFamily, layout: Layout) -> Iterator[str]:
    several = len(plan.layouts) > 1
    yield f"gears of {layout_words(layout.name)}"
    if several:
        yield serves_sentence(plan, family, layout.name)
    yield from (_gear_lines(family, gear) for gear in family.gears_of(layout.name))
    yield limit_sentence(family, layout.name)
    if several and (more := scaling_sentence(scaling(plan, family, layout), layout.name, several=True)):
        yield more


def certificate_claims(family: PlannedFamily) -> Iterator[str]:
    """What is certified, and what is not."""
    certificate = family.certificate
    if certificate is None:
        if all({stage.model for stage in entry.stages} == {family.reference_model} for entry in family.ladder):
            yield f"Every answer is that of {family.reference_model}: there is no loss to certify."
        else:
            yield "Nothing is certified: this is a draft, planned without calibration rows."
        return
    yield (
        f"Certified: on rows like the {certificate.rows:,} calibration rows, with probability "
        f"{1.0 - certificate.delta:.4g} over their choice, no certified cascade, and no mix of them, is less accurate "
        f"than {family.reference_model} ({certificate.reference_accuracy:.2%} there) by more than "
        f"{bound_points(certificate.epsilon)} points."
    )
    if certificate.weighted_epsilon is not None:
        yield f"At the rates of the goal: by no more than {bound_points(certificate.weighted_epsilon)} points."
    bare = [gear.name for gear in family.gears if family.entry(gear.ladder_entry).epsilon is None]
    if bare:
        yield f"Not certified: answers given in gear {', '.join(bare)}."


def limit_sentence(family: PlannedFamily, layout: str) -> str:
    """What keeps the highest range from being higher."""
    planned = [gear for gear in family.gears_of(layout) if not gear.degraded]
    top = planned[-1]
    busy = busy_when_sustained(top)
    if top.predicted is None or top.max_rate_per_s is None or busy is None:
        return f"layout {layout}: up to {top.upper_rate_per_s:.0f} rows/s, without predictions"
    sustained = top.predicted.sustained_rate_per_s
    if device_limits(top):
        what = f"the device, which would then be {min(busy, 1.0):.0%} busy"
    else:
        what = f"waiting, since the device would be only {busy:.0%} busy: calls cost more than the models"
    asked = {
        "goal": ", which is all that the goal asks for,",
        "next_layout": ", above which the next layout answers more rows rightly,",
    }.get(top.predicted.ended_by or "", ",")
    return (
        f"Planned up to {top.max_rate_per_s:.0f} rows/s{asked} {top.max_rate_per_s / sustained:.0%} of the "
        f"{sustained:.0f} that {top.name} sustains; at {sustained:.0f} the limit is {what}."
    )


def _own_times(plan: GearPlan, family: PlannedFamily) -> Iterator[str]:
    """Endpoints whose devices take other times than `busy_s`, by the reference model's largest batch."""
    model = family.models[family.reference_model]
    for group in alike_endpoints(plan, family):
        if group[0] not in model.busy_s_on:
            continue
        share = model.batch_busy_s(model.max_batch, group[0]) / model.batch_busy_s(model.max_batch)
        yield (
            f"{', '.join(group)} {'takes' if len(group) == 1 else 'take'} {share:.2f} times as long for "
            f"{family.reference_model} as endpoints of the first kind"
        )


def _layout_line(layout: Layout, cluster: Cluster | None, profiles: Mapping[str, Profile]) -> str:
    parts = []
    for endpoint, models in layout.instances.items():
        memory = memory_words(layout, endpoint, cluster, profiles)
        held = ", ".join(f"{count} x {model}" for model, count in models.items()) or "nothing"
        parts.append(f"{endpoint}: {held}{f' ({memory})' if memory else ''}")
    return f"{layout_words(layout.name)}: {'; '.join(parts)}"


def _ladder_table(family: PlannedFamily) -> Table:
    table = Table(box=SIMPLE_HEAD, title="ladder", title_justify="left")
    table.add_column("entry", overflow="fold")
    for column in ("accuracy", "loses at most", "work"):
        table.add_column(column, no_wrap=True)
    dearest = max(row_work_s(family, entry) for entry in family.ladder)
    for entry in family.ladder:
        onward = zip(entry.stages[1:], entry.reach[1:], strict=True)
        table.add_row(
            "\n".join([entry.name, *(f"  {share:.1%} of the rows reach {stage.model}" for stage, share in onward)]),
            "-" if entry.accuracy is None else f"{entry.accuracy:.2%}",
            "not certified" if entry.epsilon is None else f"{bound_points(entry.epsilon)} points",
            f"{row_work_s(family, entry) / dearest:.0%}",
        )
    return table


def _gear_lines(family: PlannedFamily, gear: Gear) -> str:
    end = "and more" if gear.max_rate_per_s is None else f"to {gear.max_rate_per_s:.0f}"
    degraded = " (degraded)" if gear.degraded else ""
    lines = [f"{gear.min_rate_per_s:.0f} {end} rows/s: gear {gear.name}{entry_words(gear)}{degraded}"]
    for model, trigger in gear.triggers.items():
        wait = f" within {_ms(trigger.max_wait_s)} ms" if trigger.min_batch > 1 else ""
        lines.append(f"  {model}: batches of {trigger.min_batch}{wait} to {trigger.max_batch}")
    if gear.predicted is not None:
        found = gear.predicted
        latencies = ", ".join(
            f"p{share} {_ms(seconds)} ms"
            for share, seconds in ((50, found.p50_s), (95, found.p95_s), (99, found.p99_s))
        )
        lines.append(
            f"  at {gear.upper_rate_per_s:.0f} rows/s: {latencies}, device {found.utilisation:.0%} busy, "
            f"{found.accuracy:.2%} right; p{100.0 * family.percentile:.4g} in its range at most {_ms(found.worst_s)} ms"
        )
    return "\n".join(lines)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g}"
