"""What would lift a goal: that it does is tried here once more, and that less of it does not."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from planner.infeasible import Infeasible
from planner.objectives import Planner
from planner.planning import plan_family
from planner.profile import FrontCost
from planner.time_limit import TimeLimit
from tests.fakes.planned import FormulaPredictor, cluster, goal, inputs, profile

if TYPE_CHECKING:
    from cascadeserve.cluster import Cluster
    from planner.inputs import Inputs
    from planner.profile import Profile


@pytest.fixture(autouse=True)
def _formula(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planner.planning.SimulatedGears", FormulaPredictor.of)


def refusal(given: Inputs, **options: Any) -> str:
    with pytest.raises(Infeasible) as caught:
        Planner(**options).plan(given, None)
    return str(caught.value)


def feasible(given: Inputs) -> bool:
    try:
        plan_family(given, None)
    except Infeasible:
        return False
    return True


def with_memory(*memory_bytes: int) -> Cluster:
    (one,) = cluster().endpoints
    several = tuple(
        msgspec.structs.replace(one, name=name, memory_bytes=held)
        for name, held in zip("abcd", memory_bytes, strict=False)
    )
    return msgspec.structs.replace(cluster(), endpoints=several)


def sized(**memory_bytes: int) -> Profile:
    known = profile().models
    return profile(models={n: msgspec.structs.replace(known[n], memory_bytes=size) for n, size in memory_bytes.items()})


@pytest.mark.parametrize("unit", [1e-3, 1e-6])
def test_an_slo_in_the_wrong_unit_names_the_one_that_is_kept(unit: float) -> None:
    given = inputs(goal=goal(slo_s=0.1 * unit, below_reference=0.0))
    named = float(refusal(given).partition("slo_s = ")[2].removesuffix("."))
    assert feasible(replace(given, goal=goal(slo_s=named, below_reference=0.0)))
    assert not feasible(replace(given, goal=goal(slo_s=named / 1.05, below_reference=0.0)))


def test_memory_that_is_missing_is_named_as_tried() -> None:
    given = inputs(
        goal=goal(below_reference=0.0), profiles={"cpu": sized(small=1_234_567, large=4_567_890)},
        cluster=with_memory(3_000_000, 2_000_000),
    )  # fmt: skip
    assert "memory_bytes = 4_570_000 for endpoint 'a'" in refusal(given)
    assert feasible(replace(given, cluster=with_memory(4_570_000, 2_000_000)))
    assert not feasible(replace(given, cluster=with_memory(4_560_000, 2_000_000)))


def test_where_one_endpoint_is_not_enough_all_get_more_memory() -> None:
    profiles = {"cpu": sized(small=100, large=400)}
    one = plan_family(inputs(goal=goal(below_reference=0.0)), None).families["tiny"].max_rate_per_s("all")
    asked = goal(below_reference=0.0, max_rate_per_s=1.5 * one)
    given = inputs(goal=asked, profiles=profiles, cluster=with_memory(400, 300))
    # both models have to stand on both
    assert "memory_bytes = 500 for every endpoint that has less" in refusal(given)
    assert feasible(replace(given, cluster=with_memory(500, 500)))
    assert not feasible(replace(given, cluster=with_memory(499, 499)))
    assert not feasible(replace(given, cluster=with_memory(500, 300)))


def test_the_orchestrator_is_named_where_its_own_work_binds() -> None:
    # 20 ms a row: 50 rows/s at most
    dear = {"cpu": profile(front=FrontCost(request_s=0.02))}
    text = refusal(inputs(goal=goal(max_rate_per_s=5_000.0), profiles=dear))
    assert "What binds is the orchestrator itself" in text
    assert "more endpoints like" not in text
    assert "slo_s =" not in text
    cheap = {"cpu": profile(front=FrontCost(request_s=1e-9))}
    assert "orchestrator" not in refusal(inputs(goal=goal(max_rate_per_s=5_000.0), profiles=cheap))


def test_the_orchestrator_is_named_where_there_would_be_a_plan_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def predict(plan: Any, family: Any, wanted: Any, records: Any, devices: Any, **options: Any) -> FormulaPredictor:
        made = FormulaPredictor.of(plan, family, wanted, records, devices, **options)
        made.call_s = 0.05 if any(each.front for each in devices.values()) else 0.0
        return made

    monkeypatch.setattr("planner.planning.SimulatedGears", predict)
    top = plan_family(inputs(), None).families["tiny"].max_rate_per_s("all")
    given = inputs(goal=goal(max_rate_per_s=0.9 * top), profiles={"cpu": profile(front=FrontCost(batch_s=1e-4))})
    text = refusal(given)
    assert "What binds is the orchestrator itself" in text
    assert "more endpoints like" not in text


def test_an_accuracy_is_named_only_if_it_does_at_the_rates_of_the_goal(monkeypatch: pytest.MonkeyPatch) -> None:
    def predict(*args: Any, **options: Any) -> FormulaPredictor:
        made = FormulaPredictor.of(*args, **options)
        # a plan goes as high as it can, and these fail there
        made.fails_from_per_s = {name: 5.0 for name, entry in made.entries.items() if entry.stages[-1].model == "large"}
        return made

    monkeypatch.setattr("planner.planning.SimulatedGears", predict)
    given = inputs(goal=goal(below_reference=0.0))
    text = refusal(given)
    assert "below_reference = 0 " not in text
    loss = float(text.partition("below_reference = ")[2].partition(" ")[0].rstrip(";."))
    assert loss > 0.0
    assert feasible(replace(given, goal=goal(below_reference=loss, max_epsilon=1.0)))


def test_relief_ends_after_its_time_and_says_what_it_left_out() -> None:
    # every look at the clock takes two seconds
    clock = itertools.count(0.0, 2.0)
    limit = TimeLimit(None, clock=lambda: next(clock))
    text = refusal(inputs(goal=goal(max_rate_per_s=2_000.0, below_reference=0.0)), limit=limit)
    assert "The time for such tries was up: " in text
    assert "number of endpoints would have to be was not found" in text
    # that was no limit of the user's
    assert limit.left_out == []
