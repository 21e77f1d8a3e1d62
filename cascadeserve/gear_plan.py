"""The gear plan: the one file that the planner writes and the orchestrator reads.

A family's gears tile the rates from 0 to its layout's maximum; above it may lie one gear marked `degraded`. A gear
names a ladder entry (which cascade with which thresholds), batch triggers and load weights: all of it can change
between two batches at no cost. A layout says which models stand with how many instances on which endpoints: changing
it takes Triton seconds.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING, Annotated, Literal

from msgspec import UNSET, Meta, UnsetType, field

from cascadeserve.artefacts import Artefact, read_json
from cascadeserve.errors import InvalidArtefact
from cascadeserve.plan_checks import problems
from cascadeserve.plan_evidence import Expected, Gap, MadeFrom, PlanCertificate, Predicted, Share
from cascadeserve.policy.work import batch_work_s

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping
    from pathlib import Path

    from cascadeserve.cluster import Cluster

NAME_PATTERN = r"\A[A-Za-z0-9_][A-Za-z0-9_.-]*\Z"
MAX_NAME_LENGTH = 128
Name = Annotated[str, Meta(pattern=NAME_PATTERN, max_length=MAX_NAME_LENGTH)]
Seconds = Annotated[float, Meta(ge=0.0)]
# no batch is done in no time, and work is divided by
BusySeconds = Annotated[float, Meta(gt=0.0)]
Count = Annotated[int, Meta(ge=1)]
# (rows, seconds) points with rising rows, interpolated linearly: busy time of a device for one batch
BusyPoints = Annotated[tuple[tuple[Count, BusySeconds], ...], Meta(min_length=1)]
Datatype = Literal[
    "BOOL", "UINT8", "UINT16", "UINT32", "UINT64", "INT8", "INT16", "INT32", "INT64",
    "FP16", "FP32", "FP64", "BF16", "BYTES",
]  # fmt: skip


class TensorSpec(Artefact, frozen=True, kw_only=True):
    """One input of a family, as Triton's model config states it; `shape` leaves out the batch axis, -1 is variable."""

    name: Annotated[str, Meta(min_length=1)]
    datatype: Datatype
    shape: tuple[Annotated[int, Meta(ge=-1)], ...]


class PlannedModel(Artefact, frozen=True, kw_only=True):
    """One model of a family: the version planned for, the largest batch that may be sent, device time per batch.

    With `composed_of` it is a Triton ensemble of these models, by version. They are never called alone; layouts count
    their instances, not the ensemble's, and its busy times are the work of all of them.
    """

    max_batch: Count
    busy_s: BusyPoints
    # by endpoint, where its device is of another kind than the one that `busy_s` is of
    busy_s_on: dict[Name, BusyPoints] = field(default_factory=dict)
    # Triton's: its folder in the repository
    version: Count = 1
    # of what was recorded and profiled, as `triton_config.model_digest` has it; null: a plan made by hand
    digest: str | None = None
    composed_of: dict[Name, Count] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check that the points rise."""
        for points in (self.busy_s, *self.busy_s_on.values()):
            rows = [point[0] for point in points]
            if rows != sorted(set(rows)):
                raise ValueError("busy_s and what is in busy_s_on must list rising batch sizes")

    def batch_busy_s(self, rows: float, endpoint: str | None = None) -> float:
        """Busy device time, in seconds, of one batch of `rows` rows; by `busy_s` where no endpoint is named.

        Rows of another amount of work count as so many plain ones.
        """
        return batch_work_s(self.busy_s_on.get(endpoint or "", self.busy_s), rows)


class Stage(Artefact, frozen=True, kw_only=True):
    """A model and the certainty from which its answer is taken; the last stage has no threshold."""

    model: Name
    threshold: Annotated[float, Meta(ge=-1e9, le=1e9)] | None = None


class LadderEntry(Artefact, frozen=True, kw_only=True):
    """A cascade; `reach[k]` is the share of entry rows that is expected to reach stage k."""

    name: Name
    stages: Annotated[tuple[Stage, ...], Meta(min_length=1)]
    reach: Annotated[tuple[Share, ...], Meta(min_length=1)]
    # share of rows answered rightly, on the search split
    accuracy: Share | None = None
    # certified bound on how much less accurate it is than the reference model; null: not certified
    epsilon: Gap | None = None

    def __post_init__(self) -> None:
        """Check thresholds and reach."""
        if self.stages[-1].threshold is not None:
            raise ValueError("the last stage must have no threshold, since its answer is always taken")
        if any(stage.threshold is None for stage in self.stages[:-1]):
            raise ValueError("every stage but the last needs a threshold")
        if len({stage.model for stage in self.stages}) != len(self.stages):
            raise ValueError("a model may stand in one stage of a cascade only")
        if len(self.reach) != len(self.stages) or self.reach[0] != 1.0:
            raise ValueError("reach needs one share per stage, the first of them 1.0")
        if any(later > earlier for earlier, later in pairwise(self.reach)):
            raise ValueError("reach must not rise from stage to stage")


class Trigger(Artefact, frozen=True, kw_only=True):
    """When a model's queue is due: at `min_batch` rows, or when its oldest row has waited `max_wait_s`."""

    min_batch: Count
    max_batch: Count
    max_wait_s: Seconds

    def __post_init__(self) -> None:
        """Check the order of the two sizes."""
        if self.min_batch > self.max_batch:
            raise ValueError("min_batch must not exceed max_batch")


class Gear(Artefact, frozen=True, kw_only=True):
    """What is in force for rates in [min_rate_per_s, max_rate_per_s) while `layout` stands."""

    name: Name
    layout: Name
    min_rate_per_s: Annotated[float, Meta(ge=0.0)]
    # rows per second; null only for a degraded gear, which takes everything above the layout's maximum
    max_rate_per_s: Annotated[float, Meta(gt=0.0)] | None
    ladder_entry: Name
    triggers: dict[Name, Trigger] = field(default_factory=dict)
    # model -> endpoint -> weight of each of its slots; a model that is not named is spread over all its slots alike
    load: dict[Name, dict[Name, Annotated[float, Meta(ge=0.0)]]] = field(default_factory=dict)
    degraded: bool = False
    predicted: Predicted | None = None

    @property
    def upper_rate_per_s(self) -> float:
        """Upper end of the range in rows per second, infinite for the degraded gear."""
        return math.inf if self.max_rate_per_s is None else self.max_rate_per_s


class Layout(Artefact, frozen=True, kw_only=True):
    """Instances per endpoint and model; a model that is not named there is not loaded there.

    Of an ensemble the composing models are named.
    """

    name: Name
    instances: dict[Name, dict[Name, Count]]

    def count(self, endpoint: str, model: str, composed_of: Collection[str]) -> int:
        """Batches of a model that can run at once on an endpoint: its instances, or the fewest it is composed of."""
        instances = self.instances.get(endpoint, {})
        return min(instances.get(name, 0) for name in composed_of or (model,))


class TransitionStep(Artefact, frozen=True, kw_only=True):
    """Bring a model on an endpoint from `present` to `wanted` instances; 0 is not loaded."""

    endpoint: Name
    model: Name
    present: Annotated[int, Meta(ge=0)]
    wanted: Annotated[int, Meta(ge=0)]


class Transition(Artefact, frozen=True, kw_only=True):
    """How one layout becomes another: steps, one after the other, each within the memory of its endpoint.

    First every family shifts to its gear in `gears`, one of the layout that is left, whose models stand all the while;
    the steps begin when nothing needs the models that go. duration_s is what the loads take together. At no moment is
    there less than least_rate_per_s that a family's gear can carry if it is alone, in rows per second by family.
    """

    from_layout: Name
    to_layout: Name
    gears: dict[Name, Name]
    steps: tuple[TransitionStep, ...]
    duration_s: Seconds
    least_rate_per_s: dict[Name, Annotated[float, Meta(ge=0.0)]] = field(default_factory=dict)

    def states(self, instances: Mapping[str, Mapping[str, int]]) -> list[dict[str, dict[str, int]]]:
        """Instances by endpoint and model after each step, from those before the first."""
        found: list[dict[str, dict[str, int]]] = []
        now = {endpoint: dict(counts) for endpoint, counts in instances.items()}
        for step in self.steps:
            now = {endpoint: dict(counts) for endpoint, counts in now.items()}
            counts = now.setdefault(step.endpoint, {})
            counts[step.model] = step.wanted
            if not step.wanted:
                del counts[step.model]
            found.append(now)
        return found


class PlannedFamily(Artefact, frozen=True, kw_only=True):
    """Everything the orchestrator needs to know of one family."""

    inputs: Annotated[tuple[TensorSpec, ...], Meta(min_length=1)]
    # None where a model of the family returns no scores, so that the family does not either
    num_classes: Count | None
    models: dict[Name, PlannedModel]
    reference_model: Name
    slo_s: Annotated[float, Meta(gt=0.0)]
    max_rows_per_request: Count
    ladder: Annotated[tuple[LadderEntry, ...], Meta(min_length=1)]
    gears: Annotated[tuple[Gear, ...], Meta(min_length=1)]
    # index of dispersion of the request arrivals the plan was made for; 1 = Poisson
    dispersion: Annotated[float, Meta(ge=1.0)] = 1.0
    # share of requests that slo_s is meant for
    percentile: Annotated[float, Meta(gt=0.0, lt=1.0)] = 0.95
    certificate: PlanCertificate | None = None
    expected: Expected | None = None
    # of the time of every device, where families share them: what the gears are planned for, whatever the others do
    share: Annotated[float, Meta(gt=0.0, le=1.0)] | UnsetType = UNSET

    @property
    def guaranteed_share(self) -> float:
        """Share of the device time that the gears are planned for: all of it where the plan says nothing."""
        return 1.0 if isinstance(self.share, UnsetType) else self.share

    def entry(self, name: str) -> LadderEntry:
        """Ladder entry by name."""
        return next(entry for entry in self.ladder if entry.name == name)

    def gears_of(self, layout: str) -> list[Gear]:
        """Gears under a layout by rising rate, the degraded one (if any) last."""
        return sorted((gear for gear in self.gears if gear.layout == layout), key=lambda gear: gear.min_rate_per_s)

    def max_rate_per_s(self, layout: str) -> float:
        """Largest rate, in rows per second, that the layout's gears are planned for."""
        return max((gear.upper_rate_per_s for gear in self.gears_of(layout) if not gear.degraded), default=0.0)


class Switching(Artefact, frozen=True, kw_only=True):
    """How long a lower demand must last, and a layout be wanted, before the orchestrator follows; all in seconds."""

    gear_dwell_s: Seconds = 2.0
    layout_up_after_s: Seconds = 1.0
    layout_down_after_s: Seconds = 10.0
    # a smaller layout is wanted when demand is below this share of its maximum
    layout_down_fraction: Annotated[float, Meta(gt=0.0, lt=1.0)] = 0.8


class Scheduling(Artefact, frozen=True, kw_only=True):
    """Which endpoint a batch leaves for, which waiting row goes first, and which requests are let in."""

    balancer: Literal["round_robin", "join_shortest_queue", "power_of_two", "least_expected_work"] = (
        "least_expected_work"
    )
    order: Literal["fifo", "earliest_deadline", "least_remaining_work"] = "least_remaining_work"
    admission: Literal["none", "predicted_work"] = "predicted_work"


class GearPlan(Artefact, frozen=True, kw_only=True):
    """Families with their ladders and gears, and the layouts of the cluster they share, from small to large."""

    schema_version: Literal[1]
    name: Name
    families: Annotated[dict[Name, PlannedFamily], Meta(min_length=1)]
    layouts: Annotated[tuple[Layout, ...], Meta(min_length=1)]
    # between neighbours; where there is none, what a layout adds is loaded beside what stands
    transitions: tuple[Transition, ...] = ()
    switching: Switching = Switching()
    scheduling: Scheduling = Scheduling()
    made_from: MadeFrom | None = None

    def layout(self, name: str) -> Layout:
        """Layout by name."""
        return next(layout for layout in self.layouts if layout.name == name)

    def transition(self, from_layout: str, to_layout: str) -> Transition | None:
        """How a layout becomes another; None: what it adds is loaded beside what stands."""
        found = (each for each in self.transitions if (each.from_layout, each.to_layout) == (from_layout, to_layout))
        return next(found, None)

    @property
    def ensembles(self) -> dict[str, tuple[str, ...]]:
        """The models that are ensembles, with the models that each is made of."""
        models = (item for family in self.families.values() for item in family.models.items())
        return {name: tuple(model.composed_of) for name, model in models if model.composed_of}

    @property
    def versions(self) -> dict[str, int]:
        """The version planned for of every model that the plan has loaded, those that ensembles are made of too."""
        versions: dict[str, int] = {}
        for family in self.families.values():
            for name, model in family.models.items():
                versions |= model.composed_of | {name: model.version}
        return versions

    def standing(self, layout: Layout) -> dict[str, dict[str, int]]:
        """What is loaded under a layout: instances per endpoint and model, an ensemble as one where its models are."""
        ensembles = self.ensembles
        return {
            endpoint: dict(counts)
            | {name: 1 for name, parts in ensembles.items() if layout.count(endpoint, name, parts)}
            for endpoint, counts in layout.instances.items()
        }


def read_gear_plan(path: Path, cluster: Cluster | None = None) -> GearPlan:
    """Read and check a gear plan, with `cluster` also against the endpoints it names.

    Raises:
        InvalidArtefact: naming the field.

    """
    plan = read_json(path, GearPlan)
    for where, problem in problems(plan, cluster):
        raise InvalidArtefact(problem, path=path, field=where)
    return plan
