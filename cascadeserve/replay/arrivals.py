"""Arrival processes: when requests are sent, as increasing float64 seconds from 0, before anything is sent.

All of them take their randomness from the generator they are given, so one seed gives one load.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cascadeserve.errors import UsageError
from cascadeserve.replay.trace import Counts, Timestamps, read_trace

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    Times = NDArray[np.float64]


# What one load may be, so that a slip of the keyboard ends in a sentence and not in a full memory.
LONGEST_S = 30 * 86_400.0
MOST_REQUESTS = 20_000_000
# Beyond these a gamma distribution in float64 is only zeros, or only its mean.
_LEAST_CV, _MOST_CV = 1e-6, 1e3


def check_size(duration_s: float, requests: float, *, what: str = "this load") -> None:
    """Refuse a load that lasts too long or has too many requests (or rows) to be drawn.

    Raises:
        UsageError: it does; `what` names the load.

    """
    if not duration_s <= LONGEST_S:
        raise UsageError(
            f"{what} lasts {duration_s:.6g} s, but a load may last at most {LONGEST_S:.0f} s (30 days); "
            "give a shorter duration"
        )
    if not requests <= MOST_REQUESTS:
        raise UsageError(
            f"{what} has about {requests:.3g} requests or rows, but a load may have at most {MOST_REQUESTS:,}; "
            "give a lower rate, a shorter duration or fewer rows per request"
        )


def _check_positive(**values: float) -> None:
    for name, value in values.items():
        if not (np.isfinite(value) and value > 0):
            raise UsageError(f"{name} is {value}; it must be a positive number")


def poisson(rate_per_s: float, duration_s: float, rng: np.random.Generator) -> Times:
    """Poisson process of `rate_per_s` arrivals per second over `duration_s`; a rate of 0 gives none."""
    _check_positive(duration_s=duration_s)
    if rate_per_s < 0 or not np.isfinite(rate_per_s):
        raise UsageError(f"rate_per_s is {rate_per_s}; it must not be negative")
    # Given their number, the arrivals of a Poisson process are independent and uniform.
    return np.sort(rng.random(rng.poisson(rate_per_s * duration_s))) * duration_s


def gamma(rate_per_s: float, cv: float, duration_s: float, rng: np.random.Generator) -> Times:
    """Stationary renewal process with gamma gaps; `cv` is the gaps' coefficient of variation (1: Poisson)."""
    _check_positive(rate_per_s=rate_per_s, cv=cv, duration_s=duration_s)
    if not _LEAST_CV <= cv <= _MOST_CV:
        raise UsageError(f"cv is {cv:g}; it must lie between {_LEAST_CV:g} and {_MOST_CV:g}")
    shape = 1.0 / cv**2
    scale_s = 1.0 / (rate_per_s * shape)
    # The gap that covers time 0 is a length-biased one, cut at a uniform point. Starting with an ordinary gap instead
    # would put about (cv^2 - 1) / 2 arrivals too many at the start.
    first_s = rng.random() * rng.gamma(shape + 1.0, scale_s)
    chunk = int(rate_per_s * duration_s + 100)
    pieces = [np.array([first_s])]
    while pieces[-1][-1] < duration_s:
        pieces.append(pieces[-1][-1] + np.cumsum(rng.gamma(shape, scale_s, chunk)))
        # bursts of a large cv hold far more than the mean
        check_size(duration_s, sum(map(len, pieces)) - chunk)
    times = np.concatenate(pieces)
    within: Times = times[times < duration_s]
    return within


def bursty(
    base_rate_per_s: float,
    burst_rate_per_s: float,
    duration_s: float,
    rng: np.random.Generator,
    *,
    mean_base_s: float,
    mean_burst_s: float,
) -> Times:
    """Markov-modulated Poisson process: two rates, each held for an exponential time of the given mean.

    Its mean rate is the mean of the two rates, weighted with the mean times; see `split_burst_rates`.
    """
    _check_positive(burst_rate_per_s=burst_rate_per_s, mean_base_s=mean_base_s, mean_burst_s=mean_burst_s)
    _check_positive(duration_s=duration_s)
    bursting = rng.random() < mean_burst_s / (mean_base_s + mean_burst_s)
    start_s = 0.0
    pieces = []
    while start_s < duration_s:
        dwell_s = rng.exponential(mean_burst_s if bursting else mean_base_s)
        held_s = min(dwell_s, duration_s - start_s)
        if held_s > 0:
            pieces.append(start_s + poisson(burst_rate_per_s if bursting else base_rate_per_s, held_s, rng))
        start_s += dwell_s
        bursting = not bursting
    return np.concatenate(pieces)


def split_burst_rates(
    mean_rate_per_s: float, burst_factor: float, *, mean_base_s: float, mean_burst_s: float
) -> tuple[float, float]:
    """Find the base rate, and the burst rate `burst_factor` times as high, that give `bursty` this mean rate."""
    _check_positive(mean_rate_per_s=mean_rate_per_s, burst_factor=burst_factor)
    base = mean_rate_per_s * (mean_base_s + mean_burst_s) / (mean_base_s + burst_factor * mean_burst_s)
    return base, base * burst_factor


def steps(profile: Sequence[tuple[float, float]], rng: np.random.Generator) -> Times:
    """Poisson arrivals of a stepwise constant rate; `profile` holds (duration_s, rate_per_s) in order."""
    if not profile:
        raise UsageError("the steps are empty; give at least one duration and rate")
    starts_s = np.cumsum([0.0, *(duration_s for duration_s, _ in profile)])
    return np.concatenate(
        [
            start_s + poisson(rate_per_s, duration_s, rng)
            for start_s, (duration_s, rate_per_s) in zip(starts_s, profile, strict=False)
        ]
    )


def _resample(times_s: Times, wanted: int, rng: np.random.Generator) -> Times:
    """Thin or multiply arrivals to `wanted`, keeping their shape in time."""
    count = len(times_s)
    if wanted <= count:
        return times_s[np.sort(rng.choice(count, wanted, replace=False))]
    copies, extra = divmod(wanted, count)
    source = np.concatenate([np.tile(np.arange(count), copies), rng.choice(count, extra, replace=False)])
    # A copy falls anywhere before the next arrival: never together with its original, never out of its burst.
    gap_s = np.append(np.diff(times_s), 0.0)[source]
    shift_s = rng.random(wanted) * gap_s
    shift_s[:count] = 0.0
    return np.sort(times_s[source] + shift_s)


def _scaled_timestamps(
    trace: Timestamps, duration_s: float | None, rate_per_s: float | None, rng: np.random.Generator, what: str
) -> Times:
    times_s = trace.times_s
    span_s = float(times_s[-1])
    if duration_s is None and rate_per_s is not None:
        duration_s = len(times_s) / rate_per_s
        rate_per_s = None
    check_size(span_s if duration_s is None else duration_s, len(times_s), what=what)
    if duration_s is not None:
        if span_s == 0.0:
            raise UsageError("all timestamps of the trace are equal, so it cannot be stretched over time")
        times_s = times_s * (duration_s / span_s)
        if rate_per_s is not None:
            check_size(duration_s, rate_per_s * duration_s, what=what)
            times_s = _resample(times_s, round(rate_per_s * duration_s), rng)
    return times_s


def _scaled_counts(
    trace: Counts, duration_s: float | None, rate_per_s: float | None, rng: np.random.Generator, what: str
) -> Times:
    counts, requests = trace.counts, float(trace.counts.sum())
    span_s = float(trace.starts_s[-1]) + trace.period_s
    time_factor = 1.0
    if duration_s is not None:
        time_factor = duration_s / span_s
        if rate_per_s is not None:
            check_size(duration_s, rate_per_s * duration_s, what=what)
            counts = rng.poisson(counts * (rate_per_s * duration_s / requests))
    elif rate_per_s is not None:
        time_factor = requests / rate_per_s / span_s
    check_size(duration_s or span_s * time_factor, float(counts.sum()), what=what)
    starts_s = np.repeat(trace.starts_s, counts)
    return np.sort(starts_s + rng.random(len(starts_s)) * trace.period_s) * time_factor


def from_trace(
    path: Path,
    *,
    rng: np.random.Generator,
    duration_s: float | None = None,
    rate_per_s: float | None = None,
    column: str | None = None,
    start: str | None = None,
    end: str | None = None,
) -> Times:
    """Arrivals of a CSV trace, fitted to a duration in seconds and/or a mean rate per second.

    Only `duration_s`: every arrival is kept, time is scaled. Only `rate_per_s`: likewise, to that mean rate. Both: time
    is scaled to the duration, arrivals are thinned or multiplied to the rate. Neither: as recorded. `column` names the
    column of the times (or gives its index from 0); `start` and `end` cut a window out of the trace, in the trace's
    own way of writing times. Counts per minute become Poisson arrivals inside their minute.

    Raises:
        InvalidArtefact: naming path and row.
        UsageError: the load that comes of it is too large, see `check_size`.

    """
    for name, value in (("duration_s", duration_s), ("rate_per_s", rate_per_s)):
        if value is not None:
            _check_positive(**{name: value})
    trace = read_trace(path, column=column, start=start, end=end)
    what = f"the load of trace {path}"
    if isinstance(trace, Counts):
        return _scaled_counts(trace, duration_s, rate_per_s, rng, what)
    return _scaled_timestamps(trace, duration_s, rate_per_s, rng, what)
