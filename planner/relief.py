"""What would lift a goal that cannot be met: for each number in it the least change with which there is a plan.

Nothing here is guessed: every change that is named was given to the planner, and a draft came out. Numbers are rounded
towards the easier goal before they are tried. It takes some time, of which each number has its part; what was not
looked for by then is said.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import msgspec

from planner.infeasible import Infeasible
from planner.least import least_count, least_value
from planner.likely import likely_epsilon
from planner.more_memory import memory_sizes, with_memory
from planner.planning import LADDER_SIZE
from planner.profile import FrontCost
from planner.row_work import one_row_s
from planner.search import reference_model

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from cascadeserve.cluster import Cluster
    from cascadeserve.gear_plan import GearPlan, LadderEntry, PlannedFamily
    from planner.goal import FamilyGoal
    from planner.infeasible import Constraint
    from planner.inputs import Inputs
    from planner.time_limit import TimeLimit

    # looks for a change and says it in words; None: there is none
    Attempt = Callable[[TimeLimit], str | None]

# no error is waited for longer than about that
_MOST_S = 20.0
# how far SLO and number of endpoints are followed, as multiples of what there is
_MOST_SLO = 32.0
_MOST_ENDPOINTS = 16
_SLO_RATIO = 1.03
_FIRST_SLO = 1.1
# what is tried where an SLO is far too short, as if it were given in other units: a multiple of the time of a row
_USUAL_SLO_ROWS = 4.0
_DIGITS = 3
# accuracies and epsilons are named in hundredths of a point
_FINENESS = 1e4
# how often the accuracy is looked for again, among the entries of a ladder that ends there
_ACCURACY_TRIES = 3
_ITSELF = (
    "What binds is the orchestrator itself, by what its own work takes (`front` in the profile): more endpoints do not "
    "help."
)
# a rate that a draft reached may fail the checks when it is asked for; then this much less is asked
_LESS = 0.97
_RATE_TRIES = 3
# what keeps an SLO at all keeps it at this rate
_ANY_RATE_PER_S = 1.0


class Draft(Protocol):
    """Makes a plan without a certificate, or raises Infeasible; with `quick` just any that reaches the rate.

    Past the `limit` it is the best that was found by then.
    """

    def __call__(self, inputs: Inputs, *, quick: bool = False, limit: TimeLimit | None = None) -> GearPlan:
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
    within = limit.part(_MOST_S)
    search = _Search(constraint, inputs, draft)
    itself = search.orchestrator_binds(within)
    sentences = [_ITSELF] if itself else []
    tries = search.tries(has_slo=has_slo, endpoints_may_help=not itself)
    found: list[str] = []
    hurried: list[str] = []
    missed: list[str] = []
    for number, (what, attempt) in enumerate(tries.items()):
        part = within.part(within.left_s / (len(tries) - number))
        change = None if part.reached else attempt(part)
        if change is not None:
            found.append(change)
        if part.reached:
            (missed if change is None else hurried).append(what)
    if found:
        sentences.append(f"{'Any of these' if len(found) > 1 else 'This'} would do: {'; '.join(found)}.")
    elif not missed or len(missed) < len(tries):
        sentences.append("No change of one number that was tried makes a plan of it.")
    if hurried or missed:
        sentences.append(_in_a_hurry(hurried, missed))
        if limit.reached:
            limit.leave_out("some of what would lift the goal")
    return " ".join(sentences)


def _in_a_hurry(hurried: Sequence[str], missed: Sequence[str]) -> str:
    """Say what was not looked for as long as it would have taken."""
    parts = []
    if hurried:
        parts.append(f"a smaller change of the {' and the '.join(hurried)} may do, too")
    if missed:
        parts.append(f"what the {' and the '.join(missed)} would have to be was not found")
    return f"The time for such tries was up: {', and '.join(parts)}."


class _Search:
    """Looks for the least change of one number after the other."""

    def __init__(self, constraint: Constraint, inputs: Inputs, draft: Draft) -> None:
        self._constraint = constraint
        self._inputs = inputs
        self._draft = draft
        goal, profiles = inputs.goal, inputs.profiles
        front = next((each.front for each in profiles.values() if each.front is not None), FrontCost())
        # what a row of the reference model takes, and one of the fastest model
        self._row_s = one_row_s(reference_model(inputs.search), profiles)
        self._fastest_s = min(one_row_s(model, profiles) for model in inputs.search.models)
        # no answer is quicker than that
        self._lone_s = self._fastest_s + front.request_s + front.batch_s + front.row_s + front.path_s
        self._slo_s = goal.slo_s or (goal.slo_per_reference_batch or 0.0) * self._row_s
        # share of its time that the orchestrator's own work takes at the rate of the goal, at the very least
        batch_s = front.batch_s / max(inputs.largest_batch.values())
        row_s = (front.request_s + front.answer_s) / goal.mean_rows + front.row_s + batch_s
        self._orchestrator_busy = (goal.max_rate_per_s or 0.0) * row_s

    def orchestrator_binds(self, limit: TimeLimit) -> bool:
        """Whether the orchestrator cannot do the work itself, or there would be a plan if it took no time."""
        if self._constraint not in {"latency", "rate"} or self._slo_s < self._fastest_s:
            return False
        if self._orchestrator_busy >= 1.0:
            return True
        profiles = self._inputs.profiles
        if all(profile.front is None for profile in profiles.values()):
            return False
        free = {kind: msgspec.structs.replace(profile, front=None) for kind, profile in profiles.items()}
        return self._family(replace(self._inputs, profiles=free), limit) is not None

    def tries(self, *, has_slo: bool, endpoints_may_help: bool) -> dict[str, Attempt]:
        """What to look for, by the number that is changed; nothing of which it is clear that it does not help."""
        constraint, inputs = self._constraint, self._inputs
        found: dict[str, Attempt] = {}
        if constraint == "rate":
            found["rate"] = self.rate
        if self._orchestrator_busy >= 1.0:
            return found
        if constraint in {"latency", "rate"} and has_slo:
            found["SLO"] = self.slo
        if self._slo_s < self._lone_s:
            return found
        if inputs.policy != "reference":
            found["accuracy"] = self.accuracy
        limited = any(endpoint.memory_bytes is not None for endpoint in inputs.cluster.endpoints)
        if constraint != "accuracy" and limited and endpoints_may_help:
            found["memory"] = self.memory
        if constraint == "rate" and endpoints_may_help:
            found["number of endpoints"] = self.endpoints
        return found

    def rate(self, limit: TimeLimit) -> str | None:
        """Find the highest rate that there is a plan for."""
        family = self._with_goal({"max_rate_per_s": None}, limit, quick=False)
        if family is None:
            return None
        highest = max(gear.upper_rate_per_s for gear in family.gears if not gear.degraded)
        for _ in range(_RATE_TRIES):
            rate_per_s = _rounded(highest, math.floor)
            if self._with_goal({"max_rate_per_s": rate_per_s}, limit) is not None:
                return f"max_rate_per_s = {rate_per_s:g}"
            highest *= _LESS
        return None

    def slo(self, limit: TimeLimit) -> str | None:
        """Find the shortest SLO that there is a plan for."""
        field, unit_s = "slo_s", 1.0
        if self._inputs.goal.slo_s is None:
            field, unit_s = "slo_per_reference_batch", self._row_s

        def asked(slo_s: float) -> float:
            return _rounded(slo_s / unit_s, math.ceil)

        known_s = max(self._slo_s, self._lone_s)
        least_s = least_value(
            lambda slo_s: self._with_goal({field: asked(slo_s)}, limit) is not None,
            max(_FIRST_SLO * known_s, _USUAL_SLO_ROWS * self._row_s), known=known_s,
            most=_MOST_SLO * max(known_s, self._row_s), ratio=_SLO_RATIO, limit=limit,
        )  # fmt: skip
        return None if least_s is None else f"{field} = {asked(least_s):g}"

    def accuracy(self, limit: TimeLimit) -> str | None:
        """Find the highest accuracy that there is a plan for, and what a certificate would have to allow then.

        It is that of one entry for all rates: the most accurate one that reaches the rate of the goal. Where the goal
        asks for none, that is the highest one that it says occurs, or else any rate at all, or as high a one as can be.
        """
        asked = self._inputs.goal.max_rate_per_s
        highest = [max(rate for rate, _ in self._inputs.prior)] if self._inputs.prior else []
        for rate_per_s in [asked] if asked else [*highest, _ANY_RATE_PER_S, None]:
            found = self._accuracy_at(rate_per_s, limit)
            # that of a low rate may not do where the planner goes as high as it can
            if found is not None and (asked or self._with_goal(found[1], limit) is not None):
                return found[0]
        return None

    def _accuracy_at(self, rate_per_s: float | None, limit: TimeLimit) -> tuple[str, Mapping[str, float | None]] | None:
        """Highest accuracy at a rate, None: as high a one as can be, in words and as changes of the goal."""
        found: tuple[str, dict[str, float | None]] | None = None
        # first without any accuracy, then with that of the entry that served, until nothing better does
        changes: dict[str, float | None] = {"min_accuracy": None, "below_reference": 1.0, "max_epsilon": 1.0}
        words = ""
        for _ in range(_ACCURACY_TRIES):
            if (found is not None and found[1] == changes) or limit.reached:
                break
            family = self._with_goal({"max_rate_per_s": rate_per_s} | changes, limit, quick=False)
            if family is None:
                break
            if words:
                found = words, changes
            changes, words = self._accuracy_of(family)
        return found

    def memory(self, limit: TimeLimit) -> str | None:
        """Find how little memory the largest endpoint would have to have, or if that does not do every one."""
        cluster = self._inputs.cluster
        limited = [endpoint for endpoint in cluster.endpoints if endpoint.memory_bytes is not None]
        largest = max(limited, key=lambda endpoint: endpoint.memory_bytes or 0)
        for chosen in [[largest], limited][: len(limited)]:
            names = {endpoint.name for endpoint in chosen}
            sizes = memory_sizes(self._inputs, chosen)

            def can(count: int, names: set[str] = names, sizes: Sequence[int] = sizes) -> bool:
                more = with_memory(cluster.endpoints, names, sizes[count - 1])
                larger = msgspec.structs.replace(cluster, endpoints=more)
                return self._family(replace(self._inputs, cluster=larger), limit) is not None

            if not sizes or not can(len(sizes)):
                continue
            size = sizes[(least_count(can, known=0, most=len(sizes), limit=limit) or len(sizes)) - 1]
            where = f"endpoint {largest.name!r}" if len(chosen) == 1 else "every endpoint that has less"
            return f"memory_bytes = {size:_} for {where}"
        return None

    def endpoints(self, limit: TimeLimit) -> str | None:
        """Find how many more endpoints like the first there would have to be."""
        cluster = self._inputs.cluster
        now, like = len(cluster.endpoints), cluster.endpoints[0]

        def can(count: int) -> bool:
            return self._family(replace(self._inputs, cluster=_with_more(cluster, count)), limit) is not None

        count = least_count(can, known=now, most=_MOST_ENDPOINTS * now, limit=limit)
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

    def _with_goal(
        self, changes: Mapping[str, float | None], limit: TimeLimit, *, quick: bool = True
    ) -> PlannedFamily | None:
        goal: FamilyGoal = msgspec.structs.replace(self._inputs.goal, **changes)
        return self._family(replace(self._inputs, goal=goal), limit, quick=quick)

    def _family(self, inputs: Inputs, limit: TimeLimit, *, quick: bool = True) -> PlannedFamily | None:
        try:
            return self._draft(inputs, quick=quick, limit=limit).families[inputs.family]
        except Infeasible:
            return None


def _with_more(cluster: Cluster, count: int) -> Cluster:
    """Cluster of so many endpoints, the further ones like the first."""
    now, like = len(cluster.endpoints), cluster.endpoints[0]
    more = tuple(msgspec.structs.replace(like, name=f"{like.name}-{number}") for number in range(now, count))
    return msgspec.structs.replace(cluster, endpoints=(*cluster.endpoints, *more))


def _rounded(value: float, towards: Callable[[float], int]) -> float:
    """Round to some digits that count, by floor or ceil."""
    place = 10.0 ** (math.floor(math.log10(value)) - _DIGITS + 1)
    # what floats add to a whole number is no reason to go to the next
    return float(f"{towards(round(value / place, 6)) * place:.{_DIGITS}g}")


def _finely(share: float, towards: Callable[[float], int]) -> float:
    return towards(round(share * _FINENESS, 6)) / _FINENESS
