"""A transition of the plan, carried out: one step after the other, in the gear that it names, nothing lost."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import pytest

from cascadeserve.local_triton.working_copy import prepare_working_copy
from tests.fakes.tiny import plan_document, rows, write_repository
from tests.orchestrator.conftest import Rig, cluster, make_rig

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = pytest.mark.looptime

# what an instance takes where an endpoint has room for 3
MEMORY = {"small": 1, "large": 3}


def moving() -> dict[str, Any]:
    """In `narrow` the large model has endpoint `b` for itself, in `broad` the small one stands on both alone."""
    document = plan_document(("a", "b"))
    family = document["families"]["family"]
    family["ladder"].append({"name": "small", "stages": [{"model": "small"}], "reach": [1.0]})
    family["gears"] = [
        {
            "name": name, "layout": layout, "min_rate_per_s": low, "max_rate_per_s": high, "ladder_entry": entry,
            "degraded": high is None,
        }
        for name, layout, low, high, entry in (
            ("calm", "narrow", 0.0, 100.0, "cascade"),
            ("between", "narrow", 100.0, None, "small"),
            ("wide", "broad", 0.0, 4000.0, "small"),
        )
    ]  # fmt: skip
    document["layouts"] = [
        {"name": "narrow", "instances": {"a": {"small": 1}, "b": {"large": 1}}},
        {"name": "broad", "instances": {"a": {"small": 1}, "b": {"small": 1}}},
    ]
    out = {"endpoint": "b", "model": "large", "present": 1, "wanted": 0}
    back = {"endpoint": "b", "model": "small", "present": 0, "wanted": 1}
    turned = [each | {"present": each["wanted"], "wanted": each["present"]} for each in (back, out)]
    document["transitions"] = [
        {"from_layout": "narrow", "to_layout": "broad", "gears": {"family": "between"}, "steps": [out, back]},
        {"from_layout": "broad", "to_layout": "narrow", "gears": {"family": "wide"}, "steps": turned},
    ]
    for each in document["transitions"]:
        each["duration_s"] = 2.0
    document["switching"] = {"layout_up_after_s": 1.0, "layout_down_after_s": 2.0, "gear_dwell_s": 0.5}
    return document


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    source.mkdir()
    return prepare_working_copy(write_repository(source), cluster(("a", "b")), tmp_path / "state")


async def narrow_rig(repository: Path | None) -> Rig:
    rig = await make_rig(moving(), names=("a", "b"), repository=repository, load_s=2.0)
    rig.fakes["a"].instances = {"small": 1}
    rig.fakes["b"].instances = {"large": 1}
    await rig.probe()
    return rig


@contextlib.asynccontextmanager
async def running(rig: Rig, seen: list[tuple[str, dict[str, int]]]) -> AsyncIterator[None]:
    """Run reconciler and gear loop; note what stands on `b` whenever that changes, and the gear then."""

    async def watch() -> None:
        while True:
            standing = dict(rig.fakes["b"].instances)
            if not seen or seen[-1][1] != standing:
                seen.append((rig.family.gear.name, standing))
            await asyncio.sleep(0.01)

    loops = (rig.orchestrator.reconciler.run(), rig.orchestrator.gear_loop.run(), watch())
    tasks = [asyncio.create_task(each) for each in loops]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def send(rig: Rig, rate_per_s: float, duration_s: float) -> list[asyncio.Future[Any]]:
    """Requests of one row, half of which the small model is not certain of."""
    futures = []
    for number in range(int(rate_per_s * duration_s)):
        rig.orchestrator.gear_loop.on_arrival(rig.family, 1)
        row = [rows([number % 10], [0.9 if number % 2 else 0.1])]
        futures.append(rig.orchestrator.dispatcher.submit(rig.family, row, timeout_s=5.0, want_scores=False))
        await asyncio.sleep(1.0 / rate_per_s)
    return futures


async def test_it_goes_there_and_back_in_order_and_answers_everything(repository: Path) -> None:
    rig = await narrow_rig(repository)
    seen: list[tuple[str, dict[str, int]]] = []
    async with running(rig, seen):
        futures = await send(rig, 50, 2.0)
        assert rig.family.gear.name == "calm"
        futures += await send(rig, 500, 8.0)
        assert rig.orchestrator.reconciler.in_force.name == "broad"
        assert rig.family.gear.name == "wide"
        futures += await send(rig, 20, 12.0)
        assert rig.orchestrator.reconciler.in_force.name == "narrow"
        assert rig.family.gear.name == "calm"
        answers = await asyncio.gather(*futures, return_exceptions=True)
    assert not [answer for answer in answers if isinstance(answer, BaseException)]
    assert [standing for _, standing in seen] == [{"large": 1}, {}, {"small": 1}, {}, {"large": 1}]
    assert [gear for gear, _ in seen[1:4]] == ["between", "between", "wide"]
    for _, standing in seen:
        assert sum(MEMORY[model] * count for model, count in standing.items()) <= 3


async def test_what_was_begun_is_brought_to_its_end(repository: Path) -> None:
    rig = await narrow_rig(repository)
    seen: list[tuple[str, dict[str, int]]] = []
    async with running(rig, seen):
        futures = await send(rig, 500, 2.5)
        assert rig.orchestrator.reconciler.transition is not None
        # the load that called for it is gone
        futures += await send(rig, 20, 3.0)
        assert rig.orchestrator.reconciler.in_force.name == "broad"
        await asyncio.gather(*futures)


async def test_a_step_that_fails_is_tried_again_and_the_rest_serves_on(repository: Path) -> None:
    rig = await narrow_rig(repository)
    rig.fakes["b"].fail_loads = "out of memory"
    seen: list[tuple[str, dict[str, int]]] = []
    async with running(rig, seen):
        futures = await send(rig, 500, 6.0)
        assert rig.family.gear.name == "between"
        assert rig.orchestrator.reconciler.in_force.name == "narrow"
        rig.fakes["b"].fail_loads = ""
        futures += await send(rig, 500, 12.0)
        assert rig.orchestrator.reconciler.in_force.name == "broad"
        answers = await asyncio.gather(*futures, return_exceptions=True)
    assert not [answer for answer in answers if isinstance(answer, BaseException)]


async def test_it_waits_for_an_endpoint_that_is_down(repository: Path) -> None:
    rig = await narrow_rig(repository)
    reconciler = rig.orchestrator.reconciler
    reconciler.aim_at(reconciler.plan.layout("broad"))
    rig.orchestrator.dispatcher.endpoints[1].up = False
    reconciler.reconcile()
    await asyncio.sleep(5.0)
    assert rig.fakes["b"].unloads == []
    assert reconciler.in_force.name == "narrow"


async def test_it_does_not_wait_for_an_endpoint_that_it_changes_nothing_on(repository: Path) -> None:
    rig = await narrow_rig(repository)
    rig.fakes["a"].down = True
    await rig.probe()
    reconciler = rig.orchestrator.reconciler
    seen: list[tuple[str, dict[str, int]]] = []
    async with running(rig, seen):
        await asyncio.sleep(6.0)  # for as long it is waited for at the start
        reconciler.aim_at(reconciler.plan.layout("broad"))
        # until the small model stands on b too, there is none
        await asyncio.gather(*await send(rig, 500, 5.0), return_exceptions=True)
        assert reconciler.in_force.name == "broad"
        rig.fakes["a"].instances = {}
        rig.fakes["a"].down = False
        await rig.probe()
        futures = await send(rig, 500, 3.0)
        assert rig.fakes["a"].instances == {"small": 1}
        await asyncio.gather(*futures)
    assert [standing for _, standing in seen] == [{"large": 1}, {}, {"small": 1}]


async def test_without_a_repository_nothing_is_begun() -> None:
    rig = await narrow_rig(None)
    reconciler = rig.orchestrator.reconciler
    reconciler.aim_at(reconciler.plan.layout("broad"))
    assert reconciler.transition is None


async def test_a_restart_in_the_middle_of_it_brings_it_to_its_end(repository: Path) -> None:
    rig = await make_rig(moving(), names=("a", "b"), repository=repository, load_s=2.0)
    rig.fakes["a"].instances = {"small": 1}
    rig.fakes["b"].instances = {}
    await rig.probe()
    reconciler = rig.orchestrator.reconciler
    seen: list[tuple[str, dict[str, int]]] = []
    async with running(rig, seen):
        await asyncio.sleep(0.2)
        futures = await send(rig, 500, 1.0)
        assert reconciler.transition is not None
        assert rig.family.gear.name == "between"
        futures += await send(rig, 500, 3.0)
        assert reconciler.in_force.name == "broad"
        await asyncio.gather(*futures)
    assert [standing for _, standing in seen] == [{}, {"small": 1}]


async def test_after_a_start_the_nearest_layout_is_aimed_at(repository: Path) -> None:
    rig = await make_rig(moving(), names=("a", "b"), repository=repository, load_s=2.0)
    rig.fakes["a"].instances = {"small": 1}
    rig.fakes["b"].instances = {"small": 3}
    await rig.probe()
    seen: list[tuple[str, dict[str, int]]] = []
    async with running(rig, seen):
        await asyncio.sleep(0.2)
        await send(rig, 500, 3.0)
        assert rig.orchestrator.reconciler.in_force.name == "broad"
    assert [standing for _, standing in seen] == [{"small": 3}, {"small": 1}]


async def test_a_server_that_came_back_with_other_models_unloads_them_before_it_loads(repository: Path) -> None:
    rig = await narrow_rig(repository)
    reconciler = rig.orchestrator.reconciler
    seen: list[tuple[str, dict[str, int]]] = []
    async with running(rig, seen):
        await send(rig, 500, 8.0)
        assert reconciler.in_force.name == "broad"
        seen.clear()
        rig.fakes["b"].down = True
        await rig.probe()
        # started with the models of the plan's first layout
        rig.fakes["b"].instances = {"large": 1}
        rig.fakes["b"].down = False
        await rig.probe()
        await send(rig, 500, 5.0)
        assert reconciler.in_force.name == "broad"
    standing = [each for _, each in seen]
    assert standing[-2:] == [{}, {"small": 1}]
    assert {"large": 1, "small": 1} not in standing


async def test_nothing_is_loaded_before_it_is_known_what_stands(repository: Path) -> None:
    rig = await narrow_rig(repository)
    rig.fakes["a"].instances = {}
    rig.fakes["b"].down = True
    await rig.probe()
    async with running(rig, []):
        await asyncio.sleep(4.0)
        assert rig.fakes["a"].loads == []
        # as long as that it is not waited for an endpoint that may be gone for good
        await asyncio.sleep(4.0)
        assert rig.fakes["a"].loads == ["small"]
