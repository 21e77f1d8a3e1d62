"""Two families on one device, planned together: the orchestrator in virtual time keeps what the planner promises."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import pytest

from cascadeserve.policy.gear_switch import TICK_S
from cascadeserve.replay.arrivals import poisson
from orchestrator.app import Orchestrator
from planner.families import FamiliesPlanner
from tests.fakes.planned import records
from tests.fakes.shared_device import SharedDevice
from tests.fakes.two_families import both_inputs, other_records
from tests.orchestrator.conftest import cluster

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cascadeserve.gear_plan import GearPlan

pytestmark = [pytest.mark.timeout(240), pytest.mark.looptime(resolution=1e-9)]

SLO_S = 0.2
PEAK_PER_S = {"tiny": 100.0, "other": 150.0}
# what each of them mostly has
USUAL_PER_S = 25.0
WAY_S = 0.0006


@cache
def plan() -> GearPlan:
    """Single models by rate: the large one is right on 10 % more of the rows, the small one ten times faster."""
    goals = ({"max_rate_per_s": rate, "slo_s": SLO_S, "max_epsilon": 0.2} for rate in PEAK_PER_S.values())
    usual = ((USUAL_PER_S, 1.0),)
    return FamiliesPlanner(both_inputs(*goals, policy="switching", prior=usual)).plan({})


@dataclass
class Served:
    """What became of a family's requests, and what was in force after each tick."""

    latency_s: list[float] = field(default_factory=list)
    gears: list[str] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)

    @property
    def p95_s(self) -> float:
        return float(np.quantile(self.latency_s, 0.95))

    def share_of_time_in(self, gear: str, *, after_s: float) -> float:
        later = self.gears[int(after_s / TICK_S) :]
        return later.count(gear) / len(later)


async def serve(rates_per_s: Mapping[str, float], duration_s: float) -> dict[str, Served]:
    """Send steady loads of single rows to both families; a refused request is infinitely late."""
    loop = asyncio.get_running_loop()
    device = SharedDevice(plan(), "a", way_s=WAY_S)
    orchestrator = Orchestrator(plan, cluster(("a",)), repository=None, backends={"a": device})
    for monitor in orchestrator.monitors.values():
        await monitor.probe()
    start_s = loop.time()
    rng = np.random.default_rng(7)
    certainty = {"tiny": records().models["small"].certainty, "other": other_records().models["little"].certainty}
    served = {name: Served() for name in rates_per_s}
    futures = []

    def arrive(name: str) -> None:
        family = orchestrator.dispatcher.families[name]
        x = np.zeros((1, 3), np.float32)
        x[:, 1] = rng.choice(certainty[name])
        orchestrator.gear_loop.on_arrival(family, 1)
        future = orchestrator.dispatcher.submit(family, [x], timeout_s=4 * SLO_S, want_scores=False)
        came_s = loop.time()
        future.add_done_callback(
            lambda done: served[name].latency_s.append(np.inf if done.exception() else loop.time() - came_s)
        )
        futures.append(future)

    def tick() -> None:
        orchestrator.gear_loop.tick(loop.time())
        for name, each in served.items():
            each.gears.append(orchestrator.dispatcher.families[name].gear.name)
            each.shares.append(metric(orchestrator, name))

    for name, rate_per_s in rates_per_s.items():
        for time_s in poisson(rate_per_s, duration_s, rng).tolist():
            loop.call_at(start_s + time_s, arrive, name)
    for number in range(1, int(duration_s / TICK_S) + 1):
        loop.call_at(start_s + number * TICK_S, tick)
    await asyncio.sleep(duration_s + 1.0)
    await asyncio.gather(*futures, return_exceptions=True)
    await orchestrator.close()
    return served


def metric(orchestrator: Orchestrator, family: str) -> float:
    labels = {"family": family}
    value = orchestrator.metrics.registry.get_sample_value("cascadeserve_available_device_share", labels)
    assert value is not None
    return value


async def test_both_at_their_peak_keep_their_slo() -> None:
    served = await serve(PEAK_PER_S, 8.0)
    for name, each in served.items():
        assert each.p95_s <= SLO_S, name
        assert np.isfinite(each.latency_s).all(), name
        # nothing is left that one of them could take
        guaranteed = plan().families[name].guaranteed_share
        assert np.median(each.shares) <= 1.1 * guaranteed, name


async def test_both_at_the_end_of_what_their_accurate_gears_are_planned_for_keep_their_slo() -> None:
    accurate = {name: family.gears_of("all")[0] for name, family in plan().families.items()}
    served = await serve({name: 0.85 * gear.upper_rate_per_s for name, gear in accurate.items()}, 20.0)
    for name, each in served.items():
        assert each.p95_s <= SLO_S, name
        assert np.isfinite(each.latency_s).all(), name
        assert each.share_of_time_in(accurate[name].name, after_s=5.0) > 0.9, name


@pytest.mark.parametrize(("busy", "quiet"), [("tiny", "other"), ("other", "tiny")])
async def test_while_one_is_quiet_the_other_stays_in_its_accurate_gear_up_to_a_higher_rate(
    busy: str, quiet: str
) -> None:
    accurate, fast, *_ = plan().families[busy].gears_of("all")
    # more than the accurate gear is planned for
    rate_per_s = 1.3 * accurate.upper_rate_per_s
    alone = await serve({busy: rate_per_s, quiet: 1.0}, 8.0)
    assert alone[busy].share_of_time_in(accurate.name, after_s=4.0) == 1.0
    beside = await serve({busy: rate_per_s, quiet: 0.9 * PEAK_PER_S[quiet]}, 8.0)
    assert beside[busy].share_of_time_in(fast.name, after_s=4.0) > 0.9
    for served in (alone, beside):
        assert all(each.p95_s <= SLO_S for each in served.values())
        assert all(np.isfinite(each.latency_s).all() for each in served.values())
