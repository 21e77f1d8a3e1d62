"""What plans are made from, small: two models, a few thousand rows, and a predictor that needs no simulator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from cascadeserve.cluster import Cluster, CpuDevice, Endpoint
from cascadeserve.gear_plan import TensorSpec
from planner.goal import FamilyGoal
from planner.inputs import Inputs
from planner.predict import Prediction
from planner.profile import BusyEntry, ModelProfile, Profile
from planner.records import CalibrationRecords, ModelAnswers, Records, SearchRecords

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cascadeserve.gear_plan import Gear, GearPlan, LadderEntry, PlannedModel
    from planner.predict import Effort

CLUSTER_TOML = """
schema_version = 1
[[endpoints]]
name = "a"
grpc = "127.0.0.1:8001"
http = "127.0.0.1:8000"
metrics = "127.0.0.1:8002"
device = { kind = "cpu", cores = [0] }
"""
GOAL_TOML = "schema_version = 1\n[families.tiny]\nslo_s = 0.1\nmax_epsilon = 0.02\n"
CONFIG = """
name: "{name}"
max_batch_size: 32
input [{{ name: "x" data_type: TYPE_FP32 dims: [3] }}]
output [
  {{ name: "label" data_type: TYPE_INT64 dims: [1] }},
  {{ name: "certainty" data_type: TYPE_FP32 dims: [1] }},
  {{ name: "scores" data_type: TYPE_FP32 dims: [10] }}
]
"""


def records(kind: type[Records] = SearchRecords, rows: int = 6000, seed: int = 0) -> Any:
    """A small model that is right on 85 % and surer where it is, a large one that is right on these and 10 % more."""
    rng = np.random.default_rng(seed)
    fate = rng.random((rows, 1))
    truth = rng.integers(0, 10, rows)
    right = fate < [0.85, 0.95]
    certainty = np.clip(0.4 * right[:, 0] + rng.random(rows) * 0.6, 0, 1).astype(np.float32)
    models = {
        name: ModelAnswers(label=np.where(ok, truth, 10), certainty=certainty)
        for name, ok in zip(("small", "large"), right.T, strict=True)
    }
    return kind(family="tiny", models=models, truth=truth, group_id=np.arange(rows))


def calibration(rows: int = 6000) -> CalibrationRecords:
    """Rows of the same kind for the certificate."""
    found: CalibrationRecords = records(CalibrationRecords, rows, seed=1)
    return found


def profile(**changes: Any) -> Profile:
    """Small: 1 ms a batch and a little per row; large: 10 ms a row."""
    busy = {"small": (0.001, 0.0002), "large": (0.001, 0.01)}
    models = {
        name: ModelProfile(
            busy=tuple(BusyEntry(batch=n, concurrency=1, busy_s=fixed_s + n * row_s) for n in (1, 2, 4, 8, 16, 32))
        )
        for name, (fixed_s, row_s) in busy.items()
    }
    return msgspec.structs.replace(Profile(schema_version=1, device_kind="cpu", models=models), **changes)


def cluster() -> Cluster:
    """One core."""
    device = CpuDevice(cores=(0,))
    endpoint = Endpoint(name="a", grpc="127.0.0.1:8001", http="127.0.0.1:8000", metrics="127.0.0.1:8002", device=device)
    return Cluster(schema_version=1, endpoints=(endpoint,))


def goal(**changes: Any) -> FamilyGoal:
    """100 ms, two points."""
    return msgspec.structs.replace(FamilyGoal(slo_s=0.1, max_epsilon=0.02), **changes)


def inputs(**changes: Any) -> Inputs:
    """All of the above."""
    given: dict[str, Any] = {
        "family": "tiny",
        "goal": goal(),
        "prior": None,
        "profiles": {"cpu": profile()},
        "cluster": cluster(),
        "search": records(),
        "tensors": (TensorSpec(name="x", datatype="FP32", shape=(3,)),),
        "num_classes": 10,
        "largest_batch": {"small": 32, "large": 32},
        "digests": {"goal": "sha256:0"},
    }
    return Inputs(**(given | changes))


class FormulaPredictor:
    """A queue by formula: latency grows with 1 / (1 - load); every call costs `call_s` of the device."""

    def __init__(
        self,
        models: Mapping[str, PlannedModel],
        ladder: Sequence[LadderEntry],
        slo_s: float,
        *,
        call_s: float = 0.0,
        slots: int = 1,
    ) -> None:
        self.models = models
        self.entries = {entry.name: entry for entry in ladder}
        self.slo_s = slo_s
        self.call_s = call_s
        self.slots = slots
        # by layout and model, where that is not all there are
        self.slots_of: dict[str, dict[str, int]] = {}
        self.latching: set[str] = set()
        self.restless: set[str] = set()
        # share of the predicted rate at which the check of a ladder entry fails
        self.fails_from_per_s: dict[str, float] = {}

    @classmethod
    def of(
        cls, plan: GearPlan, family: str, _goal: FamilyGoal, _records: Records, devices: Mapping[str, Profile], **_: Any
    ) -> FormulaPredictor:
        """Like SimulatedGears."""
        planned = plan.families[family]
        slots = sum(each.slots for each in devices.values())
        made = cls(planned.models, planned.ladder, planned.slo_s, slots=slots)
        made.slots_of = {
            layout.name: {
                model: sum(each.slots for name, each in devices.items() if layout.count(name, model, ()))
                for model in planned.models
            }
            for layout in plan.layouts
        }
        return made

    def gear(self, gear: Gear, rate_per_s: float, effort: Effort) -> Prediction:
        """Batches are half way between min_batch and max_batch."""
        entry = self.entries[gear.ladder_entry]
        load, alone_s = 0.0, 0.0
        for stage, share in zip(entry.stages, entry.reach, strict=True):
            trigger, model = gear.triggers[stage.model], self.models[stage.model]
            rows = (trigger.min_batch + trigger.max_batch) // 2
            slots = self.slots_of.get(gear.layout, {}).get(stage.model, self.slots)
            load += rate_per_s * share * (model.batch_busy_s(rows) + self.call_s) / rows / slots
            alone_s += model.batch_busy_s(1) + trigger.max_wait_s
        latency_s = alone_s / (1.0 - load) if load < 1.0 else float("inf")
        keeps = latency_s <= self.slo_s
        if effort.stream == 2:
            keeps = keeps and rate_per_s <= self.fails_from_per_s.get(entry.name, float("inf"))
        return Prediction(rate_per_s, latency_s / 2, latency_s, 1.2 * latency_s, latency_s, load, keeps)

    def share_in_force(self, gears: Sequence[Gear], rate_per_s: float) -> float:
        """All but the restless stay."""
        gear = next(gear for gear in gears if rate_per_s < gear.upper_rate_per_s)
        return 0.5 if gear.ladder_entry in self.restless else 1.0

    def comes_down(self, gears: Sequence[Gear], calm_per_s: float, surge_per_s: float) -> bool:
        """Eager gears that latch hold on to whatever came before."""
        assert surge_per_s > calm_per_s
        return not any(
            gear.ladder_entry in self.latching and any(trigger.max_wait_s for trigger in gear.triggers.values())
            for gear in gears
        )
