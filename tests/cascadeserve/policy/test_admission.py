from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascadeserve.policy.admission import (
    CLEARED_FOR_S,
    DEADLINE_SLOS,
    LAST_GEAR_SLOS,
    NONE,
    NOT_STANDING,
    PREDICTED_WORK,
    STANDING_AFTER_S,
    admits,
    in_time,
)

SLO_S, OWN_S = 1.0, 0.25
DEADLINE_S = DEADLINE_SLOS * SLO_S


def ask(wait_s: float, *, now_s: float = 10.0, since_s: float = NOT_STANDING) -> tuple[bool, float, float]:
    return admits(wait_s, OWN_S, SLO_S, DEADLINE_SLOS, now_s, since_s)


def test_in_a_surge_what_can_be_served_before_its_deadline_is_let_in() -> None:
    assert ask(0.0) == (True, DEADLINE_S, NOT_STANDING)
    assert ask(1.0) == (True, DEADLINE_S, NOT_STANDING)
    assert ask(4.0) == (True, DEADLINE_S, 10.0)
    assert ask(4.1) == (False, DEADLINE_S, 10.0)


def test_a_surge_that_ends_in_time_leaves_nothing_behind() -> None:
    assert ask(3.0, since_s=10.0 - 0.9 * STANDING_AFTER_S)[0]
    assert ask(0.9, since_s=10.0 - 0.9 * STANDING_AFTER_S) == (True, DEADLINE_S, NOT_STANDING)


def test_of_a_standing_backlog_as_much_is_let_in_as_can_be_answered_within_the_slo() -> None:
    since_s = 10.0 - STANDING_AFTER_S
    assert ask(0.66, since_s=since_s) == (False, pytest.approx(0.65), since_s)
    assert ask(0.64, since_s=since_s) == (True, pytest.approx(0.65), since_s)
    assert ask(0.26, since_s=since_s)[2] == since_s
    assert ask(0.25, since_s=since_s)[2] == NOT_STANDING


def test_however_long_the_own_batches_take_there_is_enough_for_full_ones() -> None:
    assert admits(0.5, 5.0, SLO_S, DEADLINE_SLOS, 10.0, 9.5) == (True, 0.5, 9.5)


def test_where_no_faster_gear_will_come_less_is_let_in_at_first() -> None:
    for wait_s, let_in in ((2.0, True), (2.1, False)):
        assert admits(wait_s, OWN_S, SLO_S, LAST_GEAR_SLOS, 10.0, NOT_STANDING) == (let_in, 2.0, 10.0)


def test_where_no_faster_gear_will_come_a_backlog_stands_until_it_has_been_cleared_for_a_while() -> None:
    def last_gear(wait_s: float, now_s: float, since_s: float) -> tuple[float, float]:
        _, limit_s, since_s = admits(wait_s, OWN_S, SLO_S, LAST_GEAR_SLOS, now_s, since_s)
        return limit_s, since_s

    limit_s, since_s = last_gear(0.6, 20.0, 10.0)
    assert limit_s == pytest.approx(0.65)
    limit_s, since_s = last_gear(0.2, 20.0 + 0.9 * CLEARED_FOR_S, since_s)
    assert limit_s == pytest.approx(0.65)
    # anew from here
    limit_s, since_s = last_gear(0.3, 20.0 + 0.95 * CLEARED_FOR_S, since_s)
    limit_s, since_s = last_gear(0.2, 20.0 + 1.9 * CLEARED_FOR_S, since_s)
    assert limit_s == pytest.approx(0.65)
    assert last_gear(0.2, 20.0 + 2.0 * CLEARED_FOR_S, since_s) == (2.0, NOT_STANDING)


@given(
    st.floats(0.0, 10.0), st.floats(0.0, 2.0), st.floats(-1.0, 20.0), st.sampled_from([LAST_GEAR_SLOS, DEADLINE_SLOS])
)
def test_what_waits_less_is_let_in_too(wait_s: float, less_s: float, since_s: float, surge_slos: float) -> None:
    if admits(wait_s, OWN_S, SLO_S, surge_slos, 10.0, since_s)[0]:
        assert admits(max(wait_s - less_s, 0.0), OWN_S, SLO_S, surge_slos, 10.0, since_s)[0]


def test_what_cannot_be_answered_by_its_deadline_is_not_begun() -> None:
    assert in_time(PREDICTED_WORK, 1.0, 0.2, 0.5, 0.25)
    assert not in_time(PREDICTED_WORK, 1.0, 0.2, 0.5, 0.35)


def test_without_admission_everything_is() -> None:
    assert in_time(NONE, 1.0, 2.0, 5.0, 5.0)
