"""The goal: what a family's plan has to keep, as a person writes it down (`goal.toml`).

    schema_version = 1

    [families.digits]
    slo_per_reference_batch = 10.0     # or slo_s: seconds; or neither, for the least latency at an accuracy
    below_reference = 0.005            # or min_accuracy: what a cascade may lose on the search split
    max_epsilon = 0.01                 # what it may lose at most, certified at 1 - delta
    delta = 0.05

Rates are in rows per second. Everything has a default but the latency, or the accuracy in its place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import msgspec
import numpy as np
from msgspec import Meta

from cascadeserve.artefacts import Artefact, read_toml
from cascadeserve.errors import InvalidArtefact, UsageError
from cascadeserve.gear_plan import Count, Name
from cascadeserve.replay.arrivals import from_trace

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

Positive = Annotated[float, Meta(gt=0.0, le=1e9)]
Rate = Annotated[float, Meta(ge=0.0, le=1e9)]
Share = Annotated[float, Meta(ge=0.0, le=1.0)]
Inner = Annotated[float, Meta(gt=0.0, lt=1.0)]
# (rows per second, share of time) by rising rate; the shares sum to 1
RatePrior = tuple[tuple[float, float], ...]
# what a plan is to have as little of as it can
Least = Literal["latency", "cost"]

# a trace tells how often each rate occurs, counted over windows as long as the orchestrator's
_WINDOW_S = 1.0
_MOST_RATES = 64


class TraceUse(Artefact, frozen=True, kw_only=True):
    """A CSV trace of requests, relative to the goal file, fitted to a mean rate and/or a duration."""

    file: Annotated[str, Meta(min_length=1)]
    rate_per_s: Positive | None = None
    duration_s: Positive | None = None


class Zipf(Artefact, frozen=True, kw_only=True):
    """The rates of the paper's plans: low ones often, high ones seldom.

    The rates up to `max_rate_per_s` (None: the one that the plan has to reach) are cut into `ranges` slices of the same
    width. Slice k, the slowest being the first, is met for a share of time that goes with k ** -exponent; a rate in it
    is taken to be the middle of the slice. Slices of the same width and low rates more frequent are the paper's; the
    exponent and the middle, about which it says nothing, are ours.
    """

    max_rate_per_s: Positive | None = None
    ranges: Annotated[int, Meta(ge=1, le=_MOST_RATES)] = 10
    exponent: Annotated[float, Meta(gt=0.0, le=10.0)] = 1.0


class FamilyGoal(Artefact, frozen=True, kw_only=True):
    """What one family's plan has to keep."""

    # what to have the least of: the latency, at the accuracy that is asked for and without an SLO, which is then found;
    # or the cost of the endpoints that reach the rate within the SLO; None: the latency if there is no SLO, or neither
    minimise: Least | None = None
    # latency that `percentile` of the requests keep; the multiple is of the reference model's busy time for one row, on
    # the fastest kind of device of the cluster
    slo_s: Positive | None = None
    slo_per_reference_batch: Positive | None = None
    percentile: Inner = 0.95
    # accuracy on the search split that every certified entry has: absolute, or what it may be below the reference
    min_accuracy: Share | None = None
    below_reference: Share | None = None
    # entries that may be less accurate than the reference by more, at confidence 1 - delta, serve overload at most
    max_epsilon: Share = 0.01
    delta: Inner = 0.05
    # above the plan's rates: serve the cheapest model without a certificate rather than let requests expire
    uncertified_overload: bool = False
    # requests have that many rows, any number between the two alike; the SLO is promised for these
    min_rows_per_request: Count = 1
    max_rows_per_request: Count = 1
    # index of dispersion of request arrivals: variance over mean of their number, 1 = Poisson
    dispersion: Annotated[float, Meta(ge=1.0, le=1e4)] = 1.0
    # a gear's range ends at this share of the rate that the simulator says it sustains
    headroom: Annotated[float, Meta(gt=0.0, le=1.0)] = 0.9
    # rate that the plan has to reach, and need not exceed; None: as high as it goes
    max_rate_per_s: Positive | None = None
    # how often each rate occurs: (rows per second, weight), or as a trace has it, or the slower the more often
    rate_prior: Annotated[tuple[tuple[Rate, Positive], ...], Meta(min_length=1)] | None = None
    trace: TraceUse | None = None
    zipf: Zipf | None = None
    # where several families share the devices: what a row of this one counts against one of another
    weight: Positive = 1.0

    def __post_init__(self) -> None:
        """Check what contradicts itself."""
        self.check()

    def check(self) -> None:
        """Raise a ValueError where the goal contradicts itself."""
        slos = _num_given(self.slo_s, self.slo_per_reference_batch)
        accuracies = _num_given(self.min_accuracy, self.below_reference)
        priors = _num_given(self.rate_prior, self.trace, self.zipf)
        for wrong, problem in (
            (slos > 1, "give one of slo_s and slo_per_reference_batch, not both"),
            (accuracies > 1, "give one of min_accuracy and below_reference, not both"),
            (
                slos == accuracies == 0,
                "give one of slo_s and slo_per_reference_batch; or an accuracy alone, for the least latency at that",
            ),
            (
                self.minimise == "latency" and slos > 0,
                "to minimise the latency is to find the SLO; give neither slo_s nor slo_per_reference_batch",
            ),
            (
                self.minimise == "cost" and slos == 0,
                "to minimise the cost takes an SLO; give slo_s or slo_per_reference_batch",
            ),
            (priors > 1, "give one of rate_prior, trace and zipf, not several"),
            (
                self.rate_prior is not None and not any(rate for rate, _ in self.rate_prior),
                "rate_prior needs a rate above 0",
            ),
            (
                self.min_rows_per_request > self.max_rows_per_request,
                "min_rows_per_request must not exceed max_rows_per_request",
            ),
        ):
            if wrong:
                raise ValueError(problem)

    @property
    def least(self) -> Least | None:
        """What to have the least of; None: the SLO is given, and the accuracy is to be high."""
        if self.slo_s is None and self.slo_per_reference_batch is None:
            return "latency"
        return self.minimise

    @property
    def mean_rows(self) -> float:
        """Rows of a request, on average."""
        return (self.min_rows_per_request + self.max_rows_per_request) / 2

    def accuracy_floor(self, reference_accuracy: float) -> float:
        """Accuracy on the search split below which no entry is certified; beyond max_epsilon none could be."""
        return max(self._asked(reference_accuracy), reference_accuracy - self.max_epsilon)

    def tightened(self, reference_accuracy: float) -> str | None:
        """Say in a sentence that max_epsilon asks for more than the accuracy of the goal; None: it does not."""
        floor = self.accuracy_floor(reference_accuracy)
        given = _num_given(self.min_accuracy, self.below_reference)
        if not given or floor <= self._asked(reference_accuracy):
            return None
        field = "min_accuracy" if self.min_accuracy is not None else "below_reference"
        return (
            f"max_epsilon = {self.max_epsilon:g} asks for more than {field} = {getattr(self, field):g}: the reference "
            f"model is right on {reference_accuracy:.2%} of the search rows, and what loses no more than that "
            f"against it on at least {floor:.2%}; raise max_epsilon, too, if less will do."
        )

    def _asked(self, reference_accuracy: float) -> float:
        if self.below_reference is not None:
            return reference_accuracy - self.below_reference
        return self.min_accuracy or 0.0


def _num_given(*fields: object) -> int:
    return sum(field is not None for field in fields)


class Goal(Artefact, frozen=True, kw_only=True):
    """Goals by family."""

    schema_version: Literal[1]
    families: Annotated[dict[Name, FamilyGoal], Meta(min_length=1)]


def read_goal(path: Path) -> Goal:
    """Read and check a goal file.

    Raises:
        InvalidArtefact: naming the field.

    """
    try:
        return read_toml(path, Goal)
    except InvalidArtefact as error:
        if not (error.field or "").startswith("$.families[...]"):
            raise
        raise _of_family(error, path) from error


def _of_family(error: InvalidArtefact, path: Path) -> InvalidArtefact:
    """Say the same with the name of the family: it is the first whose goal is wrong."""
    families: dict[str, object] = read_toml(path, dict[str, Any])["families"]
    for name, goal in families.items():
        try:
            msgspec.convert({"schema_version": 1, "families": {name: goal}}, Goal)
        except msgspec.ValidationError:
            field = str(error.field)
            what = str(error).removeprefix(f"{path}: {field}: ")
            return InvalidArtefact(what, path=path, field=field.replace("[...]", f".{name}", 1))
    return error


def choose_families(goal: Goal, path: Path, name: str | None) -> tuple[str, ...]:
    """Names of the families to plan: the one asked for, or all.

    Raises:
        UsageError: it is not in the goal.

    """
    if name is None:
        return tuple(goal.families)
    if name not in goal.families:
        raise UsageError(f"--family: {name!r} is not in {path}; families are {', '.join(goal.families)}")
    return (name,)


def trace_path(goal: FamilyGoal, path: Path) -> Path | None:
    """Where the trace of a goal in file `path` lies, if it has one."""
    return None if goal.trace is None else path.parent / goal.trace.file


def with_least(goal: FamilyGoal, least: Least) -> FamilyGoal:
    """The same goal with something else to minimise.

    Raises:
        UsageError: that contradicts the goal.

    """
    try:
        changed = msgspec.structs.replace(goal, minimise=least)
        changed.check()
    except ValueError as error:
        raise UsageError(f"--minimise {least}: {error}") from error
    return changed


def rate_to_reach_per_s(goal: FamilyGoal, prior: RatePrior | None) -> float:
    """Rate, in rows per second, that a plan with something to minimise has to reach.

    Raises:
        UsageError: the goal names no rate.

    """
    highest = max((rate for rate, _ in prior or ()), default=0.0)
    if goal.max_rate_per_s is None and not highest:
        raise UsageError(
            f"to minimise the {goal.least} takes rates; give max_rate_per_s, rate_prior, zipf or trace in the goal"
        )
    return goal.max_rate_per_s or highest


def rate_prior(goal: FamilyGoal, path: Path, seed: int) -> RatePrior | None:
    """How often each rate occurs, as the goal in file `path` says; None if it says nothing.

    Raises:
        InvalidArtefact: the trace is missing or wrong, or a Zipf prior has no highest rate.

    """
    if goal.rate_prior is not None:
        points = sorted(goal.rate_prior)
        total = sum(weight for _, weight in points)
        return tuple((rate, weight / total) for rate, weight in points)
    if goal.zipf is not None:
        highest = goal.zipf.max_rate_per_s or goal.max_rate_per_s
        if highest is None:
            problem = "needs max_rate_per_s, its own or the one that the plan has to reach"
            raise InvalidArtefact(problem, path=path, field="zipf")
        return _zipf_prior(goal.zipf, highest)
    file = trace_path(goal, path)
    if goal.trace is None or file is None:
        return None
    times_s = from_trace(
        file,
        rng=np.random.default_rng(seed),
        duration_s=goal.trace.duration_s,
        rate_per_s=None if goal.trace.rate_per_s is None else goal.trace.rate_per_s / goal.mean_rows,
    )
    if not len(times_s):
        raise InvalidArtefact("holds no arrival", path=file)
    return prior_of_arrivals(times_s, goal.mean_rows)


def prior_of_arrivals(times_s: NDArray[np.float64], mean_rows: float) -> RatePrior:
    """How often each rate occurs among requests at `times_s` [n], rising from 0, of `mean_rows` rows on average."""
    rates = np.bincount((times_s / _WINDOW_S).astype(np.int64)) * (mean_rows / _WINDOW_S)
    level = (rates * (_MOST_RATES - 1) / rates.max()).astype(np.int64)
    windows, rows = np.bincount(level), np.bincount(level, weights=rates)
    return tuple((float(rows[i] / windows[i]), float(windows[i] / len(rates))) for i in np.flatnonzero(windows))


def _zipf_prior(zipf: Zipf, max_rate_per_s: float) -> RatePrior:
    weights = [k**-zipf.exponent for k in range(1, zipf.ranges + 1)]
    total = sum(weights)
    return tuple(((index + 0.5) * max_rate_per_s / zipf.ranges, weight / total) for index, weight in enumerate(weights))
