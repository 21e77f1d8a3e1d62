"""Putting a gear plan together from what was decided: layouts, gears, entries, certificate, transitions."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import msgspec

from cascadeserve import __version__
from cascadeserve.gear_plan import GearPlan, Layout, PlannedFamily, Transition, TransitionStep
from cascadeserve.plan_evidence import MadeFrom, PlanCertificate
from planner.expected import expect
from planner.transitions import NoTransition, transition

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cascadeserve.gear_plan import Gear, LadderEntry, PlannedModel
    from cascadeserve.plan_evidence import Expected
    from planner.certificate import Certificate
    from planner.inputs import Inputs
    from planner.layouts import Sites


def assemble(
    inputs: Inputs,
    *,
    slo_s: float,
    reference: str,
    layouts: Sequence[Layout],
    gears: Sequence[Gear],
    entries: Sequence[LadderEntry],
    models: Mapping[str, PlannedModel],
    certificate: Certificate | None = None,
    transitions: Sequence[Transition] = (),
) -> GearPlan:
    """Put the plan together; of the layouts only what the models need."""
    standing = {part for name, model in models.items() for part in model.composed_of or (name,)}
    expected = None if inputs.prior is None else expect(gears, entries, inputs.prior)
    family = PlannedFamily(
        inputs=inputs.tensors,
        num_classes=inputs.num_classes,
        models=dict(models),
        reference_model=reference,
        slo_s=slo_s,
        max_rows_per_request=inputs.goal.max_rows_per_request,
        ladder=tuple(entries),
        gears=tuple(gears),
        dispersion=inputs.goal.dispersion,
        percentile=inputs.goal.percentile,
        certificate=None if certificate is None else _certificate(certificate, models, entries, gears, expected),
        expected=expected,
        share=msgspec.UNSET if inputs.share == 1.0 else inputs.share,
    )
    digests = dict(inputs.digests) | ({"calibration": certificate.records_digest} if certificate else {})
    return GearPlan(
        schema_version=1,
        name=inputs.name or inputs.family,
        families={inputs.family: family},
        layouts=tuple(needed_of(layout, standing) for layout in layouts),
        transitions=tuple(transitions),
        made_from=MadeFrom(
            planner_version=__version__,
            policy=inputs.policy,
            seed=inputs.seed,
            digests=dict(sorted(digests.items())),
        ),
    )


def needed_of(layout: Layout, parts: set[str]) -> Layout:
    """Layout without what is not among some parts."""
    return msgspec.structs.replace(
        layout,
        instances={
            endpoint: {part: count for part, count in counts.items() if part in parts}
            for endpoint, counts in layout.instances.items()
        },
    )


def make_transitions(
    layouts: Sequence[Layout], gears: Sequence[Gear], entries: Sequence[LadderEntry], sites: Sites, family: str
) -> list[Transition] | None:
    """How neighbours become each other, there and back; None: some two cannot.

    The gear meanwhile is the one of the layout left that carries most at the moment at which it carries least.
    """
    found: list[Transition] = []
    by_name = {entry.name: entry for entry in entries}
    for low, high in pairwise(layouts):
        for former, target in ((low, high), (high, low)):
            way = _way(former, target, gears, by_name, sites, family)
            if way is None:
                return None
            found.append(way)
    return found


def _way(
    former: Layout,
    target: Layout,
    gears: Sequence[Gear],
    entries: Mapping[str, LadderEntry],
    sites: Sites,
    family: str,
) -> Transition | None:
    """Transition that leaves most capacity, up to the highest rate of the lower layout."""
    best: tuple[float, Transition] | None = None
    tops = [
        max((gear.upper_rate_per_s for gear in gears if gear.layout == layout.name and not gear.degraded), default=0.0)
        for layout in (former, target)
    ]
    tried: set[str] = set()
    for gear in (gear for gear in gears if gear.layout == former.name):
        entry = entries[gear.ladder_entry]
        if entry.name in tried or not (sites.runs(entry, former.instances) and sites.runs(entry, target.instances)):
            continue
        tried.add(entry.name)
        way = transition(
            former.instances, target.instances, sites.rooms, sites.loads(entry), others=sites.parts,
            rate_per_s=min(tops),
        )  # fmt: skip
        if isinstance(way, NoTransition):
            continue
        # what it carries beyond the rate that is there is worth nothing, and the earlier gear is the more accurate one
        carried = min(way.least_capacity_per_s, *tops)
        if best is None or carried > best[0]:
            steps = tuple(
                TransitionStep(endpoint=step.endpoint, model=step.part, present=step.present, wanted=step.wanted)
                for step in way.steps
            )
            best = carried, Transition(
                from_layout=former.name, to_layout=target.name, gears={family: gear.name}, steps=steps,
                duration_s=way.duration_s, least_rate_per_s={family: way.least_capacity_per_s},
            )  # fmt: skip
    return None if best is None else best[1]


def _certificate(
    certificate: Certificate,
    models: Mapping[str, PlannedModel],
    entries: Sequence[LadderEntry],
    gears: Sequence[Gear],
    expected: Expected | None,
) -> PlanCertificate:
    epsilons = {entry.name: entry.epsilon for entry in entries if entry.epsilon is not None}
    weighted = None
    if expected is not None:
        parts = [(expected.gears[gear.name], epsilons.get(gear.ladder_entry)) for gear in gears]
        if all(epsilon is not None for share, epsilon in parts if share > 0.0):
            weighted = sum(share * (epsilon or 0.0) for share, epsilon in parts)
    probes = certificate.probes
    if probes is not None:
        answers = {name: answers for name, answers in probes.answers.items() if name in models}
        probes = msgspec.structs.replace(probes, answers=answers)
    return PlanCertificate(
        epsilon=max(epsilons.values()),
        weighted_epsilon=weighted,
        delta=certificate.delta,
        rows=certificate.rows,
        method=f"{certificate.method}, {certificate.correction}",
        ladder_digest=certificate.ladder_digest,
        records_digest=certificate.records_digest,
        reference_accuracy=certificate.reference_accuracy,
        assumptions=certificate.assumptions,
        probes=probes,
    )
