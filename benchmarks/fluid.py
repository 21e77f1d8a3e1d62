"""A predictor that needs no simulator: what a gear sustains follows from linear programs.

It looks at which models stand on which endpoints in the gear's layout, and at the batch sizes of its triggers. The same
question has the same answer, more endpoints or more instances never sustain less, and a rate below one that is kept is
kept. So whatever a planner loses against the best plan with this predictor, it loses by its own choices.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from planner.load_split import capacity_per_s
from planner.placement_inputs import EndpointRoom, ModelLoad, Part
from planner.predict import Prediction

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cascadeserve.gear_plan import Gear, GearPlan, LadderEntry
    from planner.goal import FamilyGoal
    from planner.predict import Effort
    from planner.profile import Profile
    from planner.records import SearchRecords

# capacity and latency at no load depend on that: by endpoint kind, slots and instances of each stage; by stage the
# share of rows and the busy times of its batches
_Question = tuple[object, ...]
_KNOWN: dict[_Question, float] = {}


class FluidPredictor:
    """Latency is that of a row alone on the fastest devices, over the share of the capacity that is left.

    Batches are half way between `min_batch` and `max_batch`. A gear stays in force at its rates, and comes back.
    """

    def __init__(
        self,
        plan: GearPlan,
        family: str,
        goal: FamilyGoal,  # noqa: ARG002 - made like SimulatedGears
        records: SearchRecords,  # noqa: ARG002
        devices: Mapping[str, Profile],
        *,
        seed: int = 0,  # noqa: ARG002
    ) -> None:
        """`plan` has layouts, models and ladder; `devices` is the profile of every endpoint."""
        self._planned = plan.families[family]
        self._entries = {entry.name: entry for entry in self._planned.ladder}
        self._layouts = {layout.name: layout.instances for layout in plan.layouts}
        self._rooms = [
            EndpointRoom(name=name, kind=profile.device_kind, slots=profile.slots) for name, profile in devices.items()
        ]
        self._asked: dict[tuple[str, str, tuple[int, ...]], tuple[float, float]] = {}

    def gear(self, gear: Gear, rate_per_s: float, effort: Effort) -> Prediction:  # noqa: ARG002
        """Predict a gear that stays in force at a steady rate."""
        entry = self._entries[gear.ladder_entry]
        triggers = [gear.triggers[stage.model] for stage in entry.stages]
        rows = tuple((trigger.min_batch + trigger.max_batch) // 2 for trigger in triggers)
        capacity, alone_s = self._figures(entry, rows, gear.layout)
        load = rate_per_s / capacity if capacity else math.inf
        alone_s += sum(trigger.max_wait_s for trigger in triggers)
        latency_s = alone_s / (1.0 - load) if load < 1.0 else math.inf
        keeps = latency_s <= self._planned.slo_s
        return Prediction(rate_per_s, latency_s / 2, latency_s, latency_s, latency_s, load, keeps)

    def share_in_force(self, gears: Sequence[Gear], rate_per_s: float) -> float:  # noqa: ARG002
        """Nothing is restless."""
        return 1.0

    def comes_down(self, gears: Sequence[Gear], calm_per_s: float, surge_per_s: float) -> bool:  # noqa: ARG002
        """Nothing latches."""
        return True

    def _figures(self, entry: LadderEntry, rows: tuple[int, ...], layout: str) -> tuple[float, float]:
        """Capacity in rows per second, and seconds that a batch of each stage takes on the fastest device it is on."""
        key = layout, entry.name, rows
        if key not in self._asked:
            instances = self._layouts[layout]
            batches = list(zip(entry.stages, rows, strict=True))
            fastest_s = [
                min(
                    (
                        self._busy_s(stage.model, num_rows, room)
                        for room in self._rooms
                        if instances.get(room.name, {}).get(stage.model)
                    ),
                    default=math.inf,
                )
                for stage, num_rows in batches
            ]
            self._asked[key] = self._capacity_per_s(entry, rows, layout), sum(fastest_s)
        return self._asked[key]

    def _capacity_per_s(self, entry: LadderEntry, rows: tuple[int, ...], layout: str) -> float:
        instances = self._layouts[layout]
        kinds = {room.kind: room for room in reversed(self._rooms)}
        models = [
            ModelLoad(
                name=stage.model,
                parts=(Part(name=stage.model, memory_bytes=dict.fromkeys(kinds, 0)),),
                row_busy_s={kind: self._busy_s(stage.model, n, room) / n for kind, room in kinds.items()},
                reach=reach,
            )
            for stage, reach, n in zip(entry.stages, entry.reach, rows, strict=True)
        ]
        standing = [
            (room.kind, room.slots, *(instances.get(room.name, {}).get(model.name, 0) for model in models))
            for room in self._rooms
        ]
        # alike endpoints may be exchanged
        question = (
            tuple(sorted(standing)),
            tuple((model.reach, tuple(sorted(model.row_busy_s.items()))) for model in models),
        )
        if question not in _KNOWN:
            _KNOWN[question] = capacity_per_s(instances, self._rooms, models)
        return _KNOWN[question]

    def _busy_s(self, model: str, rows: int, room: EndpointRoom) -> float:
        return self._planned.models[model].batch_busy_s(rows, room.name)
