"""How much a plan loses against the best one: `python -m benchmarks.optimality` tries all plans of small questions.

They are random families of up to four models on up to three endpoints, in half of which memory binds
(`benchmarks.small_instances`); `benchmarks.brute_force` says what is tried and what a plan is worth. The planner and
the brute force ask the same predictor (`benchmarks.fluid`), have the same ladder, and tune triggers alike. So what is
lost is lost by the choice of layouts, and of the gears in them.

**Regret** is the value that the plan lacks, as a share of what lies between the best and the worst of all plans that
reach the highest rate; or the rate that it lacks, as a share of what lies between the highest and the lowest that a
layout reaches with an entry. The larger of the two counts. The prices of gears and layouts count in the values of both:
the planner asks them for what the predictor does not see, and a plan without them would be another aim, not a better
plan. For the reader `accuracy` is what the plan answers rightly without any price.

For the least cost all subsets of the endpoints are tried: which reach the rate, and what the cheapest of those cost.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import replace
from datetime import UTC, datetime
from itertools import combinations, count
from pathlib import Path
from typing import TYPE_CHECKING

# One core, as in the planner's budget: no thread pools behind numpy.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import click
import msgspec
from rich.console import Console
from rich.progress import track

from benchmarks.brute_force import BruteForce, value_of
from benchmarks.fluid import FluidPredictor
from benchmarks.small_instances import FAMILY, small_instance
from cascadeserve.artefacts import Artefact, write_json
from planner.host import describe_host
from planner.infeasible import Infeasible
from planner.objectives import Planner
from planner.planning import plan_family
from planner.profile import Host

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from cascadeserve.cluster import Endpoint
    from cascadeserve.gear_plan import GearPlan, Layout
    from planner.inputs import Inputs

RESULT = Path(__file__).parents[1] / "benchmarks" / "results" / "local" / "optimality.json"
_NUM_INSTANCES = 20
# values that are the same but for rounding
_SAME = 1e-9
# the rates that the least cost is looked for at, as shares of what all endpoints reach
_COST_RATES = (0.35, 0.55, 0.75)
_COST_SEED = 1000


class Question(Artefact, frozen=True, kw_only=True):
    """One random question: its size, what the plan is worth, and what the best and the worst plan are."""

    seed: int
    models: int
    endpoints: int
    memory_binds: bool
    possible_layouts: int
    planned_layouts: int
    rate_per_s: float
    best_rate_per_s: float
    value: float
    best_value: float
    worst_value: float
    accuracy: float
    regret: float
    plan_s: float
    brute_force_s: float


class CostQuestion(Artefact, frozen=True, kw_only=True):
    """Endpoints, cost per hour and number of those in the plan, and of the cheapest that reach the rate."""

    seed: int
    endpoints: int
    rate_per_s: float
    cost: float
    number: int
    least_cost: float
    least_number: int


class Optimality(Artefact, frozen=True, kw_only=True):
    """The whole run; `wrong_refusals` counts questions that have a plan and were refused, or the other way round."""

    date: str
    machine: Host
    questions: tuple[Question, ...]
    cost_questions: tuple[CostQuestion, ...]
    largest_regret: float
    wrong_refusals: int
    not_least_cost: int
    wall_s: float


class _Seen(Exception):  # noqa: N818 - named by what happened
    """The planner has its models and its ladder."""


def brute_force(inputs: Inputs) -> BruteForce | None:
    """All plans of a question; None: no model is accurate enough, or can stand."""
    drafts: list[GearPlan] = []

    def predict(plan: GearPlan, *_: object, **__: object) -> FluidPredictor:
        drafts.append(plan)
        raise _Seen

    try:
        plan_family(inputs, None, predict=predict)
    except _Seen:
        (draft,) = drafts
    except Infeasible:
        return None
    devices = {each.name: inputs.profiles[each.kind] for each in inputs.cluster.endpoints}

    def on(layouts: Sequence[Layout]) -> FluidPredictor:
        plan = msgspec.structs.replace(draft, layouts=tuple(layouts))
        return FluidPredictor(plan, FAMILY, inputs.goal, inputs.search, devices)

    return BruteForce(inputs, draft, on, floor=inputs.goal.min_accuracy or 0.0)


def compared(seed: int) -> Question | bool | None:
    """Plan a question and try all its plans.

    Where there is no plan: whether the planner says so. None: all plans are worth the same.
    """
    inputs = small_instance(seed)
    started_s = time.perf_counter()
    try:
        plan = plan_family(inputs, None, predict=FluidPredictor)
    except Infeasible:
        plan = None
    planned_s = time.perf_counter()
    every = brute_force(inputs)
    top_per_s = 0.0 if every is None else every.top_per_s()
    if every is None or top_per_s == 0.0 or top_per_s < (inputs.goal.max_rate_per_s or 0.0):
        return plan is None
    if plan is None:
        return False
    bounds = every.bounds()
    if bounds.best - bounds.worst < _SAME:
        return None
    rate_per_s, value = value_of(plan, inputs)
    rates = max(bounds.top_per_s - bounds.least_top_per_s, bounds.top_per_s * _SAME)
    regrets = (bounds.best - value) / (bounds.best - bounds.worst), (bounds.top_per_s - rate_per_s) / rates
    return Question(
        seed=seed,
        models=len(inputs.search.models),
        endpoints=len(inputs.cluster.endpoints),
        memory_binds=bounds.num_layouts > 1,
        possible_layouts=bounds.num_layouts,
        planned_layouts=len(plan.layouts),
        rate_per_s=rate_per_s,
        best_rate_per_s=bounds.top_per_s,
        value=value,
        best_value=bounds.best,
        worst_value=bounds.worst,
        accuracy=value_of(plan, inputs, priced=False)[1],
        regret=max(regrets),
        plan_s=planned_s - started_s,
        brute_force_s=time.perf_counter() - planned_s,
    )


def costed(seed: int) -> CostQuestion | None:
    """Plan for the least cost, and try all subsets of three endpoints; None: no rate is reached at all."""
    inputs = small_instance(seed, num_endpoints=3)
    goal = msgspec.structs.replace(inputs.goal, max_rate_per_s=None)
    inputs = replace(inputs, goal=goal)
    whole = brute_force(inputs)
    top_per_s = 0.0 if whole is None else whole.top_per_s()
    if top_per_s == 0.0:
        return None
    rate_per_s = _COST_RATES[seed % len(_COST_RATES)] * top_per_s
    least = min(
        (_cost(chosen), len(chosen))
        for number in range(1, len(inputs.cluster.endpoints) + 1)
        for chosen in combinations(inputs.cluster.endpoints, number)
        if (every := brute_force(_with_endpoints(inputs, chosen))) is not None and every.top_per_s() >= rate_per_s
    )
    asked = msgspec.structs.replace(goal, max_rate_per_s=rate_per_s, minimise="cost")
    planner = Planner(predict=FluidPredictor)
    _, settled = planner.plan(replace(inputs, goal=asked), None)
    used = settled.inputs.cluster.endpoints
    return CostQuestion(
        seed=seed,
        endpoints=len(inputs.cluster.endpoints),
        rate_per_s=rate_per_s,
        cost=_cost(used),
        number=len(used),
        least_cost=least[0],
        least_number=least[1],
    )


def _cost(endpoints: Sequence[Endpoint]) -> float:
    return math.fsum(endpoint.cost_per_hour for endpoint in endpoints)


def _with_endpoints(inputs: Inputs, endpoints: Sequence[Endpoint]) -> Inputs:
    kinds = {endpoint.kind for endpoint in endpoints}
    return replace(
        inputs,
        cluster=msgspec.structs.replace(inputs.cluster, endpoints=tuple(endpoints)),
        profiles={kind: profile for kind, profile in inputs.profiles.items() if kind in kinds},
    )


def _questions() -> Iterator[Question | bool]:
    """As many questions in which memory binds as others, by rising seed, and what was refused among them."""
    wanted = {True: _NUM_INSTANCES // 2, False: _NUM_INSTANCES - _NUM_INSTANCES // 2}
    for seed in count():
        found = compared(seed)
        if isinstance(found, Question):
            if wanted[found.memory_binds]:
                wanted[found.memory_binds] -= 1
                yield found
        elif found is not None:
            yield found
        if not any(wanted.values()):
            return


@click.command()
@click.option("--result", type=click.Path(path_type=Path), default=RESULT)
def main(result: Path) -> None:
    """Write the regret of every question, and what the least cost is."""
    started_s = time.perf_counter()
    console = Console(stderr=True)
    found = list(track(_questions(), description="plans", console=console, transient=True))
    seeds = range(_COST_SEED, _COST_SEED + _NUM_INSTANCES)
    costs = [costed(seed) for seed in track(seeds, description="costs", console=console, transient=True)]
    cost_questions = tuple(each for each in costs if each is not None)
    questions = tuple(each for each in found if isinstance(each, Question))
    report = Optimality(
        date=datetime.now(UTC).date().isoformat(),
        machine=describe_host(),
        questions=questions,
        cost_questions=cost_questions,
        largest_regret=max(each.regret for each in questions),
        wrong_refusals=sum(each is False for each in found),
        not_least_cost=sum(
            each.number != each.least_number or abs(each.cost - each.least_cost) > _SAME for each in cost_questions
        ),
        wall_s=time.perf_counter() - started_s,
    )
    write_json(result, report)
    print(
        f"largest regret {report.largest_regret:.4f} of {len(questions)} questions, {report.wrong_refusals} refused "
        f"wrongly; {report.not_least_cost} of {len(cost_questions)} costs are not the least; {report.wall_s:.0f} s"
    )


if __name__ == "__main__":
    main()
