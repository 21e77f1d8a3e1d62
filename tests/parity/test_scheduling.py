"""Every balancer x order x admission: orchestrator and simulator do the same, with rows of any amount of work."""

from __future__ import annotations

import dataclasses
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import pytest

from cascadeserve.policy.admission import ADMISSIONS
from cascadeserve.policy.balancing import BALANCERS
from cascadeserve.policy.ordering import ORDERS
from cascadeserve.replay.arrivals import steps
from planner.simulator import Simulator, draw_load
from tests.fakes.plans import make_profile, make_records
from tests.parity.test_simulator import BUSY_S, RECORDS, SLOW_S, WAY_S, make_gears, orchestrate

if TYPE_CHECKING:
    from cascadeserve.gear_plan import GearPlan

pytestmark = [pytest.mark.timeout(240), pytest.mark.looptime(resolution=1e-9)]


@pytest.mark.parametrize(("balancer", "order", "admission"), list(product(BALANCERS, ORDERS, ADMISSIONS)))
async def test_both_schedule_alike(balancer: str, order: str, admission: str) -> None:
    plan = make_gears(two_kinds=True, scheduling={"balancer": balancer, "order": order, "admission": admission})
    await both_fare_alike(plan)


@pytest.mark.parametrize(
    "instances",
    [
        {"a": {"small": 1}, "b": {"large": 1}},
        {"a": {"small": 1, "large": 1}, "b": {"large": 1}},
        {"a": {"small": 1, "large": 1}, "b": {"small": 1}},
    ],
    ids=["apart", "the large one on both", "the small one on both"],
)
async def test_both_schedule_alike_where_endpoints_differ_in_models(instances: dict[str, dict[str, int]]) -> None:
    await both_fare_alike(make_gears(two_kinds=True, instances=instances))


async def both_fare_alike(plan: GearPlan) -> None:
    """A calm stretch, one far beyond what the gears are for, and a calm one, with deadlines of 0.5 to 4 SLOs."""
    rng = np.random.default_rng(12)
    load = draw_load(steps([(0.5, 60), (0.6, 1300), (0.9, 150)], rng), 2.0, RECORDS, rng, (1, 3))
    # eighths, which inputs of 32 bits hold exactly; and some of the least work of all
    load = dataclasses.replace(load, work=np.maximum(np.round(8 * rng.exponential(1.0, len(load.rows))), 1) / 8)
    timeout_s = 0.1 * rng.uniform(0.5, 4.0, len(load.rows))
    certainty = rng.random(RECORDS).astype(np.float32)
    devices = {
        "a": make_profile(BUSY_S, overhead_s=WAY_S),
        "b": make_profile(SLOW_S, overhead_s=WAY_S),
    }
    records = make_records({"small": certainty.tolist(), "large": certainty.tolist()})
    simulated = Simulator(plan, "family", records, devices).run(load, timeout_s=timeout_s)
    latency_s, _, _, timeline = await orchestrate(plan, load, certainty, timeout_s)

    names = [gear.name for gear in plan.families["family"].gears]
    assert [names[gear] for gear in simulated.tick_gear[: len(timeline)]] == timeline
    np.testing.assert_array_equal(np.isnan(simulated.latency_s), np.isnan(latency_s))
    np.testing.assert_allclose(simulated.latency_s, latency_s, atol=1e-6)
    assert 0.0 < np.isnan(latency_s).mean() < 0.95
