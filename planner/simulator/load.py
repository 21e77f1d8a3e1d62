"""What is sent to a simulated plan."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cascadeserve.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class Load:
    """Requests: float64 `times_s` [n] rising from 0, int64 `rows` [n], int64 `row_index` [sum of rows] into records.

    float64 `work` [n] is how many rows of the profile one row of a request is, None: each one.
    """

    times_s: NDArray[np.float64]
    rows: NDArray[np.int64]
    row_index: NDArray[np.int64]
    duration_s: float
    work: NDArray[np.float64] | None = None


def draw_load(
    times_s: NDArray[np.float64],
    duration_s: float,
    num_records: int,
    rng: np.random.Generator,
    rows_per_request: tuple[int, int] = (1, 1),
) -> Load:
    """Deal recorded rows to arrivals: a uniform number of rows per request, each row drawn with replacement.

    A row is drawn once for all models, so that models that fail together in the records do so here.

    Raises:
        UsageError: there is no request, the load has no duration, or the times do not rise.

    """
    if not len(times_s):
        raise UsageError("this load holds no request at all; raise rate or duration")
    if not duration_s > 0:
        raise UsageError("all requests of this load come at one moment; give a trace with more than one time")
    if times_s[0] < 0 or np.any(np.diff(times_s) < 0):
        raise UsageError("the times of a load must rise from 0")
    low, high = rows_per_request
    rows = rng.integers(low, high + 1, len(times_s)) if high > low else np.full(len(times_s), low, np.int64)
    return Load(times_s, rows, rng.integers(0, num_records, int(rows.sum())), duration_s)
