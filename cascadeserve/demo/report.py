"""What the demo found: `demo/report.json`."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, field

from cascadeserve.artefacts import Artefact
from cascadeserve.demo.judging import Probe
from cascadeserve.gear_plan import LadderEntry
from cascadeserve.report import Ledger, ServingReport


class SystemResult(Artefact, frozen=True, kw_only=True):
    """One system: the highest rate a long run confirmed (0 where none was) and that run's figures.

    limited_by is "generator" where higher rates were given up because the load generator could not keep up with them.
    ledger is of the confirming run, probes are all runs in order. In tier full the rate is the median over the pairs.
    """

    sustained_rows_per_s: float
    p95_s: float | None
    accuracy: float | None
    ledger: Ledger | None
    limited_by: Literal["system", "generator", "nothing"]
    probes: tuple[Probe, ...]


class Pair(Artefact, frozen=True, kw_only=True):
    """Rates confirmed one right after the other, rows per second; saving as in the report."""

    best_single_direct: float
    best_single: float
    cascade: float
    saving: float


class Certificate(Artefact, frozen=True, kw_only=True):
    """The plan's: no certified entry is less accurate than the reference by more than epsilon, at 1 - delta."""

    epsilon: float
    delta: float
    rows: int


class TimelineBins(Artefact, frozen=True, kw_only=True):
    """Per stretch of `bin_s` seconds, by scheduled time: rates in rows per second, latencies in seconds."""

    bin_s: float
    offered_rate_per_s: tuple[float, ...]
    answered_rate_per_s: tuple[float, ...]
    p50_s: tuple[float | None, ...]
    p95_s: tuple[float | None, ...]
    accuracy: tuple[float | None, ...]


class Timeline(Artefact, frozen=True, kw_only=True):
    """The bursty load against the cascade; steps are (seconds, rows per second)."""

    steps: tuple[tuple[float, float], ...]
    report: ServingReport
    bins: TimelineBins
    # share of the answered rows by the model that answered them
    rows_by_model: dict[str, float]


class LadderLine(Artefact, frozen=True, kw_only=True):
    """An entry of the ladder, the range of rates of its gears and whether it only serves overload."""

    entry: LadderEntry
    min_rate_per_s: float
    max_rate_per_s: float | None
    degraded: bool


class SloPoint(Artefact, frozen=True, kw_only=True):
    """Sustained rates, in rows per second, at an SLO that is a multiple of the largest model's busy time for one row.

    single_rows_per_s is of the largest model alone: simulated through the orchestrator, measured the better of the two.
    """

    slo_multiple: Annotated[float, Meta(gt=0.0)]
    slo_s: float
    single_rows_per_s: float
    cascade_rows_per_s: float
    saving: float


class SloGap(Artefact, frozen=True, kw_only=True):
    """A point that the curve has not, and why."""

    slo_multiple: Annotated[float, Meta(gt=0.0)]
    of: Literal["simulated", "measured"]
    reason: str


class SloCurve(Artefact, frozen=True, kw_only=True):
    """Saving over SLO: what plans for every SLO predict, and what was measured.

    Measured are, in tier full, all of them, else only the report's own SLO.
    """

    simulated: tuple[SloPoint, ...]
    measured: tuple[SloPoint, ...]
    left_out: tuple[SloGap, ...]


class DemoReport(Artefact, frozen=True, kw_only=True):
    """All of it. Accuracies are shares; times in seconds; rates in rows per second.

    saving = cascade / best of the two singles; in tier full the median over `pairs`, saving_range the ends of its 95 %
    bootstrap interval. accuracy_drop = reference_accuracy - cascade's accuracy on the same `paired_answers`.
    """

    schema_version: Literal[1] = 1
    tier: Literal["quick", "full"]
    date: str
    host: dict[str, str]
    reference_model: str
    reference_accuracy: float | None
    accuracy_drop: float | None
    paired_answers: int
    slo_s: float
    best_single_direct: SystemResult
    best_single: SystemResult
    cascade: SystemResult
    saving: float
    saving_range: tuple[float, float] | None
    pairs: tuple[Pair, ...]
    certificate: Certificate | None
    plan: str
    ladder: tuple[LadderLine, ...]
    timeline: Timeline
    slo_curve: SloCurve
    ledger: Ledger
    lost: int
    duplicated: int
    wall_s: Annotated[dict[str, float], Meta(min_length=1)] = field(default_factory=dict)
