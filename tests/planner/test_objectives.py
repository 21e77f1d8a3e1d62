from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from cascadeserve.errors import UsageError
from planner.infeasible import Infeasible
from planner.least_cost import least_cost
from planner.objectives import SLO_MARGIN, Planner
from planner.planning import plan_family
from planner.profile import BusyEntry, ModelProfile
from planner.records_files import write_records
from planner.time_limit import TimeLimit
from tests.fakes.planned import FormulaPredictor, calibration, cluster, goal, inputs, profile

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from cascadeserve.cluster import Cluster, Endpoint
    from cascadeserve.gear_plan import PlannedFamily
    from planner.goal import FamilyGoal


@pytest.fixture(autouse=True)
def _formula(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planner.planning.SimulatedGears", FormulaPredictor.of)


def endpoints(count: int) -> Cluster:
    (first,) = cluster().endpoints
    several = tuple(msgspec.structs.replace(first, name=name) for name in "abcdefgh"[:count])
    return msgspec.structs.replace(cluster(), endpoints=several)


def planned(given: Any, **options: Any) -> PlannedFamily:
    return Planner(**options).plan(given, None)[0].families["tiny"]


def swift(**changes: Any) -> FamilyGoal:
    """A goal of the least latency."""
    return goal(**({"slo_s": None, "below_reference": 0.005, "max_rate_per_s": 100.0} | changes))


def test_a_goal_with_an_slo_is_planned_as_it_is() -> None:
    made, settled = Planner().plan(inputs(), None)
    assert made == plan_family(inputs(), None)
    assert settled.findings == ()


def test_the_least_latency_is_the_smallest_slo_that_a_plan_keeps() -> None:
    made, settled = Planner().plan(inputs(goal=swift()), None)
    family = made.families["tiny"]
    least_s = family.slo_s / SLO_MARGIN

    def can(slo_s: float) -> bool:
        try:
            plan_family(inputs(goal=goal(slo_s=slo_s, below_reference=0.005, max_rate_per_s=100.0)), None)
        except Infeasible:
            return False
        return True

    assert can(least_s * 1.001)
    assert not can(least_s / 1.05)
    assert family.max_rate_per_s("all") == 100.0
    floor = family.entry("large").accuracy
    assert floor is not None
    assert all((family.entry(gear.ladder_entry).accuracy or 0.0) >= floor - 0.005 for gear in family.gears)
    assert "The least SLO that 95 % of the requests can keep up to 100 rows/s" in settled.findings[0]


def test_the_rate_of_the_least_latency_may_come_from_the_prior() -> None:
    given = inputs(goal=swift(max_rate_per_s=None), prior=((20.0, 0.5), (60.0, 0.5)))
    assert planned(given).max_rate_per_s("all") == 60.0
    with pytest.raises(UsageError, match="to minimise the latency takes rates; give max_rate_per_s"):
        planned(inputs(goal=swift(max_rate_per_s=None)))


def test_every_rate_gets_the_gear_that_answers_soonest() -> None:
    # a call of the small model is slow and batches of it are cheap: at low rates the large model alone is done before a
    # cascade that asks both, at 150 rows/s it could not keep up
    busy = {"small": (0.006, 0.0001), "large": (0.001, 0.01)}
    models = {
        name: ModelProfile(
            busy=tuple(BusyEntry(batch=n, concurrency=1, busy_s=fixed_s + n * row_s) for n in (1, 2, 4, 8, 16, 32))
        )
        for name, (fixed_s, row_s) in busy.items()
    }
    family = planned(
        inputs(goal=swift(below_reference=0.02, max_rate_per_s=150.0), profiles={"cpu": profile(models=models)})
    )
    used = [[stage.model for stage in family.entry(gear.ladder_entry).stages] for gear in family.gears]
    assert used[0] == ["large"]
    assert used[-1] == ["small", "large"]
    assert family.gears[0].upper_rate_per_s < 100.0


def test_a_lower_accuracy_costs_less_latency() -> None:
    careful, fast = (planned(inputs(goal=swift(below_reference=loss))) for loss in (0.0, 0.015))
    assert fast.slo_s < careful.slo_s


def test_the_fewest_endpoints_that_reach_the_rate_are_taken() -> None:
    one = plan_family(inputs(), None).families["tiny"].max_rate_per_s("all")
    asked = goal(max_rate_per_s=2.5 * one, minimise="cost")
    made, settled = Planner().plan(inputs(goal=asked, cluster=endpoints(8)), None)
    assert list(made.layouts[0].instances) == ["a", "b", "c"]
    assert settled.findings == (f"3 of 8 endpoints reach {2.5 * one:g} rows/s: a, b, c.",)
    with pytest.raises(Infeasible):
        plan_family(inputs(goal=asked, cluster=endpoints(2)), None)


def test_cheap_endpoints_are_taken_first() -> None:
    one = plan_family(inputs(), None).families["tiny"].max_rate_per_s("all")
    asked = goal(max_rate_per_s=1.5 * one, minimise="cost")
    made, settled = Planner().plan(inputs(goal=asked, cluster=costing(a=3.0, b=1.0, c=2.0)), None)
    assert list(made.layouts[0].instances) == ["b", "c"]
    assert "at 3 per hour: b, c." in settled.findings[0]


def costing(**costs: float) -> Cluster:
    several = tuple(
        msgspec.structs.replace(each, cost_per_hour=costs[each.name]) for each in endpoints(len(costs)).endpoints
    )
    return msgspec.structs.replace(cluster(), endpoints=several)


@pytest.mark.parametrize(("dear", "expected"), [(2.5, "b"), (3.5, "acd")])
def test_one_dear_endpoint_may_cost_less_than_several_cheap_ones(dear: float, expected: str) -> None:
    """The second is as fast as three of the others: it is the better choice only while it costs less than them."""
    given = costing(a=1.0, b=dear, c=1.0, d=1.0)
    one = plan_family(inputs(), None).families["tiny"].max_rate_per_s("all")

    def can(chosen: Sequence[Endpoint]) -> bool:
        return sum(3.0 if each.name == "b" else 1.0 for each in chosen) >= 3.0

    found = least_cost(given.endpoints, {"cpu": profile()}, one, can, TimeLimit(None))
    assert found is not None
    assert "".join(each.name for each in found) == expected


def changed(text: str, field: str) -> float:
    found = re.search(rf"{field} = ([0-9.e-]+)", text)
    assert found is not None, text
    return float(found[1].rstrip("."))


def test_a_rate_that_is_too_high_names_the_least_change_of_each_number() -> None:
    base = goal(below_reference=0.005)
    top = plan_family(inputs(goal=base), None).families["tiny"].max_rate_per_s("all")
    asked = msgspec.structs.replace(base, max_rate_per_s=1.03 * top)
    with pytest.raises(Infeasible) as caught:
        planned(inputs(goal=asked))
    text = str(caught.value)
    assert caught.value.constraint == "rate"
    assert text.startswith(f"the goal asks for {1.03 * top:g} rows/s, but ")
    assert "Any of these would do: " in text

    def works(**changes: Any) -> bool:
        try:
            plan_family(inputs(goal=msgspec.structs.replace(asked, **changes)), None)
        except Infeasible:
            return False
        return True

    rate = changed(text, "max_rate_per_s")
    assert works(max_rate_per_s=rate)
    assert not works(max_rate_per_s=1.01 * rate)
    loss = changed(text, "below_reference")
    assert works(below_reference=loss)
    assert not works(below_reference=loss - 0.001)
    slo_s = changed(text, "slo_s")
    assert works(slo_s=slo_s)
    assert not works(slo_s=slo_s / 1.05)
    number = re.search(r"(\d+) more endpoints? like 'a'", text)
    assert number is not None
    assert plan_family(inputs(goal=asked, cluster=endpoints(1 + int(number[1]))), None)


def test_an_slo_that_nothing_keeps_names_the_one_that_something_does() -> None:
    with pytest.raises(Infeasible, match="no ladder entry answers within the SLO of 5 ms") as caught:
        planned(inputs(goal=goal(slo_s=0.005, below_reference=0.0)))
    text = str(caught.value)
    assert caught.value.constraint == "latency"
    assert planned(inputs(goal=goal(slo_s=changed(text, "slo_s"), below_reference=0.0)))
    assert "max_rate_per_s" not in text
    assert "endpoint" not in text.partition("do:")[2]


def test_an_accuracy_that_no_model_has_names_the_one_that_there_is() -> None:
    with pytest.raises(Infeasible, match="wants an accuracy of 99") as caught:
        planned(inputs(goal=goal(min_accuracy=0.99)))
    accuracy = changed(str(caught.value), "min_accuracy")
    assert planned(inputs(goal=goal(min_accuracy=accuracy)))
    assert str(caught.value).endswith(f"This would do: min_accuracy = {accuracy:g}.")


def test_what_is_beyond_the_certificate_says_what_that_would_have_to_allow() -> None:
    top = plan_family(inputs(goal=goal(max_epsilon=0.2)), None).families["tiny"].max_rate_per_s("all")
    asked = goal(max_epsilon=0.005, max_rate_per_s=0.95 * top)
    with pytest.raises(Infeasible) as caught:
        planned(inputs(goal=asked))
    text = str(caught.value)
    wanted = {"below_reference": changed(text, "below_reference"), "max_epsilon": changed(text, "max_epsilon")}
    assert wanted["max_epsilon"] > wanted["below_reference"]
    assert planned(inputs(goal=msgspec.structs.replace(asked, **wanted)))


def test_a_rate_that_no_slo_makes_possible_does_not_ask_for_a_longer_one() -> None:
    with pytest.raises(Infeasible, match="the goal asks for 5000 rows/s") as caught:
        planned(inputs(goal=swift(max_rate_per_s=5_000.0)))
    assert "slo" not in str(caught.value).partition("would do")[2]
    assert "max_rate_per_s" in str(caught.value)


def test_where_only_the_certificate_is_in_the_way_it_says_so(tmp_path: Path) -> None:
    one = plan_family(inputs(), None).families["tiny"].max_rate_per_s("all")
    path = tmp_path / "calibration.npz"
    # enough rows to look at, too few to certify anything
    write_records(path, calibration(200))
    with pytest.raises(Infeasible, match="Without the certificate there is a plan: too few entries"):
        Planner().plan(inputs(goal=goal(max_rate_per_s=one)), path)


def test_past_the_time_limit_the_smallest_slo_so_far_is_taken() -> None:
    calls = 0

    def clock() -> float:
        nonlocal calls
        calls += 1
        return 0.0 if calls < 4 else 10.0

    limit = TimeLimit(1.0, clock=clock)
    family = planned(inputs(goal=swift()), limit=limit)
    assert "smaller SLOs" in limit.left_out
    assert family.slo_s >= planned(inputs(goal=swift())).slo_s


def test_a_time_limit_that_ends_before_anything_is_found_says_so() -> None:
    with pytest.raises(UsageError, match="the time limit ended before an SLO was found"):
        planned(inputs(goal=swift(max_rate_per_s=5_000.0)), limit=TimeLimit(0.0))
