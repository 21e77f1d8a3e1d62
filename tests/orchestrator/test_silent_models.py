"""One model hangs at an endpoint that is well otherwise."""

from __future__ import annotations

import asyncio

import pytest

from orchestrator.backend import ModelVersion
from tests.orchestrator.conftest import make_rig
from tests.orchestrator.test_health import watched
from tests.orchestrator.test_isolation import check_idle, counter, outcomes, submit

pytestmark = pytest.mark.looptime

SMALL, LARGE = ModelVersion("small", 1), ModelVersion("large", 1)


async def test_a_model_that_hangs_is_taken_out_alone_and_its_rows_are_answered_elsewhere() -> None:
    rig = await make_rig(names=("a", "b"), busy_s={"small": 0.005, "large": 0.005})
    a = rig.orchestrator.dispatcher.endpoints[0]
    async with watched(rig):
        rig.fakes["a"].busy_s = {"small": 0.005, "large": 1e9}
        futures = []
        for i in range(400):
            futures.append(submit(rig, 0.0, label=i % 100, certainty=0.1 if i % 4 == 0 else 0.9, timeout_s=10.0))
            await asyncio.sleep(0.02)
        wanted = [[i % 100 + (0 if i % 4 else 100)] for i in range(400)]
        assert await outcomes(futures) == wanted
        assert set(a.failing) == {LARGE}
        assert (a.up, SMALL in a.hosted, a.generation) == (True, True, 1)
        assert counter(rig, "cascadeserve_poison_rows_total") == 0
        rig.fakes["a"].busy_s["large"] = 0.005
        await asyncio.sleep(3.0)
        assert not a.failing
        assert LARGE in a.hosted
        check_idle(rig)


async def test_a_model_that_stands_nowhere_else_is_waited_for() -> None:
    rig = await make_rig(names=("a",), busy_s={"small": 0.005, "large": 8.0})
    async with watched(rig):
        slow = submit(rig, 0.0, label=1, certainty=0.1, timeout_s=20.0)
        for _ in range(300):
            assert await outcomes([submit(rig, 0.0)]) == [[0]]
        assert await outcomes([slow]) == [[101]]


async def test_long_batches_everywhere_are_no_silence() -> None:
    rig = await make_rig(names=("a", "b"), busy_s={"small": 5.0})
    async with watched(rig):
        assert await outcomes([submit(rig, 0.0, label=i) for i in range(4)]) == [[i] for i in range(4)]
        assert not any(each.failing for each in rig.orchestrator.dispatcher.endpoints)
