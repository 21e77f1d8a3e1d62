from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascadeserve.policy.batching import handicap_s


@pytest.mark.parametrize(
    ("priority", "slos"), [(0, 0.0), (1, -1.0), (2, 0.0), (3, 1.0), (5, 3.0), (6, 4.0), (7, 4.0), (2**64 - 1, 4.0)]
)
def test_each_level_is_worth_an_slo(priority: int, slos: float) -> None:
    assert handicap_s(priority, 0.2) == pytest.approx(0.2 * slos)


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_no_row_is_overtaken_by_what_comes_more_than_five_slos_later(one: int, other: int) -> None:
    assert handicap_s(one, 1.0) - handicap_s(other, 1.0) <= 5.0
