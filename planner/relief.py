"""What would lift a goal that cannot be met: for each number in it the least change with which there is a plan.

Nothing here is guessed: every change that is named was given to the planner, and a draft came out. Numbers are rounded
towards the easier goal before they are tried.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import msgspec

from planner.infeasible import Infeasible
from planner.least import least_count, least_value
from planner.likely import likely_epsilon
from planner.planning import LADDER_SIZE

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from cascadeserve.gear_plan import GearPlan, LadderEntry, PlannedFamily
    from planner.goal import FamilyGoal
    from planner.infeasible import Constraint
    from planner.inputs import Inputs
    from planner.time_limit import TimeLimit

# how far SLO and number of endpoints are followed, as multiples of what there is
_MOST_SLO = 32.0
_MOST_ENDPOINTS = 16
_SLO_RATIO = 1.03
_FIRST_SLO = 1.1
_DIGITS = 3
# accuracies and epsilons are named in hundredths of a point
_FINENESS = 1e4
# how often the accuracy is looked for again, among the entries of a ladder that ends there
_ACCURACY_TRIES = 3
# a rate that a draft reached may fail the checks when it is asked for; then this much less is asked
_LESS = 0.97
_RATE_TRIES = 3
# what keeps an SLO at all keeps it at this rate
_ANY_RATE_PER_S = 1.0


class Draft(Protocol):
    """Makes a plan without a certificate, or raises Infeasible; with `quick` just any that reaches the rate."""

    def __call__(self, inputs: Inputs, *, quick: bool = False) -> GearPlan:
        """Make the plan."""
        ...


def relief(
    constraint: Constraint,
    inputs: Inputs,
    draft: Draft,
    limit: TimeLimit,
    *,
    has_slo: bool,
) -> str:
    """Say in a sentence what alone would make a plan of `inputs` that `constraint` keeps from being one.

    `draft` is that of `planner.objectives.Planner`. `has_slo`: the goal's SLO is a person's.
    """
    search = _Search(inputs, draft, limit)
    tries: list[Callable[[], str | None]] = []
    if constraint == "rate":
        tries.append(search.rate)
    if inputs.policy != "reference":
        tries.append(search.accuracy)
    if constraint in {"latency", "rate"} and has_slo:
        tries.append(search.slo)
    if constraint == "rate":
        tries.append(search.endpoints)
    found: list[str] = []
    for attempt in tries:
        if limit.reached:
            limit.leave_out("some of what would lift the goal")
            break
        if (change := attempt()) is not None:
            found.append(change)
    if not found:
        return "No change of one number that was tried makes a plan of it."
    return f"{'Any of these' if len(found) > 1 else 'This'} would do: {'; '.join(found)}."


class _Search:
    """Looks for the least change of one number after the other."""

    def __init__(self, inputs: Inputs, draft: Draft, limit: TimeLimit) -> None:
        self._inputs = inputs
        self._draft = draft
        self._limit = limit

    def rate(self) -> str | None:
        """Find the highest rate that there is a plan for."""
        family = self._with_goal({"max_rate_per_s": None}, quick=False)
        if family is None:
            return None
        highest = max(gear.upper_rate_per_s for gear in family.gears if not gear.degraded)
        for _ in range(_RATE_TRIES):
            rate_per_s = _rounded(highest, math.floor)
            if self._with_goal({"max_rate_per_s": rate_per_s}) is not None:
                return f"max_rate_per_s = {rate_per_s:g}"
            highest *= _LESS
        return None

    def slo(self) -> str | None:
        """Find the shortest SLO that there is a plan for."""
        goal = self._inputs.goal
        field = "slo_s" if goal.slo_s is not None else "slo_per_reference_batch"
        now = goal.slo_s or goal.slo_per_reference_batch or 0.0

        def longer(factor: float) -> float:
            return _rounded(now * factor, math.ceil)

        least = least_value(
            lambda factor: self._with_goal({field: longer(factor)}) is not None,
            _FIRST_SLO, known=1.0, most=_MOST_SLO, ratio=_SLO_RATIO, limit=self._limit,
        )  # fmt: skip
        return None if least is None else f"{field} = {longer(least):g}"

    def accuracy(self) -> str | None:
        """Find the highest accuracy that there is a plan for, and what a certificate would have to allow then."""
        found: tuple[str, dict[str, float | None]] | None = None
        # first without any accuracy, then with that of the entry that served, until nothing better does
        changes: dict[str, float | None] = {"min_accuracy": None, "below_reference": 1.0, "max_epsilon": 1.0}
        words = ""
        # one entry for all rates: the most accurate one that reaches the rate, or any rate at all
        rate_per_s = self._inputs.goal.max_rate_per_s or _ANY_RATE_PER_S
        for _ in range(_ACCURACY_TRIES):
            if (found is not None and found[1] == changes) or self._limit.reached:
                break
            family = self._with_goal({"max_rate_per_s": rate_per_s} | changes, quick=False)
            if family is None:
                break
            if words:
                found = words, changes
            changes, words = self._accuracy_of(family)
        return None if found is None else found[0]

    def endpoints(self) -> str | None:
        """Find how many more endpoints like the first there would have to be."""
        cluster = self._inputs.cluster
        now, like = len(cluster.endpoints), cluster.endpoints[0]

        def can(count: int) -> bool:
            more = tuple(msgspec.structs.replace(like, name=f"{like.name}-{number}") for number in range(now, count))
            larger = msgspec.structs.replace(cluster, endpoints=(*cluster.endpoints, *more))
            return self._family(replace(self._inputs, cluster=larger), quick=True) is not None

        count = least_count(can, known=now, most=_MOST_ENDPOINTS * now, limit=self._limit)
        if count is None:
            return None
        return f"{count - now} more endpoint{'s' if count - now > 1 else ''} like {like.name!r}"

    def _accuracy_of(self, family: PlannedFamily) -> tuple[dict[str, float | None], str]:
        """Changes of the goal that allow the entry that serves, and the same in words."""
        goal = self._inputs.goal
        entries = {entry.name: entry for entry in family.ladder}
        used = entries[next(gear for gear in family.gears if not gear.degraded).ladder_entry]
        reference = next(e for e in family.ladder if {stage.model for stage in e.stages} == {family.reference_model})
        # no goal may ask for more than the reference model has
        best = reference.accuracy or 0.0
        accuracy = min(used.accuracy or 0.0, best)
        epsilon = _finely(self._likely(used, family.reference_model), math.ceil)
        if goal.min_accuracy is not None:
            field, asked = "min_accuracy", _finely(accuracy, math.floor)
        else:
            field, asked = "below_reference", _finely(best - accuracy, math.ceil)
        changes: dict[str, float | None] = {field: asked}
        words = f"{field} = {asked:g}"
        if epsilon > goal.max_epsilon:
            changes["max_epsilon"] = epsilon
            words += f" with max_epsilon = {epsilon:g}"
        return changes, words

    def _likely(self, entry: LadderEntry, reference: str) -> float:
        inputs = self._inputs
        return max(likely_epsilon(entry, reference, inputs.search, inputs.goal.delta / LADDER_SIZE), 0.0)

    def _with_goal(self, changes: Mapping[str, float | None], *, quick: bool = True) -> PlannedFamily | None:
        goal: FamilyGoal = msgspec.structs.replace(self._inputs.goal, **changes)
        return self._family(replace(self._inputs, goal=goal), quick=quick)

    def _family(self, inputs: Inputs, *, quick: bool) -> PlannedFamily | None:
        try:
            return self._draft(inputs, quick=quick).families[inputs.family]
        except Infeasible:
            return None


def _rounded(value: float, towards: Callable[[float], int]) -> float:
    """Round to some digits that count, by floor or ceil."""
    place = 10.0 ** (math.floor(math.log10(value)) - _DIGITS + 1)
    # what floats add to a whole number is no reason to go to the next
    return float(f"{towards(round(value / place, 6)) * place:.{_DIGITS}g}")


def _finely(share: float, towards: Callable[[float], int]) -> float:
    return towards(round(share * _FINENESS, 6)) / _FINENESS
