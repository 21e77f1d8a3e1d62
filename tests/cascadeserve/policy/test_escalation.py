from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascadeserve.policy.escalation import accepted

certainties = st.lists(st.floats(width=32), max_size=20).map(lambda values: np.array(values, np.float32))


@given(certainties)
def test_the_last_stage_answers_every_row_even_one_without_a_certainty(certainty: np.ndarray) -> None:
    taken = accepted(certainty, None)
    assert taken.shape == certainty.shape
    assert taken.all()


@given(certainties, st.floats(-1e9, 1e9))
def test_a_row_is_taken_exactly_if_its_certainty_is_a_number_at_least_the_threshold(
    certainty: np.ndarray, threshold: float
) -> None:
    wanted = [not np.isnan(value) and value >= np.float32(threshold) for value in certainty]
    assert accepted(certainty, threshold).tolist() == wanted


@pytest.mark.parametrize("threshold", [0.1, 0.7, 1 / 3, 0.9999999])
def test_a_certainty_equal_to_the_threshold_in_the_models_precision_is_taken(threshold: float) -> None:
    """The plan holds 0.1 in double precision, the model answers in single: compared as doubles one would be greater."""
    at = np.float32(threshold)
    around = np.array([np.nextafter(at, np.float32(-1)), at, np.nextafter(at, np.float32(2))], np.float32)
    assert accepted(around, threshold).tolist() == [False, True, True]
