"""Another gear plan comes into force while requests are served."""

from __future__ import annotations

import asyncio
import contextlib
import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from cascadeserve.local_triton.working_copy import prepare_working_copy
from orchestrator.wire.tensors import InferRequest, Tensor
from tests.fakes.tiny import VERSION_OFFSET, rows, write_repository, write_version
from tests.orchestrator.conftest import Rig, cluster, make_rig

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from pathlib import Path

pytestmark = pytest.mark.looptime


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A working copy that has taken in version 2 of both models after a server loaded version 1."""
    source = tmp_path / "source"
    source.mkdir()
    prepare_working_copy(write_repository(source), cluster(("a",)), tmp_path / "state")
    for model in ("small", "large"):
        write_version(source, model, 2)
    return prepare_working_copy(source, cluster(("a",)), tmp_path / "state")


@contextlib.asynccontextmanager
async def running(rig: Rig) -> AsyncIterator[None]:
    loops = [asyncio.create_task(each.run()) for each in (rig.orchestrator.reconciler, rig.orchestrator.plan_change)]
    try:
        yield
    finally:
        for task in loops:
            task.cancel()
        await asyncio.gather(*loops, return_exceptions=True)


def next_plan(rig: Rig, **models: int) -> None:
    """The plan file now holds another plan, for these versions."""
    rig.document["name"] = "next"
    for model, version in models.items():
        rig.document["families"]["family"]["models"][model]["version"] = version


async def ask(rig: Rig, certainty: float = 0.9) -> tuple[int, str]:
    """Label and plan of an answer to a row with label 1."""
    request = InferRequest(
        "family", inputs=[Tensor("x", "FP32", rows([1], [certainty]))], parameters={"timeout": 60_000_000}
    )
    response = await rig.orchestrator.data_plane.infer(request)
    return int(response.outputs[0].array[0, 0]), str(response.parameters["plan"])


def metric(rig: Rig, name: str) -> float:
    lines = rig.orchestrator.metrics.render()[0].decode().splitlines()
    return next((float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"{name} ")), 0.0)


def refused(rig: Rig) -> float:
    return metric(rig, 'cascadeserve_plan_changes_total{outcome="refused"}')


async def test_a_new_version_goes_live_and_the_old_one_goes(repository: Path) -> None:
    rig = await make_rig(repository=repository, load_s=2.0)
    fake = rig.fakes["a"]
    fake.repository = repository
    async with running(rig):
        next_plan(rig, small=2)
        rig.orchestrator.plan_change.ask()
        await asyncio.sleep(1.0)
        assert await ask(rig) == (1, "tiny"), "what it needs is still being loaded"
        await asyncio.sleep(1.5)
        assert await ask(rig) == (1 + VERSION_OFFSET, "next")
        assert await ask(rig, 0.1) == (101, "next"), "the large model is the same as before"
        await asyncio.sleep(5.0)
        assert fake.versions == {"small": {2}}
        assert await ask(rig) == (1 + VERSION_OFFSET, "next")
    assert fake.unloads == []
    assert metric(rig, 'cascadeserve_plan_in_force{plan="next"}') == 1.0
    assert metric(rig, 'cascadeserve_plan_in_force{plan="tiny"}') == 0.0
    assert metric(rig, 'cascadeserve_instances{endpoint="a",model="small",version="1"}') == 0.0
    assert metric(rig, 'cascadeserve_instances{endpoint="a",model="small",version="2"}') == 1.0


async def test_rows_under_way_keep_their_plan_to_the_last_stage(repository: Path) -> None:
    rig = await make_rig(repository=repository, busy_s={"small": 3.0, "large": 3.0})
    fake = rig.fakes["a"]
    fake.repository = repository
    async with running(rig):
        before = [asyncio.create_task(ask(rig, 0.1)) for _ in range(3)]
        await asyncio.sleep(0.5)
        next_plan(rig, small=2, large=2)
        rig.orchestrator.plan_change.ask()
        await asyncio.sleep(0.5)
        after = [asyncio.create_task(ask(rig, 0.1)) for _ in range(3)]
        await asyncio.sleep(4.0)
        assert fake.versions["large"] == {1, 2}, "rows of the former plan may still come to it"
        assert await asyncio.gather(*before) == [(101, "tiny")] * 3
        assert await asyncio.gather(*after) == [(101 + VERSION_OFFSET, "next")] * 3
        await asyncio.sleep(5.0)
    assert fake.versions == {"small": {2}, "large": {2}}


async def test_answers_name_the_plan_that_made_them_under_load(repository: Path) -> None:
    rig = await make_rig(repository=repository, busy_s={"small": 0.02, "large": 0.05}, load_s=0.3)
    rig.fakes["a"].repository = repository
    answers: list[asyncio.Task[tuple[int, str]]] = []
    async with running(rig):
        for number in range(300):
            if number == 100:
                next_plan(rig, small=2, large=2)
                rig.orchestrator.plan_change.ask()
            answers.append(asyncio.create_task(ask(rig, 0.1 if number % 3 == 0 else 0.9)))
            await asyncio.sleep(0.01)
        given = await asyncio.gather(*answers)
        await asyncio.sleep(3.0)
    plans = [plan for _, plan in given]
    change = plans.index("next")
    assert 100 < change < 200
    assert plans == ["tiny"] * change + ["next"] * (300 - change)
    for number, (label, plan) in enumerate(given):
        expected = 101 if number % 3 == 0 else 1
        assert label == expected + (VERSION_OFFSET if plan == "next" else 0)
    assert rig.fakes["a"].versions == {"small": {2}, "large": {2}}


def rename_family(document: dict[str, Any]) -> None:
    document["families"]["other"] = document["families"].pop("family")


def change_signature(document: dict[str, Any]) -> None:
    document["families"]["family"]["num_classes"] = 4


BAD_PLANS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "broken": (lambda document: document["families"]["family"].update(slo_s="x"), r"slo_s: Expected"),
    "other families": (rename_family, "its families are other, those in force are family"),
    "other signature": (change_signature, "family 'family' has other inputs or classes"),
    "same name": (lambda document: document.update(name="tiny"), "has the same name, 'tiny'"),
}


@pytest.mark.parametrize("kind", BAD_PLANS)
async def test_a_plan_that_cannot_follow_is_refused_in_one_line(
    repository: Path, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    rig = await make_rig(repository=repository)
    rig.fakes["a"].repository = repository
    change, words = BAD_PLANS[kind]
    next_plan(rig, small=2)
    change(rig.document)
    async with running(rig):
        rig.orchestrator.plan_change.ask()
        for _ in range(50):  # the file is read in a thread
            await asyncio.sleep(0.1)
        assert await ask(rig) == (1, "tiny")
    assert refused(rig) == 1.0
    assert rig.fakes["a"].loads == []
    errors = [record for record in caplog.records if record.levelname == "ERROR"]
    assert len(errors) == 1
    assert errors[0].exc_info in (None, False)
    assert "plan tiny stays in force" in errors[0].message
    assert re.search(words, errors[0].message)


async def ask_for_version_2(rig: Rig) -> tuple[int, str]:
    """Have the plan changed to one with version 2 of the small model; returns what a request is then answered."""
    next_plan(rig, small=2)
    rig.orchestrator.plan_change.ask()
    await asyncio.sleep(5.0)
    return await ask(rig)


async def test_a_version_that_cannot_be_loaded_leaves_the_plan_in_force(repository: Path) -> None:
    rig = await make_rig(repository=repository)
    fake = rig.fakes["a"]
    fake.repository = repository
    fake.fail_loads = "bad model"
    async with running(rig):
        assert await ask_for_version_2(rig) == (1, "tiny")
        assert refused(rig) == 1.0
        assert fake.unloads == [], "version 1 goes on serving"
        fake.fail_loads = ""
        assert await ask_for_version_2(rig) == (1 + VERSION_OFFSET, "next")


async def test_without_a_repository_a_plan_needs_what_stands() -> None:
    rig = await make_rig()
    async with running(rig):
        assert await ask_for_version_2(rig) == (1, "tiny")
        assert refused(rig) == 1.0
        rig.fakes["a"].versions["small"] = {1, 2}
        await rig.probe()
        assert await ask_for_version_2(rig) == (1 + VERSION_OFFSET, "next")


async def test_the_layout_is_the_smallest_for_the_demand_and_the_gear_the_one_for_it(repository: Path) -> None:
    rig = await make_rig(repository=repository)
    fake = rig.fakes["a"]
    fake.repository = repository
    loop = asyncio.get_running_loop()
    async with running(rig):
        for _ in range(3000):
            rig.orchestrator.gear_loop.on_arrival(rig.family, 1)
            await asyncio.sleep(0.0005)
        rig.orchestrator.gear_loop.tick(loop.time())
        next_plan(rig, large=2)
        await rig.orchestrator.plan_change.change()
        assert rig.orchestrator.reconciler.in_force.name == "broad"
        assert rig.family.gear.name == "wide"
        assert rig.family.plan_name == "next"
        await asyncio.sleep(3.0)
    assert fake.instances["large"] == 2
    assert fake.versions["large"] == {2}
    assert np.isclose(metric(rig, 'cascadeserve_gear_in_force{family="family",gear="wide"}'), 1.0)
