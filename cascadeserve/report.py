"""The serving report: one structure that simulator, load generator and orchestrator fill alike."""

from __future__ import annotations

from typing import Literal

from cascadeserve.artefacts import Artefact


class Ledger(Artefact, frozen=True, kw_only=True):
    """What became of every request of a load test; the other six counts add up to `sent` plus `duplicated`.

    refused: an error with a body (503, 504, UNAVAILABLE, DEADLINE_EXCEEDED, CANCELLED by a server that shuts down) or
    a refused connection while draining.
    failed: any other error that was answered (4xx, 500, INTERNAL, ...): a defect of client or server.
    lost: connection reset, or no reply by the deadline + 1 s. duplicated: a second answer to one request, or an
    answer with the id of another one. A request is correct when all its rows are; where the rows carry no labels, every
    answer counts as correct.
    """

    sent: int
    answered_correct: int
    answered_wrong: int
    refused: int
    failed: int
    lost: int
    duplicated: int


class StageShare(Artefact, frozen=True, kw_only=True):
    """How many rows a stage answered, and its share of all answered rows."""

    stage: int
    rows: int
    share: float


class GearSpan(Artefact, frozen=True, kw_only=True):
    """A stretch of time, in seconds from the start of the load, in which answers named one gear."""

    start_s: float
    end_s: float
    gear: str


class ServingReport(Artefact, frozen=True, kw_only=True):
    """Result of one load: latencies in seconds from the scheduled send time, of answered requests."""

    schema_version: Literal[1]
    source: Literal["replay", "simulator", "orchestrator"]
    duration_s: float
    offered_rate_per_s: float
    answered_rate_per_s: float
    p50_s: float | None
    p95_s: float | None
    p99_s: float | None
    slo_s: float | None
    # share of sent requests answered within slo_s; null where no SLO was given
    goodput: float | None
    # share of answered rows whose label is right; null where the rows carry no labels
    accuracy: float | None
    rows_sent: int
    stages: list[StageShare]
    gears: list[GearSpan]
    ledger: Ledger
    # p99 of how late the generator itself sent; a run is void when it exceeds 5 % of the SLO
    generator_lag_p99_s: float
    errors: dict[str, int]
    # answered requests that the server flagged certified=false
    uncertified: int = 0
    # processor time that the generator itself took, from its first to its last event; null: not measured
    generator_cpu_s: float | None = None
    # share of the machine's time, all cores together, that its host gave to others during the run; null: not known
    stolen_frac: float | None = None
    # false: stopped before everything scheduled was sent
    complete: bool = True
