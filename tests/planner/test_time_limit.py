from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planner.least import least_count, least_value
from planner.planning import plan_family
from planner.time_limit import TimeLimit, spread
from tests.fakes.planned import FormulaPredictor, goal, inputs

ENDLESS = TimeLimit(None)


@given(st.lists(st.integers(), max_size=40))
def test_spread_takes_everything_once_and_the_ends_first(items: list[int]) -> None:
    assert sorted(spread(items)) == sorted(items)
    assert spread(items)[:2] == items[-1:] + items[: len(items) > 1]


def test_spread_leaves_even_gaps() -> None:
    assert spread(range(9)) == [8, 0, 4, 2, 6, 1, 3, 5, 7]


def test_a_limit_is_reached_when_its_time_is_up() -> None:
    now_s = 5.0
    limit = TimeLimit(2.0, clock=lambda: now_s)
    assert not limit.reached
    now_s = 7.0
    assert limit.reached
    limit.leave_out("this")
    limit.leave_out("this")
    assert limit.left_out == ["this"]
    assert not ENDLESS.reached


@given(st.floats(0.01, 300.0))
def test_the_least_value_is_found_to_the_ratio(edge: float) -> None:
    found = least_value(lambda value: value >= edge, 10.0, most=320.0, ratio=1.05, limit=ENDLESS)
    assert found is not None
    assert edge <= found <= edge * 1.05


def test_nothing_is_found_where_nothing_can() -> None:
    tried: list[float] = []
    assert least_value(tried.append, 10.0, most=35.0, ratio=1.05, limit=ENDLESS) is None  # type: ignore[arg-type]
    assert tried == [10.0, 20.0, 35.0]


def test_nothing_below_what_is_known_is_tried() -> None:
    tried: list[float] = []

    def can(value: float) -> bool:
        tried.append(value)
        return value >= 1.05

    found = least_value(can, 1.1, known=1.0, most=32.0, ratio=1.01, limit=ENDLESS)
    assert found is not None
    assert math.isclose(found, 1.05, rel_tol=0.01)
    assert min(tried) > 1.0


@given(st.integers(3, 40))
def test_the_least_count_is_exact(edge: int) -> None:
    assert least_count(lambda count: count >= edge, known=2, most=40, limit=ENDLESS) == edge
    assert least_count(lambda count: count >= edge, known=2, most=edge - 1, limit=ENDLESS) is None


def test_past_the_limit_the_rest_of_the_ladder_is_left_out_and_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planner.planning.SimulatedGears", FormulaPredictor.of)
    whole = plan_family(inputs(), None).families["tiny"]
    limit = TimeLimit(0.0)
    made = plan_family(inputs(), None, limit=limit).families["tiny"]
    assert any(text.startswith("the ladder entry") for text in limit.left_out)
    # the cheapest entry comes first, so the rate is what it would be
    assert made.max_rate_per_s("all") == whole.max_rate_per_s("all")


def test_past_the_limit_it_still_goes_on_until_the_rate_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planner.planning.SimulatedGears", FormulaPredictor.of)
    top = plan_family(inputs(), None).families["tiny"].max_rate_per_s("all")
    asked = goal(max_rate_per_s=0.9 * top)
    made = plan_family(inputs(goal=asked), None, limit=TimeLimit(0.0)).families["tiny"]
    assert made.max_rate_per_s("all") == pytest.approx(0.9 * top)
