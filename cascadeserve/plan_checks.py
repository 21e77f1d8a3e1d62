"""What must hold of a gear plan beyond the types of its fields."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cascadeserve.cluster import Cluster
    from cascadeserve.gear_plan import Gear, GearPlan, LadderEntry, Layout, PlannedFamily, TensorSpec, Transition

Problems = Iterator[tuple[str, str]]

# shares that are meant to sum to 1 may exceed it by this
_ROUNDING = 1e-9


def problems(plan: GearPlan, cluster: Cluster | None) -> Problems:
    """Yield (field, what is wrong there and what to do)."""
    yield from _duplicates(plan.layouts, "$.layouts")
    yield from _share_problems(plan)
    endpoints = {endpoint for layout in plan.layouts for endpoint in layout.instances}
    owners: dict[str, str] = {}
    placed = {part for parts in plan.ensembles.values() for part in parts}
    versions = plan.versions
    for family_name, family in plan.families.items():
        at = f"$.families.{family_name}"
        for model in family.models:
            if model in owners:
                yield f"{at}.models.{model}", f"belongs to family {owners[model]!r} already; a model has one family"
            owners[model] = family_name
            if model in placed:
                yield f"{at}.models.{model}", "is part of an ensemble too; such a model is never called alone"
            for endpoint in (name for name in family.models[model].busy_s_on if name not in endpoints):
                yield f"{at}.models.{model}.busy_s_on.{endpoint}", "is an endpoint that no layout has"
            for part, version in family.models[model].composed_of.items():
                if version != versions[part]:
                    field = f"{at}.models.{model}.composed_of.{part}"
                    yield field, "is of one version here and of another elsewhere, but Triton joins the newest"
        if any(family_name in other.models for other in plan.families.values()):
            yield at, "has the name of a model; requests for the cascade and for the model would be one"
        yield from _duplicates(family.inputs, f"{at}.inputs")
        yield from _ladder_problems(family, at)
        yield from _certificate_problems(family, at)
        yield from _gear_problems(plan, family, at)
    for index, layout in enumerate(plan.layouts):
        yield from _layout_problems(plan, layout, f"$.layouts[{index}]", owners.keys() | placed, cluster)
    yield from _transition_problems(plan)


def _share_problems(plan: GearPlan) -> Problems:
    shares = {name: family.guaranteed_share for name, family in plan.families.items()}
    # where no family has a share, whoever wrote the plan decided otherwise how they get on
    if any(share < 1.0 for share in shares.values()) and sum(shares.values()) > 1.0 + _ROUNDING:
        listed = ", ".join(f"{name} {share:g}" for name, share in shares.items())
        yield "$.families", f"have more than all of the device time together: {listed}; their shares must sum to 1"


def _transition_problems(plan: GearPlan) -> Problems:
    layouts = {layout.name: layout for layout in plan.layouts}
    known: set[tuple[str, str]] = set()
    for index, each in enumerate(plan.transitions):
        at = f"$.transitions[{index}]"
        if unknown := {each.from_layout, each.to_layout} - layouts.keys():
            yield at, f"names the unknown layout {_listed(unknown)}; layouts are {_listed(layouts)}"
            continue
        if (each.from_layout, each.to_layout) in known:
            yield at, f"is the second one from layout {each.from_layout!r} to {each.to_layout!r}"
        known.add((each.from_layout, each.to_layout))
        yield from _step_problems(each, layouts, at)
        for name, family in plan.families.items():
            yield from _meanwhile_problems(each, name, family, layouts[each.from_layout], at)


def _step_problems(each: Transition, layouts: Mapping[str, Layout], at: str) -> Problems:
    before = layouts[each.from_layout].instances
    for index, (step, after) in enumerate(zip(each.steps, each.states(before), strict=True)):
        standing = before.get(step.endpoint, {}).get(step.model, 0)
        if step.present != standing:
            yield f"{at}.steps[{index}].present", f"is {step.present}, but {standing} stand by then"
        elif step.wanted == step.present:
            yield f"{at}.steps[{index}].wanted", "changes nothing; leave the step out"
        before = after
    target = layouts[each.to_layout].instances
    for endpoint in before.keys() | target.keys():
        if before.get(endpoint, {}) != target.get(endpoint, {}):
            yield f"{at}.steps", f"do not lead to layout {each.to_layout!r} on endpoint {endpoint!r}"


def _meanwhile_problems(each: Transition, name: str, family: PlannedFamily, layout: Layout, at: str) -> Problems:
    """What is wrong with the gear that serves a family meanwhile."""
    gears = {gear.name: gear for gear in family.gears_of(layout.name)}
    if each.gears.get(name) not in gears:
        yield f"{at}.gears.{name}", f"must name a gear of layout {layout.name!r}, which are {_listed(gears)}"
        return
    entry = family.entry(gears[each.gears[name]].ladder_entry)
    for instances in each.states(layout.instances):
        for stage in entry.stages:
            parts = family.models[stage.model].composed_of or (stage.model,)
            if not any(all(counts.get(part, 0) for part in parts) for counts in instances.values()):
                yield f"{at}.gears.{name}", f"uses {stage.model!r}, which stands nowhere after one of the steps"
                return


def _ladder_problems(family: PlannedFamily, at: str) -> Problems:
    if family.reference_model not in family.models:
        yield f"{at}.reference_model", f"names the unknown model {family.reference_model!r}"
    yield from _duplicates(family.ladder, f"{at}.ladder")
    for index, entry in enumerate(family.ladder):
        for position, stage in enumerate(entry.stages):
            if stage.model not in family.models:
                field = f"{at}.ladder[{index}].stages[{position}].model"
                yield field, f"names the unknown model {stage.model!r}; models are {_listed(family.models)}"


def _certificate_problems(family: PlannedFamily, at: str) -> Problems:
    if family.certificate is None:
        for index, entry in enumerate(family.ladder):
            if entry.epsilon:
                yield f"{at}.ladder[{index}].epsilon", "is stated where there is no certificate; certify it or use null"
        return
    largest = max((entry.epsilon for entry in family.ladder if entry.epsilon is not None), default=None)
    if family.certificate.epsilon != largest:
        yield f"{at}.certificate.epsilon", f"must be the largest epsilon of the ladder, which is {largest}"
    if (probes := family.certificate.probes) is not None:
        for model in probes.answers.keys() - family.models.keys():
            yield f"{at}.certificate.probes.answers.{model}", f"is no model of this family: {_listed(family.models)}"
        try:
            probes.tensors(family.inputs)
        except ValueError as error:
            yield f"{at}.certificate.probes.inputs", f"{error}; plan anew, or leave the probes out"


def _gear_problems(plan: GearPlan, family: PlannedFamily, at: str) -> Problems:
    yield from _duplicates(family.gears, f"{at}.gears")
    layouts = {layout.name: layout for layout in plan.layouts}
    entries = {entry.name: entry for entry in family.ladder}
    for index, gear in enumerate(family.gears):
        where = f"{at}.gears[{index}]"
        if gear.layout not in layouts:
            yield f"{where}.layout", f"names the unknown layout {gear.layout!r}; layouts are {_listed(layouts)}"
        elif gear.ladder_entry not in entries:
            yield f"{where}.ladder_entry", f"names the unknown entry {gear.ladder_entry!r}; it has {_listed(entries)}"
        elif gear.upper_rate_per_s <= gear.min_rate_per_s:
            yield f"{where}.max_rate_per_s", "must exceed min_rate_per_s"
        elif (gear.max_rate_per_s is None) != gear.degraded:
            yield f"{where}.max_rate_per_s", "is null for a degraded gear and only there"
        else:
            yield from _model_use_problems(family, gear, layouts[gear.layout], entries[gear.ladder_entry], where)
    for layout in layouts:
        yield from _tiling_problems(family.gears_of(layout), layout, f"{at}.gears")
    maxima = [family.max_rate_per_s(layout) for layout in layouts]
    if maxima != sorted(maxima):
        yield "$.layouts", "must be listed from the one planned for the lowest rates to the one for the highest"


def _tiling_problems(gears: list[Gear], layout: str, at: str) -> Problems:
    if gears and all(gear.degraded for gear in gears):
        yield at, f"layout {layout!r} has none but degraded gears; at least one must be planned for"
    elif not gears or gears[0].min_rate_per_s != 0.0:
        yield at, f"no gear of layout {layout!r} starts at rate 0; the gears of a layout tile its rates from 0"
    for low, high in pairwise(gears):
        if low.upper_rate_per_s != high.min_rate_per_s:
            problem = (
                f"{low.name!r} ends at {low.upper_rate_per_s:g} rows/s but {high.name!r} starts at "
                f"{high.min_rate_per_s:g}; the gears of a layout must tile its rates"
            )
            yield at, problem


def _model_use_problems(family: PlannedFamily, gear: Gear, layout: Layout, entry: LadderEntry, field: str) -> Problems:
    for model, trigger in gear.triggers.items():
        if model not in family.models:
            yield f"{field}.triggers.{model}", "is no model of this family"
        elif trigger.max_batch > family.models[model].max_batch:
            yield f"{field}.triggers.{model}.max_batch", f"exceeds the model's {family.models[model].max_batch}"
    for stage in entry.stages:
        parts = family.models[stage.model].composed_of if stage.model in family.models else ()
        hosts = {name for name in layout.instances if layout.count(name, stage.model, parts)}
        if not hosts:
            problem = f"uses {stage.model!r}, which layout {layout.name!r} places nowhere"
            whole = f"; one endpoint must have all that it is composed of: {', '.join(parts)}" if parts else ""
            yield f"{field}.ladder_entry", problem + whole
        weights = gear.load.get(stage.model)
        if weights is not None and not any(weights.get(name, 0.0) > 0.0 for name in hosts):
            yield f"{field}.load.{stage.model}", "gives no endpoint that hosts the model a weight above 0"
    yield from _load_problems(family, gear, layout, field)


def _load_problems(family: PlannedFamily, gear: Gear, layout: Layout, field: str) -> Problems:
    for model, weights in gear.load.items():
        if model not in family.models:
            yield f"{field}.load.{model}", "is no model of this family"
            continue
        for endpoint in weights:
            if not layout.count(endpoint, model, family.models[model].composed_of):
                yield f"{field}.load.{model}.{endpoint}", f"layout {layout.name!r} does not place the model there"


def _layout_problems(
    plan: GearPlan, layout: Layout, at: str, known_models: set[str], cluster: Cluster | None
) -> Problems:
    known = None if cluster is None else {endpoint.name for endpoint in cluster.endpoints}
    ensembles = plan.ensembles
    for endpoint, instances in layout.instances.items():
        if known is not None and endpoint not in known:
            yield f"{at}.instances.{endpoint}", f"is no endpoint of the cluster; endpoints are {_listed(known)}"
        for model in instances:
            if model not in known_models:
                yield f"{at}.instances.{endpoint}.{model}", f"is no model of any family of plan {plan.name!r}"
            elif model in ensembles:
                parts = ", ".join(ensembles[model])
                yield f"{at}.instances.{endpoint}.{model}", f"is an ensemble; count the models it is made of: {parts}"


def _duplicates(items: Sequence[LadderEntry | Gear | Layout | TensorSpec], at: str) -> Problems:
    names: set[str] = set()
    for index, item in enumerate(items):
        if item.name in names:
            yield f"{at}[{index}].name", f"{item.name!r} is used twice"
        names.add(item.name)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
