from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from planner.derived import (
    Scaling,
    alike_endpoints,
    bound_points,
    held_bytes,
    layout_rates,
    plan_cost,
    range_end,
    row_work_s,
    scaling,
    steady_layout,
)
from tests.fakes import tiny
from tests.fakes.plans import make_profile

if TYPE_CHECKING:
    from cascadeserve.gear_plan import GearPlan, PlannedFamily

PREDICTED = {
    "sustained_rate_per_s": 5000.0,
    "p50_s": 0.1,
    "p95_s": 0.3,
    "p99_s": 0.32,
    "worst_s": 0.35,
    "accuracy": 0.9,
    "utilisation": 0.72,
}


def predicted(endpoints: tuple[str, ...] = ("a",), **changes: Any) -> GearPlan:
    """The tiny plan with predictions for gear `wide` (0 to 4,000 rows/s): 90 % busy at the 5,000 it sustains."""
    document = tiny.plan_document(endpoints)
    document["families"]["family"]["gears"][2]["predicted"] = PREDICTED | changes
    return tiny.plan(document)


def family_of(plan: GearPlan) -> PlannedFamily:
    return plan.families["family"]


@pytest.mark.parametrize(
    ("gap", "shown"),
    [
        (0.0, "0"),
        (0.0045154, "0.452"),
        (0.00123, "0.123"),
        (0.001231, "0.124"),
        (0.0127, "1.27"),
        (-0.0012349, "-0.123"),
    ],
)
def test_bounds_are_never_rounded_down(gap: float, shown: str) -> None:
    assert bound_points(gap) == shown
    assert float(bound_points(gap)) >= 100 * gap - 1e-9


def test_work_is_that_of_full_batches_by_the_share_that_gets_there() -> None:
    family = family_of(tiny.plan())
    assert row_work_s(family, family.entry("reference")) == pytest.approx(0.010 / 64)
    # the first gear that uses it has no triggers: batches as large as the models take
    assert row_work_s(family, family.entry("cascade")) == pytest.approx((0.002 + 0.3 * 0.010) / 64)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"ended_by": "goal"}, "The goal asks for no more. It would sustain 5,000 rows/s."),
        ({"ended_by": "next_gear"}, "Makes room for the next gear"),
        ({"ended_by": "sustained"}, "Device time: sustains 5,000 rows/s, with the device 90% busy."),
        ({}, "Device time: sustains 5,000 rows/s"),
        (
            {"utilisation": 0.4},
            "Waiting: sustains 5,000 rows/s, where the SLO is used up with the device only 50% busy.",
        ),
    ],
)
def test_what_ends_a_range(changes: dict[str, Any], words: str) -> None:
    family = family_of(predicted(**changes))
    assert words in range_end(family, family.gears[2])


def test_nothing_is_said_of_what_the_plan_does_not_hold() -> None:
    family = family_of(tiny.plan())
    assert range_end(family, family.gears[0]) == ""
    assert range_end(family, family.gears[3]).startswith("Takes whatever is above")


def test_a_cheaper_cascade_that_is_not_certified_is_named() -> None:
    document = tiny.plan_document()
    family = document["families"]["family"]
    family["ladder"][0]["epsilon"], family["ladder"][1]["epsilon"] = 0.0, 0.01
    family["ladder"].append({"name": "hasty", "stages": [{"model": "small"}], "reach": [1.0]})
    family["gears"][2]["predicted"] = PREDICTED
    family["gears"][3]["ladder_entry"] = "hasty"
    family["certificate"] = {
        "epsilon": 0.01, "delta": 0.05, "rows": 100, "method": "m", "ladder_digest": "d", "records_digest": "d",
        "reference_accuracy": 0.9,
    }  # fmt: skip
    made = family_of(tiny.plan(document))
    assert range_end(made, made.gears[2]).endswith("Above, hasty takes less of it, but is not certified.")


def test_one_endpoint_more_or_less() -> None:
    plan = predicted(("a", "b"))
    found = scaling(plan, family_of(plan), plan.layouts[1])
    assert isinstance(found, Scaling)
    assert (found.endpoints, found.with_more_per_s, found.with_less_per_s) == (2, 7500.0, 2500.0)
    alone = predicted()
    found = scaling(alone, family_of(alone), alone.layouts[1])
    assert isinstance(found, Scaling)
    assert (found.with_more_per_s, found.with_less_per_s) == (10_000.0, None)


def test_nothing_is_extrapolated_where_the_plan_alone_does_not_tell() -> None:
    waiting = predicted(utilisation=0.3)
    assert "waiting" in str(scaling(waiting, family_of(waiting), waiting.layouts[1]))
    silent = tiny.plan()
    assert scaling(silent, family_of(silent), silent.layouts[0]) == ""
    document = tiny.plan_document(("a", "b"))
    document["families"]["family"]["gears"][2]["predicted"] = PREDICTED
    document["layouts"][1]["instances"]["b"]["large"] = 1
    uneven = tiny.plan(document)
    assert "different models" in str(scaling(uneven, family_of(uneven), uneven.layouts[1]))


def test_cost_per_hour_and_per_million_rows() -> None:
    document = tiny.plan_document(("a", "b"))
    document["families"]["family"]["expected"] = {
        "rate_prior": [[500.0, 0.5], [1500.0, 0.5]], "accuracy": 0.9, "accuracy_over_time": 0.9, "gears": {},
    }  # fmt: skip
    plan = tiny.plan(document)
    cost = plan_cost(plan, {"a": 1.8, "b": 1.8, "idle": 100.0})
    assert cost is not None
    assert cost.per_hour == pytest.approx(3.6)
    # 1,000 rows/s are 3.6 million an hour
    assert cost.per_million_rows == pytest.approx({"narrow": 1.0, "broad": 0.25})
    assert cost.per_million_rows_expected == pytest.approx(1.0)
    assert plan_cost(plan, {"a": 1.8}) is None
    assert plan_cost(plan, {"a": 0.0, "b": 0.0}) is None
    bare = plan_cost(tiny.plan(), {"a": 1.8})
    assert bare is not None
    assert bare.per_million_rows_expected is None


def test_when_a_layout_comes_and_goes() -> None:
    plan = tiny.plan()
    rates = layout_rates(plan, family_of(plan))
    assert (rates["narrow"].left_below_per_s, rates["narrow"].left_above_per_s) == (0.0, 1000.0)
    assert rates["broad"].left_below_per_s == pytest.approx(800.0)
    assert rates["broad"].left_above_per_s == math.inf
    assert [steady_layout(rates, rate) for rate in (0.0, 799.0, 801.0, 9000.0)] == ["narrow"] * 2 + ["broad"] * 2


def test_a_lower_layout_is_overloaded_only_until_the_next_one_stands() -> None:
    document = tiny.plan_document()
    gears = document["families"]["family"]["gears"]
    gears.append(gears[3] | {"name": "more", "layout": "narrow", "min_rate_per_s": 1000.0})
    family = family_of(tiny.plan(document))
    assert "until the next layout stands" in range_end(family, family.gears[4])
    assert "until" not in range_end(family, family.gears[3])


def test_endpoints_are_grouped_by_the_times_they_take() -> None:
    document = tiny.plan_document(("a", "b", "c"))
    slow = {name: [[64, 0.1]] for name in ("a", "c")}
    document["families"]["family"]["models"]["small"]["busy_s_on"] = slow
    plan = tiny.plan(document)
    assert alike_endpoints(plan, family_of(plan)) == [("b",), ("a", "c")]


def test_memory_is_that_of_all_instances_or_unknown() -> None:
    profile = make_profile({"small": [[1, 0.001]], "large": [[1, 0.002]]})
    sized = msgspec.structs.replace(profile.models["large"], memory_bytes=2_000)
    profile = msgspec.structs.replace(profile, models=profile.models | {"large": sized})
    assert held_bytes({"large": 3}, profile) == 6_000
    assert held_bytes({}, profile) == 0
    assert held_bytes({"large": 1, "small": 1}, profile) is None
