"""What a gear plan says of itself: predictions, the certificate, where it came from. Nothing here steers serving."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, field

from cascadeserve.artefacts import Artefact
from cascadeserve.probes import Probes

Share = Annotated[float, Meta(ge=0.0, le=1.0)]
Gap = Annotated[float, Meta(ge=-1.0, le=1.0)]
Rate = Annotated[float, Meta(ge=0.0)]
Duration = Annotated[float, Meta(ge=0.0)]
RangeEnd = Literal["sustained", "goal", "next_gear", "next_layout"]


class Predicted(Artefact, frozen=True, kw_only=True):
    """What the simulator expects of a gear, at the upper end of its range unless said otherwise."""

    # largest rate, in rows per second, at which the gear alone keeps the SLO without a growing queue
    sustained_rate_per_s: Annotated[float, Meta(gt=0.0)]
    p50_s: Duration
    p95_s: Duration
    p99_s: Duration
    # the family's percentile of latency, at whichever quarter of the range it is longest
    worst_s: Duration
    # share of rows answered rightly, on the search split
    accuracy: Share
    # busy share of the busiest endpoint's slots, or of what the family has of them
    utilisation: Annotated[float, Meta(ge=0.0)]
    # why the range ends where it does: at what the gear sustains less the goal's headroom, at the highest rate of the
    # goal, or sooner because the next gear must be wide enough to stay in force; null: nobody noted it
    ended_by: RangeEnd | None = None


class PlanCertificate(Artefact, frozen=True, kw_only=True):
    """With probability 1 - delta no certified entry is less accurate than the reference model by more than `epsilon`.

    `epsilon` is the largest of the entries in the plan that are certified, so it holds for any mix of loads.
    `weighted_epsilon` holds only for the rates the family is `expected` at.
    """

    epsilon: Gap
    weighted_epsilon: Gap | None = None
    delta: Annotated[float, Meta(gt=0.0, lt=1.0)]
    rows: Annotated[int, Meta(ge=1)]
    method: str
    ladder_digest: str
    records_digest: str
    # on the calibration rows
    reference_accuracy: Share
    assumptions: tuple[str, ...] = ()
    # null: whether the models that stand are those that were recorded is not looked at
    probes: Probes | None = None


class Expected(Artefact, frozen=True, kw_only=True):
    """What the rates that the goal names come to, on the search split; points of (rows per second, share of time)."""

    rate_prior: tuple[tuple[Rate, Share], ...]
    # over rows: what users meet, since peaks carry more rows
    accuracy: Share
    accuracy_over_time: Share
    # gear -> share of rows
    gears: dict[str, Share]


class MadeFrom(Artefact, frozen=True, kw_only=True):
    """Inputs of a plan: the same ones give the same plan, byte by byte. `digests` are `sha256:<hex>` by input."""

    planner_version: str
    policy: str
    seed: int
    digests: dict[str, str] = field(default_factory=dict)
