"""What a trace says of the load to plan for: how often each rate occurs, and how bursty the requests are.

The **index of dispersion** is the variance of the number of requests in a window over its mean; of a Poisson process
it is 1. Over a whole trace the variance would also hold what the gears are there to follow, the rise and fall of the
load. So windows are compared with their neighbours only: with counts a and b in two windows beside each other the index
is the sum over all such pairs of (a - b)^2, over the sum of a + b. Where the rate of both is the same, (a - b)^2 is
twice the variance on average, and a + b twice the mean. For Poisson arrivals the average of the estimate is exactly 1,
whatever the rate does from pair to pair: given a + b each request is in either window alike, so (a - b)^2 is a + b on
average.

The windows are as long as the shortest the orchestrator takes a rate from, doubled until they hold as many requests, on
average, as it takes to see a change. What moves more slowly than that is load, what is quicker is burstiness. This
assumes that the rate changes little from one window to the next; what it does change is counted as burstiness, so that
the gears come out too wide rather than restless.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cascadeserve.errors import UsageError
from cascadeserve.policy.demand import CHANGE_MIN_REQUESTS, MAX_WINDOW_S, MIN_WINDOW_S
from cascadeserve.replay.arrivals import check_size, from_trace
from cascadeserve.replay.trace import Counts, Timestamps, read_trace
from planner.goal import prior_of_arrivals

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from planner.goal import RatePrior

# fewer pairs of windows say too little
_LEAST_PAIRS = 20


@dataclass(frozen=True)
class TraceFacts:
    """Index of dispersion with its standard error, from pairs of windows of a length, and the rates in rows per second.

    `measured` is the index as it was found; `dispersion` is what to plan for, which is not below 1.
    """

    requests: int
    measured: float
    standard_error: float
    window_s: float
    pairs: int
    prior: RatePrior

    @property
    def dispersion(self) -> float:
        """What to plan for: no gear is narrower than Poisson arrivals need."""
        return max(self.measured, 1.0)

    def sentences(self) -> tuple[str, str]:
        """Both in words, and as they are written in a goal."""
        rates = ", ".join(f"[{rate:.4g}, {share:.3g}]" for rate, share in self.prior)
        measured = (
            f"The trace's {self.requests:,} requests have an index of dispersion of {self.measured:.3g} +- "
            f"{self.standard_error:.2g} (one standard error), from {self.pairs} pairs of windows of "
            f"{self.window_s:g} s, if the rate changes little from one to the next."
        )
        return measured, f"In a goal: dispersion = {self.dispersion:.3g}, rate_prior = [{rates}]"


def trace_facts(path: Path, *, column: str | None, mean_rows: float, seed: int) -> TraceFacts:
    """Read a trace of requests of `mean_rows` rows; `column` and `seed` are for `cascadeserve.replay.arrivals`.

    Raises:
        InvalidArtefact: the trace is missing or wrong.
        UsageError: it is too short for an index of dispersion.

    """
    trace = read_trace(path, column=column)
    if isinstance(trace, Counts):
        # counts by the minute say nothing of what is quicker
        base_s, weights = trace.period_s, trace.counts
        starts_s, length_s = trace.starts_s, float(trace.starts_s[-1]) + trace.period_s
    else:
        base_s, weights = MIN_WINDOW_S, np.ones(len(trace.times_s), np.int64)
        starts_s, length_s = trace.times_s, float(trace.times_s[-1])
    requests = int(weights.sum())
    check_size(length_s, requests, what=f"the load of trace {path}")
    window_s = base_s
    while requests * window_s < CHANGE_MIN_REQUESTS * length_s and 2.0 * window_s <= max(MAX_WINDOW_S, base_s):
        window_s *= 2.0
    counts = np.bincount((starts_s / window_s).astype(np.int64), weights=weights).astype(np.float64)
    # the last window is cut off by the end of the trace
    counts = counts[: int(length_s / window_s)]
    pairs = len(counts) // 2
    if pairs < _LEAST_PAIRS:
        raise UsageError(
            f"trace {path} holds {pairs} pairs of windows of {window_s:g} s, too few for an index of dispersion, which "
            f"takes {_LEAST_PAIRS}; give a longer trace, or state `dispersion` and a rate prior in the goal"
        )
    measured, standard_error = dispersion_index(counts)
    times_s = trace.times_s if isinstance(trace, Timestamps) else from_trace(path, rng=np.random.default_rng(seed))
    return TraceFacts(requests, measured, standard_error, window_s, pairs, prior_of_arrivals(times_s, mean_rows))


def dispersion_index(counts: NDArray[np.float64]) -> tuple[float, float]:
    """(Index of dispersion, its standard error) of the requests in windows [n] one after the other; see the module.

    Pairs do not overlap: the first and second window, the third and fourth, and so on.
    """
    paired = counts[: len(counts) // 2 * 2].reshape(-1, 2)
    squares, sums = np.diff(paired, axis=1)[:, 0] ** 2, paired.sum(axis=1)
    total = float(sums.sum())
    if total == 0.0:
        return 1.0, 0.0
    index = float(squares.sum()) / total
    # of a ratio of sums over independent pairs, whatever the counts are distributed like
    error = float(np.sqrt(np.sum((squares - index * sums) ** 2))) / total
    return index, error
