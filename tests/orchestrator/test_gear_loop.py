from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from tests.fakes.tiny import plan_document, rows
from tests.orchestrator.conftest import Rig, make_rig

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.looptime


async def load(rig: Rig, rate_per_s: float, duration_s: float) -> AsyncIterator[str]:
    """Evenly spaced single-row requests; yields the gear in force after every tick."""
    loop = asyncio.get_running_loop()
    end_s = loop.time() + duration_s
    next_tick_s = loop.time()
    futures = []
    while loop.time() < end_s:
        rig.orchestrator.gear_loop.on_arrival(rig.family, 1)
        futures.append(
            rig.orchestrator.dispatcher.submit(rig.family, [rows([1], [0.9])], timeout_s=1.0, want_scores=False)
        )
        await asyncio.sleep(1.0 / rate_per_s)
        if loop.time() >= next_tick_s:
            next_tick_s += 0.1
            rig.orchestrator.gear_loop.tick(loop.time())
            yield rig.family.gear.name
    await asyncio.gather(*futures, return_exceptions=True)


async def gears(rig: Rig, rate_per_s: float, duration_s: float) -> list[str]:
    return [gear async for gear in load(rig, rate_per_s, duration_s)]


async def test_gear_follows_the_load_up_at_once_and_down_after_the_dwell() -> None:
    rig = await make_rig()
    assert set(await gears(rig, 50, 3)) == {"calm"}
    assert set((await gears(rig, 400, 2))[5:]) == {"busy"}
    after = await gears(rig, 20, 8)
    dwell_ticks = 20
    assert set(after[:dwell_ticks]) == {"busy"}
    assert after[-1] == "calm"
    assert after.index("calm") < 60


async def test_a_surge_is_seen_within_three_ticks() -> None:
    rig = await make_rig()
    await gears(rig, 60, 3)
    assert "busy" in (await gears(rig, 600, 1))[:4]


async def test_steady_load_shifts_nothing() -> None:
    rig = await make_rig(busy_s={"small": 0.004, "large": 0.01})
    assert set(await gears(rig, 80, 20)) == {"calm"}
    assert len(set((await gears(rig, 300, 20))[10:])) == 1


async def test_backlog_that_the_gear_did_not_plan_for_is_demand() -> None:
    rig = await make_rig(busy_s={"small": 2.0})
    dispatcher = rig.orchestrator.dispatcher
    futures = [
        dispatcher.submit(rig.family, [rows([1], [0.9])], timeout_s=10.0, want_scores=False) for _ in range(4000)
    ]
    rig.orchestrator.gear_loop.tick(asyncio.get_running_loop().time())
    assert rig.family.gear.name == "busy"  # though not a single arrival was counted
    for future in futures:
        future.cancel()


async def test_sustained_load_beyond_the_layout_asks_for_the_next_one_and_calm_for_the_former() -> None:
    document = plan_document()
    document["switching"] = {"layout_up_after_s": 1.0, "layout_down_after_s": 3.0, "gear_dwell_s": 0.5}
    rig = await make_rig(document)
    reconciler = rig.orchestrator.reconciler
    await gears(rig, 1500, 0.8)
    assert reconciler.aim.name == "narrow"  # not yet sustained
    await gears(rig, 1500, 1.0)
    assert (reconciler.aim.name, reconciler.in_force.name) == ("broad", "narrow")
    rig.fakes["a"].instances["large"] = 2
    await rig.probe()
    reconciler.reconcile()
    assert reconciler.in_force.name == "broad"
    assert (await gears(rig, 1500, 0.5))[-1] == "wide"
    await gears(rig, 50, 6)
    assert reconciler.aim.name == "narrow"


async def test_a_layout_that_is_never_reached_is_given_up_when_the_load_is_gone() -> None:
    document = plan_document()
    document["switching"] = {"layout_up_after_s": 0.5}
    rig = await make_rig(document)
    reconciler = rig.orchestrator.reconciler
    await gears(rig, 1500, 1.5)
    assert reconciler.aim.name == "broad"
    await gears(rig, 20, 4)
    assert reconciler.aim.name == "narrow"
