"""Small random questions for the planner: up to four models, three endpoints of two kinds, and rates of four sorts.

The seed is all that a question depends on. In about half of them memory binds.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import numpy as np

from cascadeserve.cluster import Cluster, CpuDevice, Endpoint
from cascadeserve.gear_plan import TensorSpec
from planner.goal import FamilyGoal
from planner.inputs import Inputs
from planner.profile import BusyEntry, ModelProfile, Profile, batch_busy_s
from planner.records import ModelAnswers, SearchRecords

if TYPE_CHECKING:
    from collections.abc import Mapping

FAMILY = "small"
_MOST_MODELS, _MOST_ENDPOINTS, _MOST_RATES = 4, 3, 4
_BATCHES = (1, 2, 4, 8)
_KINDS = ("first", "second")


def small_instance(seed: int, *, num_endpoints: int | None = None, num_rows: int = 1500) -> Inputs:
    """All that a plan is made from; `goal.max_rate_per_s` is set in about half of them, and may be out of reach."""
    rng = np.random.default_rng(seed)
    num_models = int(rng.integers(2, _MOST_MODELS + 1))
    records = _records(rng, num_models, num_rows)
    profiles = _profiles(rng, list(records.models))
    num_endpoints = num_endpoints or int(rng.integers(1, _MOST_ENDPOINTS + 1))
    kinds = [_KINDS[int(index)] for index in rng.integers(0, rng.integers(1, 3), num_endpoints)]
    binds = bool(rng.random() < 0.5)  # noqa: PLR2004
    endpoints = tuple(
        _endpoint(rng, number, kind, _memory_bytes(rng, profiles[kind]) if binds else None)
        for number, kind in enumerate(kinds)
    )
    used = {kind: profiles[kind] for kind in _KINDS if kind in kinds}
    goal, prior = _goal(rng, used, kinds, records)
    return Inputs(
        family=FAMILY,
        goal=goal,
        prior=prior,
        profiles=used,
        cluster=Cluster(schema_version=1, endpoints=endpoints),
        search=records,
        tensors=(TensorSpec(name="x", datatype="FP32", shape=(1,)),),
        num_classes=None,
        largest_batch=dict.fromkeys(records.models, _BATCHES[-1]),
        digests={},
    )


def _records(rng: np.random.Generator, num_models: int, num_rows: int) -> SearchRecords:
    """Models that get better with cost; their mistakes go together, and their certainties say something about them."""
    truth, hardness = rng.integers(0, 10, num_rows), rng.uniform(0.8, 2.0) * rng.normal(size=num_rows)
    skill = rng.uniform(0.4, 1.2)
    models = {}
    for index in range(num_models):
        margin = skill - hardness + 0.7 * rng.normal(size=num_rows)
        certainty = 1 / (1 + np.exp(-np.abs(margin) - 0.3 * rng.normal(size=num_rows)))
        label = np.where(margin > 0, truth, (truth + 1) % 10)
        models[f"m{index}"] = ModelAnswers(label, certainty.astype(np.float32))
        skill += rng.uniform(0.3, 1.2)
    return SearchRecords(FAMILY, models, truth, np.arange(num_rows))


def _profiles(rng: np.random.Generator, models: list[str]) -> dict[str, Profile]:
    """Two kinds of device: the second is faster, by another factor for each model. Larger models take more room."""
    row_s, size_bytes = rng.uniform(1e-4, 1e-3), int(rng.integers(50, 200))
    found: dict[str, dict[str, ModelProfile]] = {kind: {} for kind in _KINDS}
    for name in models:
        fixed_s = rng.uniform(0.5, 3.0) * row_s
        factors = {"first": 1.0, "second": rng.uniform(0.2, 0.9)}
        for kind, factor in factors.items():
            busy = tuple(
                BusyEntry(batch=rows, concurrency=1, busy_s=factor * (fixed_s + rows * row_s)) for rows in _BATCHES
            )
            found[kind][name] = ModelProfile(busy=busy, memory_bytes=size_bytes, load_s=1.0)
        row_s *= rng.uniform(1.8, 5.0)
        size_bytes = int(size_bytes * rng.uniform(1.0, 3.0))
    return {kind: Profile(schema_version=1, device_kind=kind, models=there) for kind, there in found.items()}


def _memory_bytes(rng: np.random.Generator, profile: Profile) -> int:
    """Between what the largest model takes and what all take."""
    sizes = [model.memory_bytes or 0 for model in profile.models.values()]
    return int(rng.integers(max(sizes), max(max(sizes) + 1, sum(sizes))))


def _endpoint(rng: np.random.Generator, number: int, kind: str, memory_bytes: int | None) -> Endpoint:
    port = 8000 + 10 * number
    return Endpoint(
        name=f"e{number}",
        http=f"127.0.0.1:{port}",
        grpc=f"127.0.0.1:{port + 1}",
        metrics=f"127.0.0.1:{port + 2}",
        device=CpuDevice(cores=(number,)),
        device_kind=kind,
        memory_bytes=memory_bytes,
        cost_per_hour=round(float(rng.uniform(0.5, 1.5)) * {"first": 1.0, "second": 1.7}[kind], 1),
    )


def _goal(
    rng: np.random.Generator, profiles: Mapping[str, Profile], kinds: list[str], records: SearchRecords
) -> tuple[FamilyGoal, tuple[tuple[float, float], ...]]:
    cheapest, dearest = next(iter(records.models)), list(records.models)[-1]
    slowest_s = max(batch_busy_s(profile.models[dearest], 1, 1) for profile in profiles.values())
    # about as much as there can be
    full = _BATCHES[-1]
    most_per_s = sum(full / batch_busy_s(profiles[kind].models[cheapest], full, 1) for kind in kinds)
    rates = np.sort(most_per_s * rng.uniform(0.02, 0.7, int(rng.integers(1, _MOST_RATES + 1))))
    shares = rng.dirichlet(np.ones(len(rates)))
    right = [float(np.mean(answers.label == records.truth)) for answers in records.models.values()]
    goal = FamilyGoal(
        slo_s=float(slowest_s * rng.uniform(4.0, 30.0)),
        # what can be certified is not the question here
        max_epsilon=1.0,
        min_accuracy=float(min(right) + rng.uniform(-0.05, 0.5) * (max(right) - min(right))),
    )
    if rng.random() < 0.5:  # noqa: PLR2004
        goal = msgspec.structs.replace(goal, max_rate_per_s=float(most_per_s * rng.uniform(0.1, 0.6)))
    return goal, tuple((float(rate), float(share)) for rate, share in zip(rates, shares, strict=True))
