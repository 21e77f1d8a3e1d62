"""The result file: strict, so that a reader can rely on every field."""

from __future__ import annotations

from typing import Literal

from cascadeserve.artefacts import Artefact
from cascadeserve.report import Ledger

SystemName = Literal["largest", "cascade"]

WITHOUT_ACCURACY = (
    "Accuracy is not measured here: all weights are random. The share of rows that escalates was fixed by choosing the "
    "threshold as a quantile of the first stage's certainties, so the ratio says what a cascade that escalates this "
    "share gains in rate, not that any given family would escalate this share at equal accuracy."
)


class Machine(Artefact, frozen=True, kw_only=True):
    """What the tools report; null where there is no GPU."""

    device: Literal["gpu", "cpu"]
    gpu: str | None
    gpu_memory_mib: int | None
    driver: str | None
    cpu: str
    cores: int
    python: str
    torch: str
    cuda: str | None
    tritonserver: str
    date: str


class MemberFigures(Artefact, frozen=True, kw_only=True):
    """Size of one model."""

    name: str
    width: int
    blocks: int
    stride: int
    parameters: int
    flop_per_row: float


class LatencyCell(Artefact, frozen=True, kw_only=True):
    """Medians over repeats of one (model, batch, concurrency).

    `batch_interval_s` is elapsed time by number of batches, `triton_compute_s` what Triton counts as computing.
    """

    model: str
    batch: int
    concurrency: int
    latency_p50_s: float
    batch_interval_s: float
    rows_per_s: float
    triton_compute_s: float
    repeats: int
    calls: int


class BusyTime(Artefact, frozen=True, kw_only=True):
    """Busy time of the device for one batch, as (rows, seconds); and the rest of a lone batch-1 call."""

    busy_s: tuple[tuple[int, float], ...]
    batch1_latency_s: float
    overhead_s: float


class CascadeFigures(Artefact, frozen=True, kw_only=True):
    """How the cascade was made; reach is the share of rows that goes on to the last stage."""

    stages: tuple[str, ...]
    threshold: float
    wanted_reach: float
    # on the rows that are sent, which are not those that the threshold was chosen on
    measured_reach: float
    # as the orchestrator's answers named their stage, over all probes
    served_reach: float


class Probe(Artefact, frozen=True, kw_only=True):
    """One load at one rate; `verdict` is `sustained` or the first rule that was broken."""

    rate_per_s: float
    answered_rate_per_s: float
    duration_s: float
    rows_sent: int
    p50_s: float | None
    p95_s: float | None
    p99_s: float | None
    verdict: str
    generator_lag_p99_s: float
    # the load generator was later than 5 % of the SLO
    void: bool
    # processor time of the orchestrator by duration of the load; near 1 (its one core) it limits the rate
    orchestrator_cpu_share: float
    ledger: Ledger
    # rows answered by each stage
    stage_rows: tuple[int, ...]

    @property
    def sustained(self) -> bool:
        """Whether every rule held."""
        return self.verdict == "sustained"


class SystemFigures(Artefact, frozen=True, kw_only=True):
    """One of the two systems behind the orchestrator; rates in rows per second.

    `predicted_rate_per_s` is what the busy times alone would allow. `rates_per_s` has one sustained rate per round;
    `confirmation` is a longer run at (or, if it failed, below) their median.
    """

    predicted_rate_per_s: float
    rates_per_s: tuple[float, ...]
    rate_per_s: float
    confirmation: Probe
    probes: tuple[Probe, ...]


class Ratio(Artefact, frozen=True, kw_only=True):
    """Sustained rate of the cascade by that of the largest model, over interleaved pairs of searches.

    `low` and `high` are the 95 % bootstrap interval of the median; `confirmed` is from the two longer runs, null
    unless both were sustained.
    """

    median: float
    low: float
    high: float
    pairs: tuple[float, ...]
    predicted: float
    confirmed: float | None


class GpuResult(Artefact, frozen=True, kw_only=True):
    """Everything that one run of the benchmark found."""

    schema_version: Literal[1]
    tier: Literal["gpu"]
    name: str
    # true: tiny models and short windows, for trying the script; its figures mean nothing
    quick: bool
    note: str
    machine: Machine
    family: tuple[MemberFigures, ...]
    row_shape: tuple[int, ...]
    rows_per_request: int
    generators: int
    latency: tuple[LatencyCell, ...]
    busy: dict[str, BusyTime]
    slo_s: float
    cascade: CascadeFigures
    systems: dict[SystemName, SystemFigures]
    ratio: Ratio
    # over all loads of a system, searches and confirmation
    ledgers: dict[SystemName, Ledger]
    duration_s: float
