"""Plans for endpoints of several kinds, made with the simulator."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import numpy as np
import pytest

from cascadeserve.artefacts import write_json
from cascadeserve.gear_plan import read_gear_plan
from cascadeserve.replay.arrivals import poisson
from planner.planning import plan_family
from planner.profile import BusyEntry, ModelProfile, Profile
from planner.simulator import Simulator, draw_load
from tests.fakes.planned import cluster, goal, inputs
from tests.fakes.plans import make_plan, make_profile, make_records

if TYPE_CHECKING:
    from pathlib import Path

    from cascadeserve.cluster import Cluster
    from cascadeserve.gear_plan import GearPlan

# the first run compiles the simulator
pytestmark = pytest.mark.timeout(240)

SLOWER = 2.5


def profile(kind: str, factor: float) -> Profile:
    """Batches of 4 and more rows gain little."""
    busy_s = {1: 0.004, 4: 0.008, 16: 0.026, 32: 0.05}
    entries = tuple(BusyEntry(batch=rows, concurrency=1, busy_s=factor * each) for rows, each in busy_s.items())
    models = {name: ModelProfile(busy=entries) for name in ("small", "large")}
    return Profile(schema_version=1, device_kind=kind, models=models)


FAST, SLOW = profile("fast", 1.0), profile("slow", SLOWER)


def of_kinds(**kinds: str) -> Cluster:
    """Endpoints by name, each of a kind."""
    (one,) = cluster().endpoints
    endpoints = tuple(
        msgspec.structs.replace(
            one,
            name=name,
            device_kind=kind,
            grpc=f"127.0.0.1:{index}1",
            http=f"127.0.0.1:{index}2",
            metrics=f"127.0.0.1:{index}3",
        )
        for index, (name, kind) in enumerate(kinds.items(), 1)
    )
    return msgspec.structs.replace(cluster(), endpoints=endpoints)


def plan_for(**kinds: str) -> GearPlan:
    """Plan in which the large model serves alone, from an SLO of 40 batches on the fastest device."""
    profiles = {each.device_kind: each for each in (FAST, SLOW) if each.device_kind in kinds.values()}
    given = inputs(goal=goal(slo_s=0.16), policy="single", profiles=profiles, cluster=of_kinds(**kinds))
    return plan_family(given, None)


def test_a_fast_and_a_slow_endpoint_sustain_about_the_sum_of_both(tmp_path: Path) -> None:
    plans = [plan_for(a="fast"), plan_for(b="slow"), plan_for(a="fast", b="slow")]
    fast, slow, both = (plan.families["tiny"].max_rate_per_s("all") for plan in plans)
    assert slow < 0.6 * fast
    assert 0.95 * (fast + slow) < both < 1.15 * (fast + slow)
    model = plans[2].families["tiny"].models["large"]
    assert model.batch_busy_s(1, "b") == pytest.approx(SLOWER * model.batch_busy_s(1, "a"))
    assert list(model.busy_s_on) == ["b"]
    assert [plan.families["tiny"].models["large"].busy_s_on for plan in plans[:2]] == [{}, {}]
    write_json(tmp_path / "plan.json", plans[2])
    assert read_gear_plan(tmp_path / "plan.json", of_kinds(a="fast", b="slow")) == plans[2]


def test_busy_times_and_ways_are_those_of_each_endpoint() -> None:
    """One row at a time: an endpoint of its own kind takes its own time, and its calls travel as long as its do."""
    points = {"model": [[1, 0.010]]}
    slower = {"model": [[1, 0.030]]}
    records = make_records({"model": [0.5]})
    load = draw_load(np.arange(0.0, 100.0, 0.1), 100.0, 1, np.random.default_rng(0))
    devices = {"a": make_profile(points, overhead_s=0.002), "b": make_profile(slower, overhead_s=0.006)}
    for endpoint, latency_s in (("a", 0.012), ("b", 0.036)):
        plan = make_plan(points, [("model", None)], instances={endpoint: {"model": 1}})
        found = Simulator(plan, "family", records, devices).run(load)
        assert found.latency_s == pytest.approx(latency_s)


def test_slots_share_the_load_whichever_endpoint_has_them() -> None:
    """Four slots beside one: at 80 % of what they do together, each of them is busy for about as long."""
    points = {"model": [[1, 0.01]]}
    plan = make_plan(points, [("model", None)], instances={"a": {"model": 4}, "b": {"model": 1}})
    devices = {"a": make_profile(points, slots=4), "b": make_profile(points)}
    rng = np.random.default_rng(1)
    load = draw_load(poisson(400.0, 60.0, rng), 60.0, 1, rng)
    found = Simulator(plan, "family", make_records({"model": [0.5]}), devices).run(load)
    assert found.busy_s["a"] / 4 == pytest.approx(found.busy_s["b"], rel=0.1)
