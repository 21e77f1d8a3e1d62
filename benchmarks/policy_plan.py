"""The plan with which the policy is tried: gears whose ranges double, cascades whose work halves."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
import numpy as np

from cascadeserve.artefacts import decode_json
from cascadeserve.gear_plan import GearPlan
from planner.profile import Profile
from planner.records import ModelAnswers, SearchRecords
from planner.simulator import Simulator

RECORDS = 4000
GEARS = ("reference", "accurate", "fast", "fastest", "overload")
DEGRADED = len(GEARS) - 1
# work of a row, relative to a row of the fastest gear
_WORK = {"small": 0.5, "medium": 2.0, "large": 8.0}
# each takes half the work of the one before; a row leaves the first stage with probability 1 - threshold
_CASCADES: tuple[tuple[tuple[str, float | None], ...], ...] = (
    (("large", None),),
    (("medium", 0.25), ("large", None)),
    (("small", 0.1875), ("large", None)),
    (("small", 0.25), ("medium", None)),
)
_LARGEST_BATCH = 64


@dataclass(frozen=True)
class Case:
    """A load and the plan for it: `top_per_s` rows per second is where the highest gear ends.

    Requests of `rows` rows arrive as a renewal process with Gamma gaps of this coefficient of variation (1: Poisson).
    `load_frac` is how busy the device is at the upper end of a gear, `slo_services` the SLO as a multiple of what one
    request takes the large model.
    """

    top_per_s: float
    rows: int = 1
    cv: float = 1.0
    load_frac: float = 0.8
    slo_services: float = 20.0


def ends_per_s(case: Case) -> list[float]:
    """Borders of the planned gears in rows per second, from 0."""
    return [0.0, *(case.top_per_s / 2.0**power for power in reversed(range(DEGRADED)))]


def make_simulator(case: Case) -> Simulator:
    """One device with one slot, one family, and batches that take as long as their rows."""
    row_s = case.load_frac / case.top_per_s
    largest = _LARGEST_BATCH * case.rows
    busy_s = {name: [(1, work * row_s), (largest, work * row_s * largest)] for name, work in _WORK.items()}
    ladder = [
        {
            "name": GEARS[index],
            "stages": [
                {"model": model} if threshold is None else {"model": model, "threshold": threshold}
                for model, threshold in stages
            ],
            "reach": [1.0, *(threshold for _, threshold in stages[:-1])],
        }
        for index, stages in enumerate(_CASCADES)
    ]
    ends = [*ends_per_s(case), None]
    gears = [
        {
            "name": name,
            "layout": "all",
            "min_rate_per_s": ends[index],
            "max_rate_per_s": ends[index + 1],
            "ladder_entry": GEARS[min(index, len(_CASCADES) - 1)],
            "degraded": index == DEGRADED,
        }
        for index, name in enumerate(GEARS)
    ]
    family = {
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [1]}],
        "num_classes": 2,
        "models": {name: {"max_batch": largest, "busy_s": points} for name, points in busy_s.items()},
        "reference_model": "large",
        "slo_s": case.slo_services * case.rows * _WORK["large"] * row_s,
        "max_rows_per_request": case.rows,
        # of a renewal process it is the squared coefficient of variation of its gaps
        "dispersion": case.cv**2,
        "ladder": ladder,
        "gears": gears,
    }
    layout = {"name": "all", "instances": {"device": dict.fromkeys(_WORK, 1)}}
    plan = {"schema_version": 1, "name": "policy", "families": {"made": family}, "layouts": [layout]}
    profile = {
        "schema_version": 1,
        "device_kind": "cpu",
        "models": {
            name: {"busy": [{"batch": rows, "concurrency": 1, "busy_s": seconds} for rows, seconds in points]}
            for name, points in busy_s.items()
        },
    }
    return Simulator(
        decode_json(msgspec.json.encode(plan), GearPlan),
        "made",
        _records(),
        {"device": decode_json(msgspec.json.encode(profile), Profile)},
    )


def _records() -> SearchRecords:
    """Certainties spread evenly over 0 to 1, independent between models; every answer is right."""
    rng = np.random.default_rng(0)
    evenly = ((np.arange(RECORDS) + 0.5) / RECORDS).astype(np.float32)
    zeros = np.zeros(RECORDS, np.int64)
    models = {name: ModelAnswers(zeros, rng.permutation(evenly)) for name in _WORK}
    return SearchRecords("made", models, zeros, np.arange(RECORDS))
