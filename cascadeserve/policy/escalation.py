"""Which rows of a batch leave the cascade at this stage (paper section 4.2), and which go on though it is late."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def accepted(certainty: NDArray[np.float32], threshold: float | None) -> NDArray[np.bool_]:
    """Rows whose answer is taken: shape [n] from certainty [n].

    `threshold` None marks the last stage, which answers every row. A certainty that is NaN is below every threshold,
    so such a row goes on to a larger model.
    """
    if threshold is None:
        return np.ones(certainty.shape, dtype=np.bool_)
    return np.greater_equal(certainty, np.float32(threshold))


def stage_threshold(
    threshold: float | None, stage: int, max_stage: int | None, min_certainty: float | None
) -> float | None:
    """Certainty from which an answer is taken at a stage for a request with demands of its own; None: any.

    A request never goes beyond `max_stage`; before that, and before the last stage, it may ask for more certainty than
    the cascade does, never for less.
    """
    if threshold is None or (max_stage is not None and stage >= max_stage):
        return None
    return threshold if min_certainty is None else max(threshold, min_certainty)


def next_stage_in_time(
    deadline_s: float,
    now_s: float,
    in_flight_s: float,
    queued_work: float,
    row_work_s: float,
    slots: int,
    batch_busy_s: float,
) -> bool:
    """Whether the next stage can answer a row before its deadline, by the plan's busy times.

    Ahead of the row are `in_flight_s` device-seconds and `queued_work` rows of `row_work_s` each, shared by `slots`
    slots; its own batch takes `batch_busy_s`. What else may be served first is left out, so a row that this keeps back
    could not have been in time.
    """
    ahead_s = (in_flight_s + queued_work * row_work_s) / slots
    return now_s + ahead_s + batch_busy_s <= deadline_s
