"""The load that the command line asks for: what its options mean together."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from cascadeserve.errors import UsageError
from cascadeserve.replay import arrivals

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray

_DEFAULT_TIMEOUT_S = 5.0
# A request's default deadline is this many times the SLO.
_TIMEOUT_PER_SLO = 4.0
# Changes of the rate of a bursty load; more is no burst but a Poisson process in between.
_MOST_CHANGES = 1_000_000
_STEP = re.compile(r"(?P<duration>[0-9.]+)x(?P<rate>[0-9.]+)")
_RANGE = re.compile(r"(?P<low>\d{1,9})(?:-(?P<high>\d{1,9}))?")

Process = Literal["poisson", "gamma", "bursty"]


@dataclass(frozen=True, kw_only=True)
class LoadSettings:
    """How arrivals are made. Rates are in rows per second, times in seconds.

    Exactly one of: `trace` (with `rate_per_s` and `duration_s` to fit it to), `steps`, or rate and duration of a
    `process` (None: poisson). `cv` belongs to gamma, `burst_factor` and the two mean times to bursty.
    """

    rate_per_s: float | None = None
    duration_s: float | None = None
    process: Process | None = None
    cv: float = 4.0
    burst_factor: float = 4.0
    mean_base_s: float = 8.0
    mean_burst_s: float = 2.0
    steps: tuple[tuple[float, float], ...] | None = None
    trace: Path | None = None
    trace_column: str | None = None
    trace_from: str | None = None
    trace_to: str | None = None

    def check(self) -> None:
        """Raise UsageError where the settings contradict each other or leave the load open."""
        for name in ("rate_per_s", "duration_s", "cv", "burst_factor", "mean_base_s", "mean_burst_s"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UsageError(f"{name} is {value}; it must be a positive number")
        if self.trace is not None:
            if self.steps is not None or self.process is not None:
                raise UsageError("--trace cannot stand beside --steps or --process; leave one of them out")
        elif self.steps is not None:
            if self.rate_per_s is not None or self.duration_s is not None or self.process is not None:
                raise UsageError("--steps holds rates and durations itself; leave --rate, --duration, --process out")
        elif self.rate_per_s is None or self.duration_s is None:
            raise UsageError("the load is not given; say --rate and --duration, or --steps, or --trace")

    def draw(self, rows_per_request: float, rng: np.random.Generator) -> tuple[NDArray[np.float64], float]:
        """Draw the times of all requests; return them and the duration of the load, both in seconds.

        `rows_per_request` is the mean, which turns the rates of rows into rates of requests.
        """
        self.check()
        times_s, duration_s = self._draw(rows_per_request, rng)
        arrivals.check_size(duration_s, len(times_s) * rows_per_request)
        return times_s, duration_s

    def _draw(self, rows_per_request: float, rng: np.random.Generator) -> tuple[NDArray[np.float64], float]:
        rate = None if self.rate_per_s is None else self.rate_per_s / rows_per_request
        if self.trace is not None:
            times_s = arrivals.from_trace(
                self.trace,
                rng=rng,
                duration_s=self.duration_s,
                rate_per_s=rate,
                column=self.trace_column,
                start=self.trace_from,
                end=self.trace_to,
            )
            last_s = float(times_s[-1]) if len(times_s) else 0.0
            return times_s, self.duration_s or last_s
        if self.steps is not None:
            profile = [(duration_s, rows_per_s / rows_per_request) for duration_s, rows_per_s in self.steps]
            duration_s = sum(duration_s for duration_s, _ in profile)
            arrivals.check_size(duration_s, sum(duration_s * rate for duration_s, rate in profile))
            return arrivals.steps(profile, rng), duration_s
        assert rate is not None
        assert self.duration_s is not None
        arrivals.check_size(self.duration_s, self.duration_s * rate)
        if self.process == "gamma":
            return arrivals.gamma(rate, self.cv, self.duration_s, rng), self.duration_s
        if self.process == "bursty":
            # each dwell is drawn, whether or not anything arrives in it
            changes = 2.0 * self.duration_s / (self.mean_base_s + self.mean_burst_s)
            if changes > _MOST_CHANGES:
                raise UsageError(
                    f"--base-dwell and --burst-dwell change the rate about {changes:.3g} times here, but at most "
                    f"{_MOST_CHANGES:,} are drawn; give longer ones or a shorter duration"
                )
            dwell_s = {"mean_base_s": self.mean_base_s, "mean_burst_s": self.mean_burst_s}
            base, burst = arrivals.split_burst_rates(rate, self.burst_factor, **dwell_s)
            return arrivals.bursty(base, burst, self.duration_s, rng, **dwell_s), self.duration_s
        return arrivals.poisson(rate, self.duration_s, rng), self.duration_s


def parse_steps(text: str) -> tuple[tuple[float, float], ...]:
    """Read `5x100,5x400`: seconds x rows per second, in order."""
    profile = []
    for part in text.split(","):
        match = _STEP.fullmatch(part.strip())
        try:
            step = (float(match["duration"]), float(match["rate"])) if match else None
        except ValueError:
            step = None
        if step is None or step[0] <= 0:
            raise UsageError(f"step `{part}` is not of the form SECONDSxRATE, such as 5x100")
        profile.append(step)
    return tuple(profile)


def parse_range(text: str) -> tuple[int, int]:
    """Read rows per request: `4` or `1-8`."""
    match = _RANGE.fullmatch(text)
    low, high = (int(match["low"]), int(match["high"] or match["low"])) if match else (0, 0)
    if not 1 <= low <= high:
        raise UsageError(f"rows per request `{text}` is neither a number nor a range such as 1-8")
    return low, high


# Linux is built for at most so many; a longer range would only fill the memory
_LAST_CORE = 8191


def parse_cores(text: str) -> set[int]:
    """Read core numbers: `1`, `0,2` or `2-3`."""
    cores: set[int] = set()
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None:
            raise UsageError(f"cores `{text}`: write core numbers such as 1, 0,2 or 2-3")
        if int(match["high"] or match["low"]) > _LAST_CORE:
            raise UsageError(f"cores `{text}`: core numbers go up to {_LAST_CORE}")
        cores.update(range(int(match["low"]), int(match["high"] or match["low"]) + 1))
    return cores


def choose_timeout(timeout_s: float | None, slo_s: float | None) -> float:
    """Deadline of every request in seconds: as given, else 4 x SLO, else 5 s."""
    for name, value in (("--timeout", timeout_s), ("--slo", slo_s)):
        if value is not None and not 0 < value < math.inf:
            raise UsageError(f"{name} is {value}; it must be a positive number of seconds")
    if timeout_s is not None:
        return timeout_s
    return _DEFAULT_TIMEOUT_S if slo_s is None else _TIMEOUT_PER_SLO * slo_s
