from __future__ import annotations

from itertools import pairwise
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascadeserve.policy.gear_switch import DOWN, HOLD, UP, switch_gear, switch_layout

UPPER = [100.0, 1000.0, inf]
DWELL_S = 2.0
TICK_S = 0.1


def gears_for(demands: list[float], *, start: int = 0) -> list[int]:
    """Gear in force after each tick."""
    gear, low_since_s, gears = start, -1.0, []
    for tick, demand in enumerate(demands):
        gear, _, low_since_s = switch_gear(gear, UPPER, demand, tick * TICK_S, low_since_s, DWELL_S, 0.0)
        gears.append(gear)
    return gears


@pytest.mark.parametrize(
    ("demand", "gear"), [(0.0, 0), (99.9, 0), (100.0, 1), (999.0, 1), (1000.0, 2), (1e9, 2), (inf, 2)]
)
def test_a_gear_holds_from_its_lower_rate_up_to_but_not_its_upper_one(demand: float, gear: int) -> None:
    assert gears_for([demand])[-1] == gear


def test_up_is_taken_at_once_over_any_number_of_gears() -> None:
    assert switch_gear(0, UPPER, 5000.0, 0.0, -1.0, DWELL_S, 0.0) == (2, UP, -1.0)


def test_a_gear_is_not_left_for_a_rate_that_may_well_be_its_own() -> None:
    assert switch_gear(0, UPPER, 104.0, 0.0, -1.0, DWELL_S, 3.0) == (0, HOLD, -1.0)
    assert switch_gear(0, UPPER, 105.0, 0.0, -1.0, DWELL_S, 3.0) == (1, UP, -1.0)


def test_down_is_taken_only_after_the_demand_was_lower_throughout_the_dwell() -> None:
    gears = gears_for([50.0] * 40, start=2)
    assert gears.index(0) * TICK_S == pytest.approx(DWELL_S)
    interrupted = gears_for([50.0] * 15 + [2000.0] + [50.0] * 24, start=2)
    assert interrupted.count(2) >= 15 + 1 + 19, "a moment of demand starts the dwell again"
    assert interrupted[-1] == 0


def test_reasons_say_which_way_it_went() -> None:
    assert switch_gear(1, UPPER, 500.0, 9.0, 3.0, DWELL_S, 0.0) == (1, HOLD, -1.0)
    assert switch_gear(1, UPPER, 50.0, 9.0, -1.0, DWELL_S, 0.0) == (1, HOLD, 9.0)
    assert switch_gear(1, UPPER, 50.0, 9.0, 7.0, DWELL_S, 0.0) == (0, DOWN, -1.0)


@given(st.lists(st.floats(0.0, 2000.0), min_size=1, max_size=100))
def test_the_gear_never_lies_below_the_demand_and_changes_down_at_most_once_per_dwell(demands: list[float]) -> None:
    gears = gears_for(demands)
    for gear, demand in zip(gears, demands, strict=True):
        assert demand < UPPER[gear]
    downs = [tick for tick, (before, after) in enumerate(pairwise(gears), start=1) if after < before]
    assert all(later - earlier >= DWELL_S / TICK_S for earlier, later in pairwise(downs))


@given(st.floats(0.0, 2000.0), st.integers(0, 2))
def test_under_steady_demand_the_gear_settles(demand: float, start: int) -> None:
    gears = gears_for([demand] * 60, start=start)
    assert len(set(gears[25:])) == 1


def test_demand_that_wavers_around_a_limit_does_not_make_the_gear_oscillate() -> None:
    assert set(gears_for([99.0, 101.0] * 50)[1:]) == {1}


UP_AFTER_S, DOWN_AFTER_S, DOWN_FRACTION = 1.0, 10.0, 0.8


def layouts_for(loads: list[tuple[float, float]], *, num_layouts: int = 3, start: int = 0) -> list[int]:
    """Layout in force after each tick, for (load here, load below)."""
    layout, wish, since_s, layouts = start, HOLD, 0.0, []
    for tick, (here, below) in enumerate(loads):
        layout, wish, since_s = switch_layout(
            layout, num_layouts, here, below, tick * TICK_S, wish, since_s, UP_AFTER_S, DOWN_AFTER_S, DOWN_FRACTION
        )
        layouts.append(layout)
    return layouts


OVERLOAD, FINE, LOW = (1.5, 3.0), (0.9, 1.1), (0.1, 0.3)


def test_a_layout_grows_one_step_at_a_time_each_after_the_overload_has_lasted() -> None:
    layouts = layouts_for([OVERLOAD] * 30)
    first, second = layouts.index(1), layouts.index(2)
    assert first * TICK_S == pytest.approx(UP_AFTER_S)
    assert (second - first) * TICK_S >= UP_AFTER_S
    assert layouts[-1] == 2, "the largest layout stays, however large the load"


def test_a_layout_shrinks_one_step_at_a_time_each_after_low_load_has_lasted() -> None:
    layouts = layouts_for([LOW] * 220, start=2)
    first, second = layouts.index(1), layouts.index(0)
    assert first * TICK_S == pytest.approx(DOWN_AFTER_S)
    assert (second - first) * TICK_S >= DOWN_AFTER_S
    assert layouts[-1] == 0


@pytest.mark.parametrize(("wanted", "start"), [(OVERLOAD, 0), (LOW, 1)])
def test_a_wish_that_is_interrupted_starts_over(wanted: tuple[float, float], start: int) -> None:
    lasting_s = UP_AFTER_S if wanted is OVERLOAD else DOWN_AFTER_S
    ticks = round(lasting_s / TICK_S)
    layouts = layouts_for(([wanted] * (ticks - 1) + [FINE]) * 3, start=start)
    assert set(layouts) == {start}


def test_a_wish_for_the_other_direction_starts_over() -> None:
    assert set(layouts_for([LOW] * 60 + [OVERLOAD] * 9 + [LOW] * 60, start=1)) == {1}


def test_a_smaller_layout_is_wanted_only_well_below_what_it_is_planned_for() -> None:
    assert set(layouts_for([(0.4, DOWN_FRACTION)] * 300, start=1)) == {1}
    assert layouts_for([(0.4, DOWN_FRACTION - 0.01)] * 300, start=1)[-1] == 0


@given(
    st.lists(st.tuples(st.floats(0.0, 3.0), st.floats(0.0, 6.0)), max_size=150), st.integers(1, 4), st.integers(0, 3)
)
def test_whatever_the_load_layouts_stay_in_range_and_steps_are_rate_limited(
    loads: list[tuple[float, float]], num_layouts: int, start: int
) -> None:
    start = min(start, num_layouts - 1)
    layouts = [start, *layouts_for(loads, num_layouts=num_layouts, start=start)]
    assert all(0 <= layout < num_layouts for layout in layouts)
    changes = [tick for tick, (before, after) in enumerate(pairwise(layouts)) if before != after]
    assert all(abs(layouts[tick + 1] - layouts[tick]) == 1 for tick in changes)
    assert all((later - earlier) * TICK_S >= UP_AFTER_S - 1e-9 for earlier, later in pairwise(changes))
