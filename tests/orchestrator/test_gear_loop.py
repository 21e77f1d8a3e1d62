from __future__ import annotations

import asyncio
import json
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
    assert set(await gears(rig, 80, 10)) == {"calm"}
    assert len(set((await gears(rig, 300, 10))[10:])) == 1


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


async def two_families(**shares: float) -> Rig:
    """The tiny family under two names, with a gear for up to 100 rows/s each on its share, and one for up to 1000."""
    document = plan_document()
    document["layouts"] = [{"name": "narrow", "instances": {"a": {"small": 1, "large": 1, "third": 1, "tokens": 1}}}]
    first = document["families"]["family"]
    first["gears"] = [gear for gear in first["gears"] if gear["layout"] == "narrow"]
    text = json.dumps(first)
    for old, new in (('"small"', '"third"'), ('"large"', '"tokens"')):
        text = text.replace(old, new)
    document["families"]["other"] = json.loads(text)
    for name, share in shares.items():
        document["families"][name]["share"] = share
    return await make_rig(document, instances=dict.fromkeys(("small", "large", "third", "tokens"), 1))


async def gear_at(rig: Rig, rates_per_s: dict[str, float], duration_s: float) -> tuple[str, float]:
    """Gear of the first family after steady loads that are only counted, and the share that it may use."""
    loop = asyncio.get_running_loop()
    families = rig.orchestrator.dispatcher.families
    for step in range(int(duration_s * 100)):
        for name, rate_per_s in rates_per_s.items():
            for _ in range(int(rate_per_s * (step + 1) / 100) - int(rate_per_s * step / 100)):
                rig.orchestrator.gear_loop.on_arrival(families[name], 1)
        await asyncio.sleep(0.01)
        if step % 10 == 9:
            rig.orchestrator.gear_loop.tick(loop.time())
    registry = rig.orchestrator.metrics.registry
    share = registry.get_sample_value("cascadeserve_available_device_share", {"family": "family"})
    assert share is not None
    return rig.family.gear.name, share


async def test_a_family_uses_what_the_others_leave_and_gives_it_back() -> None:
    rig = await two_families(family=0.4, other=0.6)
    # 200 rows/s on all of the devices are as 80 on four tenths of them
    assert await gear_at(rig, {"family": 200, "other": 0}, 6.0) == ("calm", 1.0)
    # the other needs 0.6 x 90 / 100
    gear, share = await gear_at(rig, {"family": 200, "other": 90}, 6.0)
    assert gear == "busy"
    assert share == pytest.approx(1.0 - 1.1 * 0.54, abs=0.05)
    # and in its next gear 0.6 x 200 / 1000
    gear, share = await gear_at(rig, {"family": 150, "other": 200}, 12.0)
    assert gear == "calm"
    assert share == pytest.approx(1.0 - 1.1 * 0.12, abs=0.05)


async def test_what_is_guaranteed_stays_while_another_family_is_overloaded() -> None:
    rig = await two_families(family=0.4, other=0.6)
    assert await gear_at(rig, {"family": 80, "other": 1500}, 6.0) == ("calm", 0.4)


async def test_without_shares_families_do_not_look_at_each_other() -> None:
    rig = await two_families()
    assert await gear_at(rig, {"family": 80, "other": 1500}, 6.0) == ("calm", 1.0)
    assert await gear_at(rig, {"family": 200, "other": 0}, 6.0) == ("busy", 1.0)


async def test_half_the_endpoints_carry_half_the_rate_in_a_gear() -> None:
    rig = await make_rig(names=("a", "b"))
    assert set((await gears(rig, 70, 3))[-5:]) == {"calm"}
    rig.orchestrator.dispatcher.endpoint_is_down(rig.orchestrator.dispatcher.endpoints[1])
    assert (await gears(rig, 70, 1))[-1] == "busy"
    await rig.probe()
    assert (await gears(rig, 70, 5))[-1] == "calm"


async def test_a_gear_whose_model_is_gone_with_its_endpoint_gives_way_to_one_that_can_be_served() -> None:
    document = plan_document(("a", "b"))
    family = document["families"]["family"]
    family["ladder"].append({"name": "small", "stages": [{"model": "small"}], "reach": [1.0]})
    family["gears"][1]["ladder_entry"] = "small"
    document["layouts"][0]["instances"] = {"a": {"small": 1}, "b": {"large": 1}}
    rig = await make_rig(document, names=("a", "b"))
    rig.fakes["a"].instances, rig.fakes["b"].instances = {"small": 1}, {"large": 1}
    await rig.probe()
    dispatcher = rig.orchestrator.dispatcher
    assert set(await gears(rig, 20, 2)) == {"calm"}
    dispatcher.endpoint_is_down(dispatcher.endpoints[1])
    assert not dispatcher.can_serve(rig.family)
    assert set(await gears(rig, 20, 1)) == {"busy"}
    assert dispatcher.can_serve(rig.family)
    await rig.probe()
    assert (await gears(rig, 20, 5))[-1] == "calm"
