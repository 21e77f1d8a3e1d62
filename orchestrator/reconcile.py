"""Which steps lead from the instances that stand to those that a layout wants. Pure.

Instances are of one version of a model. All versions of it that an endpoint serves have the same number there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from orchestrator.backend import ModelVersion

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cascadeserve.gear_plan import GearPlan, Layout, Transition

# by endpoint and model
Instances = dict[str, dict[ModelVersion, int]]


@dataclass(frozen=True, slots=True)
class Step:
    """Bring `model` at `endpoint` from `present` to `wanted` instances; 0 means not loaded."""

    endpoint: str
    model: ModelVersion
    present: int
    wanted: int

    @property
    def grows(self) -> bool:
        """Whether it adds capacity: such steps are awaited before the layout's gears are used."""
        return self.wanted > self.present


def steps(
    observed: Mapping[str, Mapping[ModelVersion, int]], desired: Mapping[str, Mapping[ModelVersion, int]]
) -> tuple[list[Step], list[Step]]:
    """(growing, shrinking) steps over the endpoints in `observed`, which leaves out those that are down."""
    growing: list[Step] = []
    shrinking: list[Step] = []
    for endpoint, present in observed.items():
        wanted = desired.get(endpoint, {})
        for model in sorted(present.keys() | wanted.keys()):
            step = Step(endpoint, model, present.get(model, 0), wanted.get(model, 0))
            if step.grows:
                growing.append(step)
            elif step.wanted < step.present:
                shrinking.append(step)
    return growing, shrinking


def instances_of(plan: GearPlan, layout: Layout) -> Instances:
    """What a layout of a plan wants."""
    versions = plan.versions
    return {
        endpoint: {ModelVersion(model, versions[model]): count for model, count in instances.items()}
        for endpoint, instances in plan.standing(layout).items()
    }


def parts_of_models(plan: GearPlan) -> dict[str, tuple[str, ...]]:
    """Models of a plan, and those that each is made of."""
    return dict.fromkeys(plan.versions, ()) | plan.ensembles


def standing_layout(plan: GearPlan, observed: Mapping[str, Mapping[ModelVersion, int]]) -> Layout:
    """The layout that stands, or for which the fewest instances have to come or go; the first of several."""
    return min(plan.layouts, key=lambda layout: _distance(observed, instances_of(plan, layout)))


def touched(first: Instances, second: Instances) -> set[str]:
    """Endpoints on which two layouts want something different."""
    return {each for each in first.keys() | second.keys() if first.get(each, {}) != second.get(each, {})}


def _distance(
    observed: Mapping[str, Mapping[ModelVersion, int]], desired: Mapping[str, Mapping[ModelVersion, int]]
) -> int:
    growing, shrinking = steps(observed, desired)
    return sum(abs(step.wanted - step.present) for step in (*growing, *shrinking))


class LayoutChange:
    """A transition of the plan on its way, one step after the other."""

    def __init__(self, plan: GearPlan, transition: Transition, *, done: int = 0) -> None:
        """`done` of its steps have been done."""
        former = plan.layout(transition.from_layout)
        states = transition.states(former.instances)
        self.transition = transition
        self._to_come = [
            instances_of(plan, msgspec.structs.replace(former, instances=state))
            for state in (former.instances, *states)[done:]
        ]

    @classmethod
    def under_way(cls, plan: GearPlan, observed: Mapping[str, Mapping[ModelVersion, int]]) -> LayoutChange | None:
        """The transition in the middle of which `observed` is; of several the one with the fewest steps to come.

        None where a layout stands.
        """
        if any(steps(observed, instances_of(plan, layout)) == ([], []) for layout in plan.layouts):
            return None
        found: list[tuple[int, Transition, int]] = []
        for transition in plan.transitions:
            former = plan.layout(transition.from_layout)
            for done, state in enumerate(transition.states(former.instances)[:-1], 1):
                wanted = instances_of(plan, msgspec.structs.replace(former, instances=state))
                if steps(observed, wanted) == ([], []):
                    found.append((len(transition.steps) - done, transition, done))
        if not found:
            return None
        _, transition, done = min(found, key=lambda each: each[0])
        return cls(plan, transition, done=done)

    @property
    def between(self) -> tuple[str, str]:
        """Names of the layouts that it leads from and to."""
        return self.transition.from_layout, self.transition.to_layout

    @property
    def endpoints(self) -> set[str]:
        """Those that it changes something on."""
        return {step.endpoint for step in self.transition.steps}

    def wanted(self, observed: Mapping[str, Mapping[ModelVersion, int]]) -> Instances | None:
        """What is to stand next, once that before it does; None: the layout stands."""
        while self._to_come and steps(observed, self._to_come[0]) == ([], []):
            self._to_come.pop(0)
        return self._to_come[0] if self._to_come else None


def side_by_side(first: Instances, second: Instances) -> Instances:
    """What lets both be served: of every model the larger count, for each of the versions."""
    both: Instances = {}
    for endpoint in first.keys() | second.keys():
        wanted = [*first.get(endpoint, {}).items(), *second.get(endpoint, {}).items()]
        counts: dict[str, int] = {}
        for model, count in wanted:
            counts[model.name] = max(count, counts.get(model.name, 0))
        both[endpoint] = {model: counts[model.name] for model, _ in wanted}
    return both
