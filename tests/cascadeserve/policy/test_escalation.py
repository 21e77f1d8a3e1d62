from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascadeserve.policy.escalation import accepted, next_stage_in_time, stage_threshold

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


@pytest.mark.parametrize(
    ("threshold", "stage", "max_stage", "min_certainty", "expected"),
    [
        (0.5, 0, None, None, 0.5),
        (0.5, 0, 1, None, 0.5),
        (0.5, 0, 0, None, None),
        (0.5, 1, 0, 0.9, None),
        (0.5, 0, None, 0.9, 0.9),
        (0.5, 0, None, 0.1, 0.5),
        (None, 2, None, 0.9, None),
    ],
)
def test_a_request_may_ask_for_more_certainty_or_fewer_stages(
    threshold: float | None, stage: int, max_stage: int | None, min_certainty: float | None, expected: float | None
) -> None:
    assert stage_threshold(threshold, stage, max_stage, min_certainty) == expected


@pytest.mark.parametrize(
    ("in_flight_s", "queued_rows", "slots", "deadline_s", "expected"),
    [
        (0.0, 0, 1, 10.25, True),
        (0.0, 0, 1, 10.24, False),
        (0.5, 0, 1, 10.75, True),
        (0.5, 1, 1, 10.75, False),
        (0.5, 4, 1, 11.25, True),
        (0.5, 4, 2, 10.75, True),
        (0.5, 4, 2, 10.74, False),
    ],
)
def test_the_next_stage_is_in_time_if_what_is_ahead_and_the_batch_itself_are_done_by_then(
    in_flight_s: float, queued_rows: int, slots: int, deadline_s: float, expected: bool
) -> None:
    assert next_stage_in_time(deadline_s, 10.0, in_flight_s, queued_rows, 0.125, slots, 0.25) is expected
