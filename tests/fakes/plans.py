"""Plans, profiles and records made to measure, for the simulator."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from cascadeserve.artefacts import decode_json
from cascadeserve.gear_plan import GearPlan
from planner.profile import Profile
from planner.records import ModelAnswers, SearchRecords

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Points = list[list[float]]


def make_plan(
    busy_s: Mapping[str, Points],
    chain: Sequence[tuple[str, float | None]],
    *,
    reach: Sequence[float] | None = None,
    triggers: dict[str, dict[str, float]] | None = None,
    instances: dict[str, dict[str, int]] | None = None,
    slo_s: float = 1.0,
    dispersion: float = 1.0,
) -> GearPlan:
    """One cascade (model, threshold) in one gear for all rates, one instance of each model on endpoint `a`."""
    largest = {name: int(points[-1][0]) for name, points in busy_s.items()}
    document: dict[str, Any] = {
        "schema_version": 1,
        "name": "made",
        "families": {
            "family": {
                "inputs": [{"name": "x", "datatype": "FP32", "shape": [3]}],
                "num_classes": 3,
                "models": {name: {"max_batch": largest[name], "busy_s": points} for name, points in busy_s.items()},
                "reference_model": chain[-1][0],
                "slo_s": slo_s,
                "max_rows_per_request": 64,
                "dispersion": dispersion,
                "ladder": [
                    {
                        "name": "chain",
                        "stages": [
                            {"model": model} if threshold is None else {"model": model, "threshold": threshold}
                            for model, threshold in chain
                        ],
                        "reach": list(reach or [1.0] * len(chain)),
                    }
                ],
                "gears": [
                    {
                        "name": "only",
                        "layout": "all",
                        "min_rate_per_s": 0.0,
                        "max_rate_per_s": 1e6,
                        "ladder_entry": "chain",
                        "triggers": triggers or {},
                    }
                ],
            }
        },
        "layouts": [{"name": "all", "instances": instances or {"a": dict.fromkeys(busy_s, 1)}}],
    }
    return decode_json(msgspec.json.encode(document), GearPlan)


def make_profile(
    busy_s: Mapping[str, Points], *, slots: int = 1, overhead_s: float = 0.0, front: dict[str, float] | None = None
) -> Profile:
    """What the plan believes, and nothing else."""
    document = {
        "schema_version": 1,
        "device_kind": "cpu",
        "slots": slots,
        "models": {
            name: {
                "busy": [{"batch": int(rows), "concurrency": 1, "busy_s": seconds} for rows, seconds in points],
                "overhead_s": overhead_s,
            }
            for name, points in busy_s.items()
        },
        "front": front,
    }
    return decode_json(msgspec.json.encode(document), Profile)


def make_records(certainty: Mapping[str, Sequence[float]], *, truth: Sequence[int] | None = None) -> SearchRecords:
    """Certainties by model; every model answers 0, which is right unless `truth` says otherwise."""
    rows = len(next(iter(certainty.values())))
    zeros = np.zeros(rows, np.int64)
    models = {name: ModelAnswers(zeros, np.asarray(values, np.float32)) for name, values in certainty.items()}
    right = zeros if truth is None else np.asarray(truth, np.int64)
    return SearchRecords("family", models, right, np.arange(rows))
