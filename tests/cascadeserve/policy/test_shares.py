from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascadeserve.policy.shares import MARGIN_FRAC, available_share, needed_share

SHARE = st.floats(0.05, 1.0)


def test_a_family_alone_has_all_of_the_time() -> None:
    assert available_share(1.0, 0.0) == 1.0
    assert available_share(0.3, 0.0) == 1.0


def test_what_the_others_need_is_not_available_and_a_margin_neither() -> None:
    assert available_share(0.2, 0.5) == pytest.approx(1.0 - (1.0 + MARGIN_FRAC) * 0.5)


@given(SHARE, st.floats(0.0, 100.0))
def test_what_is_guaranteed_is_there_however_much_the_others_need(guaranteed: float, needed: float) -> None:
    assert guaranteed <= available_share(guaranteed, needed) <= 1.0


@given(SHARE, st.floats(1.0, 1e6))
def test_a_gear_needs_what_is_guaranteed_at_the_end_of_its_range_and_half_of_it_half_way(
    guaranteed: float, planned_per_s: float
) -> None:
    assert needed_share(guaranteed, planned_per_s, planned_per_s) == pytest.approx(guaranteed)
    assert needed_share(guaranteed, planned_per_s / 2, planned_per_s) == pytest.approx(guaranteed / 2)
    assert needed_share(guaranteed, 0.0, planned_per_s) == 0.0


@given(st.floats(0.05, 0.95), st.floats(0.0, 2.0), st.floats(0.0, 2.0))
def test_families_that_stay_within_what_is_available_need_no_more_than_there_is(
    guaranteed: float, first: float, second: float
) -> None:
    """One after the other: each takes a demand as far as what the other needs lets it."""
    needed = min(first, available_share(guaranteed, 0.0))
    other = min(second, available_share(1.0 - guaranteed, needed))
    # and the first again, now that the other needs something
    needed = min(first, available_share(guaranteed, other))
    assert needed + other <= 1.0 + 1e-9
