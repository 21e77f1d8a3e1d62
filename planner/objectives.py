"""Plans with something to minimise: the latency at an accuracy, or the cost of what reaches a rate within an SLO.

Both are settled first, by drafts of the planner itself, and planned then like any goal with an SLO.

**Latency.** The smallest SLO is looked for with which a plan reaches the rate (the goal's `max_rate_per_s`, or the
highest of its prior), since a plan that keeps an SLO also keeps a longer one. The plan gets `SLO_MARGIN` times that, so
that it does not stand at the edge of what can be kept, and at every rate the gear that answers soonest.

**Cost.** The endpoints that cost least among those that reach the rate are looked for (planner.least_cost). The others
have no place in the plan.

One entry for all rates is enough to see whether a rate can be reached. So the drafts are of the policy with one entry.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import msgspec

from cascadeserve.errors import UsageError
from planner.fits import check_fit
from planner.goal import rate_to_reach_per_s
from planner.infeasible import Infeasible
from planner.least import least_value
from planner.least_cost import cost_of, least_cost
from planner.planning import no_progress, plan_family
from planner.policies import WITH_ONE_ENTRY
from planner.relief import relief
from planner.search import reference_model
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
        predict: MakePredictor | None = None,
    ) -> None:
        """All are for `plan_family`."""
        self._limit = limit or TimeLimit(None)
        self._checkpoint = checkpoint
        self._on_progress = on_progress
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
            raise Infeasible(" ".join([f"{error}.", found, *tightened(inputs)]), error.constraint) from error
        return made, replace(settled, findings=(*settled.findings, *tightened(inputs)))

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

    def draft(self, inputs: Inputs, *, quick: bool = False, limit: TimeLimit | None = None) -> GearPlan:
        """Make a plan with one entry for all rates and without a certificate, to see what can be reached.

        With `quick` the first entry that reaches the rate of the goal is taken, not the most accurate one. Past the
        `limit`, None: that of all plans, it is the most accurate one that was found by then.

        Raises:
            Infeasible: nothing can.

        """
        wanted = replace(inputs, policy=WITH_ONE_ENTRY[inputs.policy], quickest=False)
        limit = TimeLimit(0.0) if quick else limit or self._limit
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
        endpoints = inputs.cluster.endpoints

        def of(chosen: Sequence[Endpoint]) -> Inputs:
            kinds = {endpoint.kind for endpoint in chosen}
            profiles = {kind: profile for kind, profile in inputs.profiles.items() if kind in kinds}
            cluster = msgspec.structs.replace(inputs.cluster, endpoints=tuple(chosen))
            return replace(inputs, goal=goal, cluster=cluster, profiles=profiles)

        # what does not fit is said of all endpoints, in the plan of them
        check_fit(inputs.search, inputs.profiles, inputs.cluster, family=inputs.family, models=inputs.search.models)
        found = least_cost(endpoints, inputs.profiles, rate_per_s, lambda chosen: self._can(of(chosen)), self._limit)
        if self._limit.reached:
            self._limit.leave_out("endpoints that cost less")
        if found is None:
            return Settled(of(endpoints))
        per_hour, number = cost_of(found)
        cost = f", at {per_hour:g} per hour" if any(endpoint.cost_per_hour for endpoint in endpoints) else ""
        finding = (
            f"{number} of {len(endpoints)} endpoints reach {rate_per_s:g} rows/s{cost}: "
            f"{', '.join(endpoint.name for endpoint in found)}."
        )
        return Settled(of(found), (finding,))


def tightened(inputs: Inputs) -> list[str]:
    """Say, if it is so, that max_epsilon asks for more than the accuracy of the goal."""
    search = inputs.search
    accuracy = float((search.models[reference_model(search)].label == search.truth).mean())
    sentence = None if inputs.policy == "reference" else inputs.goal.tightened(accuracy)
    return [] if sentence is None else [sentence]


def _with_slo(goal: FamilyGoal, batches: float) -> FamilyGoal:
    return msgspec.structs.replace(goal, slo_s=None, slo_per_reference_batch=batches, minimise=None)
