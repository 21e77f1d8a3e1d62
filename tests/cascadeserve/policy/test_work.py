from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascadeserve.policy.work import mean_work_s, share_at

seconds = st.floats(1e-6, 1e3)
shares = st.floats(1e-3, 100.0)


@given(seconds, st.lists(shares, min_size=1, max_size=5))
def test_where_all_take_as_long_that_is_the_mean_to_the_last_bit(work_s: float, weights: list[float]) -> None:
    assert mean_work_s([work_s] * len(weights), weights) == work_s


@given(st.lists(st.tuples(seconds, shares), min_size=1, max_size=5))
def test_slots_that_take_the_mean_finish_as_many_batches_as_these(ends: list[tuple[float, float]]) -> None:
    work_s, weights = zip(*ends, strict=True)
    mean_s = mean_work_s(work_s, weights)
    assert min(work_s) <= mean_s * (1 + 1e-9)
    assert mean_s <= max(work_s) * (1 + 1e-9)
    assert sum(weights) / mean_s == pytest.approx(sum(share / each_s for each_s, share in ends))


def test_of_a_models_work_endpoints_do_what_their_slots_are_of_all_with_the_model() -> None:
    assert share_at([True, False, False], [True, True, False], [1, 3, 5]) == 0.25
    assert share_at([True, True, False], [True, True, False], [1, 3, 5]) == 1.0
    assert share_at([True, False, False], [False, True, True], [1, 3, 5]) == 0.0
    assert share_at([True, True, True], [False, False, False], [1, 3, 5]) == 0.0
