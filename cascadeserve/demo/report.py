"""What the demo found: `demo/report.json`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from msgspec import Meta, field

from cascadeserve.artefacts import Artefact, read_json
from cascadeserve.demo.judging import Probe
from cascadeserve.gear_plan import LadderEntry
from cascadeserve.report import Ledger, ServingReport

if TYPE_CHECKING:
    from pathlib import Path


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
    ledger: Ledger
    lost: int
    duplicated: int
    wall_s: Annotated[dict[str, float], Meta(min_length=1)] = field(default_factory=dict)


class SloPoint(Artefact, frozen=True, kw_only=True):
    """Saving at an SLO, a multiple of the largest model's busy time for one row; low, high where measured often."""

    slo_factor: Annotated[float, Meta(gt=0.0)]
    saving: float
    low: float | None = None
    high: float | None = None


class SloCurve(Artefact, frozen=True, kw_only=True):
    """Saving over SLO: simulated in the demo, measured in tier full."""

    simulated: tuple[SloPoint, ...] = ()
    measured: tuple[SloPoint, ...] = ()


def read_slo_curve(path: Path) -> SloCurve | None:
    """Read the curve that another command left; None if there is none."""
    return read_json(path, SloCurve) if path.exists() else None
