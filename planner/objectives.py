"""Plans with something to minimise: the latency at an accuracy, or the cost of what reaches a rate within an SLO.

Both are settled first, by drafts of the planner itself, and planned then like any goal with an SLO.

**Latency.** The smallest SLO is looked for with which a plan reaches the rate (the goal's `max_rate_per_s`, or the
highest of its prior), since a plan that keeps an SLO also keeps a longer one. The plan gets `SLO_MARGIN` times that, so
that it does not stand at the edge of what can be kept, and at every rate the gear that answers soonest.

**Cost.** The endpoints are taken from cheap to dear, and the fewest of them that reach the rate are looked for. What is
left over has no place in the plan.

One entry for all rates is enough to see whether a rate can be reached. So the drafts are of the policy with one entry.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import msgspec

from cascadeserve.errors import UsageError
from planner.goal import rate_to_reach_per_s
from planner.infeasible import Infeasible
from planner.least import least_count, least_value
from planner.planning import no_progress, plan_family
from planner.policies import WITH_ONE_ENTRY
from planner.relief import relief
from planner.time_limit import TimeLimit

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from cascadeserve.cluster import Endpoint
    from cascadeserve.gear_plan import GearPlan
    from planner.checkpoint import Checkpoint
    from planner.goal import FamilyGoal
    from planner.inputs import Inputs
    from planner.predict import MakePredictor

SLO_MARGIN = 1.1
# SLOs in busy times of the reference model for one row: where the search starts, and where it gives up
_START_BATCHES = 10.0
_MOST_BATCHES = 320.0
_SLO_RATIO = 1.03


@dataclass(frozen=True)
class Settled:
    """Inputs of an ordinary plan, and what was found on the way to them, as sentences."""

    inputs: Inputs
    findings: tuple[str, ...] = ()


class Planner:
    """Makes plans for goals of all kinds, and says of those that cannot be met what would have to change."""

    def __init__(
        self,
        *,
        limit: TimeLimit | None = None,
        checkpoint: Checkpoint | None = None,
        on_progress: Callable[[int, int], None] = no_progress,
        cost_of: Callable[[Sequence[Endpoint]], float] = len,
        predict: MakePredictor | None = None,
    ) -> None:
        """All but `cost_of` are for `plan_family`; the cost of endpoints is their number, unless it says something else."""
        self._limit = limit or TimeLimit(None)
        self._checkpoint = checkpoint
        self._on_progress = on_progress
        self._cost_of = cost_of
        self._predict = predict

    def plan(self, inputs: Inputs, calibration: Path | None, *, spend: bool = False) -> tuple[GearPlan, Settled]:
        """Make the plan; `calibration` and `spend` are for `plan_family`.

        Raises:
            UsageError: as in `plan_family`.
            Infeasible: nothing keeps the goal; it says what binds, and the least changes that would do.

        """
        settled = self.settle(inputs)
        try:
            made = plan_family(
                settled.inputs, calibration, spend=spend, predict=self._predict, on_progress=self._on_progress,
                limit=self._limit, checkpoint=self._checkpoint,
            )  # fmt: skip
        except Infeasible as error:
            if calibration is not None and self._can(settled.inputs):
                found = (
                    "Without the certificate there is a plan: too few entries are certified to lose at most "
                    f"{inputs.goal.max_epsilon:g}, so give more calibration rows or allow more."
                )
            else:
                has_slo = inputs.goal.least != "latency"
                found = relief(error.constraint, settled.inputs, self.draft, self._limit, has_slo=has_slo)
            raise Infeasible(f"{error}. {found}", error.constraint) from error
        return made, settled

    def settle(self, inputs: Inputs) -> Settled:
        """Find the SLO, or the endpoints, that the goal wants the least of.

        Where there is none the inputs are those with the longest SLO, or with all endpoints: their plan says what is in
        the way.

        Raises:
            UsageError: the goal names no rate, or the time limit ended before any SLO was found.

        """
        if inputs.goal.least == "latency":
            return self._least_latency(inputs)
        if inputs.goal.least == "cost":
            return self._least_cost(inputs)
        return Settled(inputs)

    def draft(self, inputs: Inputs, *, quick: bool = False) -> GearPlan:
        """Make a plan with one entry for all rates and without a certificate, to see what can be reached.

        With `quick` the first entry that reaches the rate of the goal is taken, not the most accurate one.

        Raises:
            Infeasible: nothing can.

        """
        wanted = replace(inputs, policy=WITH_ONE_ENTRY[inputs.policy], quickest=False)
        limit = TimeLimit(0.0) if quick else self._limit
        return plan_family(
            wanted, None, predict=self._predict, on_progress=self._on_progress, limit=limit,
            checkpoint=self._checkpoint,
        )  # fmt: skip

    def _can(self, inputs: Inputs) -> bool:
        try:
            self.draft(inputs, quick=True)
        except Infeasible:
            return False
        return True

    def _least_latency(self, inputs: Inputs) -> Settled:
        rate_per_s = rate_to_reach_per_s(inputs.goal, inputs.prior)
        goal = msgspec.structs.replace(inputs.goal, max_rate_per_s=rate_per_s, minimise=None)

        def can(batches: float) -> bool:
            return self._can(replace(inputs, goal=_with_slo(goal, batches)))

        least = least_value(can, _START_BATCHES, most=_MOST_BATCHES, ratio=_SLO_RATIO, limit=self._limit)
        if least is None and self._limit.reached:
            raise UsageError("the time limit ended before an SLO was found that can be kept; give it more time")
        if self._limit.reached:
            self._limit.leave_out("smaller SLOs")
        if least is None:
            return Settled(replace(inputs, goal=_with_slo(goal, _MOST_BATCHES), quickest=True))
        finding = (
            f"The least SLO that {100.0 * goal.percentile:g} % of the requests can keep up to {rate_per_s:g} "
            f"rows/s is {least:.3g} times what the reference model needs for one row; the plan's is {SLO_MARGIN:g} "
            "times that."
        )
        return Settled(replace(inputs, goal=_with_slo(goal, SLO_MARGIN * least), quickest=True), (finding,))

    def _least_cost(self, inputs: Inputs) -> Settled:
        rate_per_s = rate_to_reach_per_s(inputs.goal, inputs.prior)
        goal = msgspec.structs.replace(inputs.goal, max_rate_per_s=rate_per_s)
        endpoints = sorted(inputs.cluster.endpoints, key=lambda endpoint: self._cost_of([endpoint]))

        def first(count: int) -> Inputs:
            named = {endpoint.name for endpoint in endpoints[:count]}
            # in the order of the cluster file, which breaks ties between endpoints
            kept = tuple(endpoint for endpoint in inputs.cluster.endpoints if endpoint.name in named)
            return replace(inputs, goal=goal, cluster=msgspec.structs.replace(inputs.cluster, endpoints=kept))

        count = least_count(lambda count: self._can(first(count)), known=0, most=len(endpoints), limit=self._limit)
        if count is None:
            count = len(endpoints)
        if self._limit.reached:
            self._limit.leave_out("fewer endpoints")
        kept = first(count).cluster.endpoints
        finding = (
            f"{count} of {len(endpoints)} endpoints reach {rate_per_s:g} rows/s, at a cost of "
            f"{self._cost_of(kept):g}: {', '.join(endpoint.name for endpoint in kept)}."
        )
        return Settled(first(count), (finding,))


def _with_slo(goal: FamilyGoal, batches: float) -> FamilyGoal:
    return msgspec.structs.replace(goal, slo_s=None, slo_per_reference_batch=batches, minimise=None)
