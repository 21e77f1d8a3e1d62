"""What the dispatcher knows of endpoints and families."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from cascadeserve.gear_plan import LadderEntry, Stage
from cascadeserve.gear_work import full_batches_s
from cascadeserve.policy.admission import ADMISSIONS
from cascadeserve.policy.balancing import BALANCERS
from cascadeserve.policy.ordering import ORDERS, rank_s
from cascadeserve.policy.work import planned_work_s, work_from_s
from orchestrator.backend import ModelVersion
from orchestrator.rows import ModelQueue

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import Any

    from numpy.typing import NDArray

    from cascadeserve.gear_plan import Gear, GearPlan, PlannedFamily, Scheduling, TensorSpec
    from orchestrator.backend import Backend
    from orchestrator.rows import Segment, Ticket


# So many batches in a row have to fail, each of other rows that are answered elsewhere.
_SURE_BATCHES = 3


@dataclass(slots=True)
class ErrorRun:
    """Batches of a model that an endpoint answered with errors, since it last answered one."""

    failed: int = 0
    # so often were such rows answered by another endpoint
    refuted: int = 0

    @property
    def is_broken(self) -> bool:
        """Whether it is the endpoint that is wrong, and not the rows."""
        return self.refuted >= _SURE_BATCHES


@dataclass(frozen=True, slots=True)
class KnownRow:
    """One row that a model has answered; each input has the shape [1, ...]."""

    specs: Sequence[TensorSpec]
    inputs: Sequence[NDArray[Any]]


class Load(Protocol):
    """What takes a slot of an endpoint."""

    @property
    def occupied(self) -> Sequence[ModelVersion]:
        """The model, and those that it is composed of."""

    @property
    def work_s(self) -> float:
        """Device-seconds it is expected to take."""


@dataclass(slots=True)
class EndpointState:
    """One endpoint: whether it is up, what stands there, what is in flight."""

    name: str
    backend: Backend
    slots: int
    # its slots as a share of the most that any endpoint has: what its load weights are multiplied by
    slots_frac: float = 1.0
    up: bool = False
    # counts how often it came up
    generation: int = 0
    # what Triton reported last
    instances: dict[ModelVersion, int] = field(default_factory=dict)
    # counts begun and ended changes of instances: what was read across one of them is stale
    changes: int = 0
    # how often each model, by name, was loaded there by us
    loads: Counter[str] = field(default_factory=Counter)
    # what is about to be unloaded: nothing new is sent to it
    leaving: set[ModelVersion] = field(default_factory=set)
    # names of models whose Python process has ended there: nothing is sent to them, or to what is made of them
    dead: set[str] = field(default_factory=set)
    # batches that failed since the model last answered one there
    error_runs: dict[ModelVersion, ErrorRun] = field(default_factory=dict)
    # what answers errors only or hangs: nothing is sent to it until it answers a row that others do, once one is known
    failing: dict[ModelVersion, KnownRow | None] = field(default_factory=dict)
    # whether rows that may have crashed a server are tried there, one at a time: nothing else is sent to it
    reserved: bool = False
    # what may be used there, with the largest number of batches in flight (None: the slots decide)
    hosted: dict[ModelVersion, int | None] = field(default_factory=dict)
    in_flight: int = 0
    # of ensembles and also of each model that they are made of
    in_flight_by_model: dict[ModelVersion, int] = field(default_factory=dict)
    # batches that came back, whatever the answer was
    answers: int = 0
    answers_by_model: dict[ModelVersion, int] = field(default_factory=dict)
    # device-seconds sent and not yet answered
    work_s: float = 0.0
    # device-seconds sent since any endpoint last came up: equals are told apart by it
    sent_s: float = 0.0

    def versions_of(self, name: str) -> set[int]:
        """Versions of a model that have instances."""
        return {model.version for model in self.instances if model.name == name}

    def hosts(self, model: ModelVersion) -> bool:
        """Whether the model can be sent there at all."""
        return self.up and model in self.hosted

    def has_room(self, occupied: Sequence[ModelVersion]) -> bool:
        """Whether a batch may leave for it now that occupies a model and the parts it is made of.

        Slots + 1 batches are kept in flight.
        """
        if self.reserved or not self.hosts(occupied[0]) or self.in_flight > self.slots:
            return False
        for model in occupied:
            limit = self.hosted.get(model)
            if limit is not None and self.in_flight_by_model.get(model, 0) >= limit:
                return False
        return True

    def depart(self, batch: Load) -> None:
        """Count a batch, or what counts as one, that leaves for this endpoint."""
        self.in_flight += 1
        for model in batch.occupied:
            self.in_flight_by_model[model] = self.in_flight_by_model.get(model, 0) + 1
        self.work_s += batch.work_s
        self.sent_s += batch.work_s

    def arrive(self, batch: Load) -> None:
        """Count its answer, whatever it was."""
        self.in_flight -= 1
        self.answers += 1
        for model in batch.occupied:
            self.in_flight_by_model[model] -= 1
            self.answers_by_model[model] = self.answers_by_model.get(model, 0) + 1
        # exactly 0 when idle: rounding left over would break ties between endpoints
        self.work_s = self.work_s - batch.work_s if self.in_flight else 0.0


def covering_rate(upper_per_s: Sequence[float], demand_per_s: float) -> int:
    """Index of the first of the gears' upper rates that a demand is below; the last if none."""
    covering = (index for index, upper in enumerate(upper_per_s) if demand_per_s < upper)
    return next(covering, len(upper_per_s) - 1)


@dataclass(slots=True, eq=False)
class FamilyState:
    """A family under one plan: the gear it is in, and its rows that wait.

    When another plan comes into force, this one keeps the rows that it has until they are answered.
    """

    name: str
    plan: PlannedFamily
    gear: Gear
    entry: LadderEntry
    plan_name: str
    # device-seconds of the largest batch, by gear and model
    full_batches_s: Mapping[str, Mapping[str, float]]
    scheduling: Scheduling
    queues: dict[str, FamilyQueue] = field(init=False)
    # by endpoint and model: the load of it that was last asked the probe rows of the certificate, see `ProbeRows`
    probed: dict[tuple[str, str], tuple[int, int]] = field(init=False, default_factory=dict)
    # where a model answers them otherwise than recorded: the certificate is void while there are any
    mismatches: set[tuple[str, str]] = field(init=False, default_factory=set)
    # `scheduling` as the numbers of the policy
    balancer: int = field(init=False)
    order: int = field(init=False)
    admission: int = field(init=False)
    # see `work_from_s`
    _onward_work_s: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        """Nothing waits."""
        self.balancer = BALANCERS.index(self.scheduling.balancer)
        self.order = ORDERS.index(self.scheduling.order)
        self.admission = ADMISSIONS.index(self.scheduling.admission)
        self._onward_work_s = self._onward_works_s()
        self.queues = {model: FamilyQueue(family=self, occupied=self._occupied(model)) for model in self.plan.models}

    @classmethod
    def in_gear_for(
        cls, demand_per_s: float, name: str, plan: GearPlan, layout: str, slots: Mapping[str, int]
    ) -> FamilyState:
        """State at first of a family of a plan: the gear for a demand under a layout; `slots` is by endpoint."""
        family = plan.families[name]
        gears = family.gears_of(layout)
        gear = gears[covering_rate([each.upper_rate_per_s for each in gears], demand_per_s)]
        full_s = full_batches_s(plan, family, slots)
        return cls(name, family, gear, family.entry(gear.ladder_entry), plan.name, full_s, plan.scheduling)

    @property
    def entry_model(self) -> str:
        """Model at which new rows wait."""
        return self.entry.stages[0].model

    def served(self, model: str) -> ModelVersion:
        """The version of a model that this plan is for."""
        return ModelVersion(model, self.plan.models[model].version)

    def _occupied(self, model: str) -> tuple[ModelVersion, ...]:
        parts = self.plan.models[model].composed_of
        return self.served(model), *(ModelVersion(part, version) for part, version in parts.items())

    @property
    def has_faster_gear(self) -> bool:
        """Whether a gear of the plan is for higher rates than the one in force."""
        return self.gear.upper_rate_per_s < max(gear.upper_rate_per_s for gear in self.plan.gears)

    @property
    def reference_alone(self) -> LadderEntry:
        """The reference model as a cascade of its own, which loses nothing against itself."""
        stages = (Stage(model=self.plan.reference_model),)
        return LadderEntry(name="reference alone", stages=stages, reach=(1.0,), epsilon=0.0)

    def in_gear(self) -> set[ModelVersion]:
        """What the gear in force sends rows to."""
        return {self.served(stage.model) for stage in self.entry.stages}

    def waiting_rows(self) -> int:
        """Rows in all its queues whose request is not answered yet."""
        for queue in self.queues.values():
            queue.drop_done()
        return sum(queue.rows for queue in self.queues.values())

    def shift(self, gear: Gear) -> None:
        """Put a gear in force."""
        self.gear = gear
        self.entry = self.plan.entry(gear.ladder_entry)
        self._onward_work_s = self._onward_works_s()

    def trigger(self, model: str) -> tuple[int, int, float]:
        """(min_batch, max_batch, max_wait_s) of a model in this gear; a model without one drains at once."""
        trigger = self.gear.triggers.get(model)
        if trigger is None:
            return 1, self.plan.models[model].max_batch, 0.0
        return trigger.min_batch, trigger.max_batch, trigger.max_wait_s

    def full_batch_s(self, model: str) -> float:
        """Device-seconds of a model's largest batch in this gear, mean over its endpoints."""
        return self.full_batches_s[self.gear.name][model]

    def row_work_s(self, model: str) -> float:
        """Device-seconds per row of a model at its largest batch in this gear."""
        _, max_batch, _ = self.trigger(model)
        return self.full_batch_s(model) / max_batch

    def work_from_s(self, model: str) -> float:
        """Device-seconds that a row waiting for `model` takes from there on, expected under this gear."""
        return self._onward_work_s[model]

    def work_at_s(self, model: str, share: Callable[[ModelVersion], float]) -> float:
        """The same of some endpoints only, which do a `share` of a model's work."""
        names = [stage.model for stage in self.entry.stages]
        if model not in names:
            return self.row_work_s(model) * share(self.served(model))
        works_s = [self.row_work_s(name) * share(self.served(name)) for name in names]
        return work_from_s(self.entry.reach, works_s, names.index(model))

    @property
    def work_per_row_s(self) -> float:
        """Device-seconds of one entry row through the cascade in force."""
        return self._onward_work_s[self.entry.stages[0].model]

    def planned_work_s(self, rate_per_s: float, slots: float) -> float:
        """Device-seconds that wait in normal batching at this rate, on `slots` slots."""
        triggers = [self.trigger(stage.model) for stage in self.entry.stages]
        return planned_work_s(
            rate_per_s,
            self.entry.reach,
            self._row_works_s(),
            [self.full_batch_s(stage.model) for stage in self.entry.stages],
            [min_batch for min_batch, _, _ in triggers],
            [max_wait_s for _, _, max_wait_s in triggers],
            slots,
            self.plan.slo_s,
        )

    def _onward_works_s(self) -> dict[str, float]:
        works_s = {model: self.row_work_s(model) for model in self.plan.models}
        for position, stage in enumerate(self.entry.stages):
            works_s[stage.model] = work_from_s(self.entry.reach, self._row_works_s(), position)
        return works_s

    def _row_works_s(self) -> list[float]:
        return [self.row_work_s(stage.model) for stage in self.entry.stages]


@dataclass(slots=True, eq=False)
class FamilyQueue(ModelQueue):
    """Rows of a family that wait for one of its models."""

    family: FamilyState = field(kw_only=True)
    # the model, and those that it is composed of
    occupied: tuple[ModelVersion, ...] = field(kw_only=True)

    @property
    def model(self) -> ModelVersion:
        """What its batches are sent to."""
        return self.occupied[0]

    def rank_s(self, ticket: Ticket) -> float:
        """Rank of rows of a request that begin to wait here now."""
        family, model = self.family, self.model.name
        # asked alone, the reference model does all of its work
        row_s = family.row_work_s(model) if ticket.options.reference else family.work_from_s(family.entry_model)
        work_s = ticket.rows * ticket.work_per_row * row_s
        rank = rank_s(family.order, ticket.arrived_s, ticket.deadline_s, work_s, family.plan.slo_s)
        return rank + ticket.handicap_s

    def add(self, segment: Segment) -> None:
        """Put a segment where its rank is."""
        self.push(segment, self.rank_s(segment.ticket))


@dataclass(slots=True, eq=False)
class Batch:
    """Rows on their way to an endpoint."""

    model: ModelVersion
    family: FamilyState
    endpoint: EndpointState
    segments: list[Segment]
    rows: int
    # device-seconds it is expected to take
    work_s: float
    # the endpoint's when it left
    generation: int = 0
    # part of a batch that failed, to be kept apart from other rows
    apart: bool = False
    # one row, and nothing else in flight at the endpoint
    alone: bool = False
    # the endpoint at which these rows have failed before, if they have
    failed_at: EndpointState | None = None

    @property
    def occupied(self) -> tuple[ModelVersion, ...]:
        """The model, and those that it is composed of."""
        return self.family.queues[self.model.name].occupied
