"""Endpoints that answer errors only, whatever their probes say; and poison rows, which must not look like them."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import pytest

from cascadeserve.errors import InternalError
from orchestrator.backend import BatchNotTaken, CallRejected, ModelVersion
from tests.fakes.tiny import ERRS
from tests.orchestrator.conftest import make_rig
from tests.orchestrator.test_isolation import check_idle, counter, outcomes, submit, watched

if TYPE_CHECKING:
    from orchestrator.backend import BackendError
    from tests.fakes.fake_backend import FakeTriton

pytestmark = pytest.mark.looptime

SMALL, LARGE = ModelVersion("small", 1), ModelVersion("large", 1)
KINDS = pytest.mark.parametrize("error", [CallRejected("500: out of order"), BatchNotTaken("503: unavailable")])


def break_down(fake: FakeTriton, error: BackendError, *models: str) -> Any:
    """Fail every batch, or those of some models, at once; returns what mends it."""
    infer = fake.infer

    async def fail(model: ModelVersion, *args: Any, **options: Any) -> Any:
        if models and model.name not in models:
            return await infer(model, *args, **options)
        await asyncio.sleep(0.001)
        fake.calls.append(None)  # type: ignore[arg-type]
        raise error

    fake.infer = fail  # type: ignore[method-assign]

    def mend() -> None:
        fake.infer = infer  # type: ignore[method-assign]

    return mend


@KINDS
@pytest.mark.parametrize("sizes", [[1] * 60, [16] * 20], ids=["single rows", "batches"])
async def test_an_endpoint_of_errors_only_is_taken_out_and_no_row_is_lost(
    error: BackendError, sizes: list[int]
) -> None:
    rig = await make_rig(names=("a", "b"), busy_s={"small": 0.02, "large": 0.02})
    a = rig.orchestrator.dispatcher.endpoints[0]
    async with watched(rig):
        mend = break_down(rig.fakes["a"], error)
        futures = []
        for index, size in enumerate(sizes):
            futures.append(submit(rig, *[0.0] * size, label=index, timeout_s=2.0))
            await asyncio.sleep(0.005)
        assert await outcomes(futures) == [[index] * size for index, size in enumerate(sizes)]
        assert SMALL in a.failing
        assert a.up == (SMALL not in a.hosted)
        assert counter(rig, "cascadeserve_poison_rows_total") == 0
        tried = len(rig.fakes["a"].calls)
        assert tried < 30
        # it answers health checks all the while, and is asked for one row twice a second
        await asyncio.sleep(3.0)
        assert SMALL in a.failing
        assert len(rig.fakes["a"].calls) - tried <= 8
        mend()
        await asyncio.sleep(0.6)
        assert not a.failing
        assert SMALL in a.hosted
        assert counter(rig, "cascadeserve_model_failing") == 0
        assert await outcomes([submit(rig, 0.0, label=i) for i in range(50)]) == [[i] for i in range(50)]
        check_idle(rig)


async def test_one_model_that_fails_is_taken_out_alone() -> None:
    rig = await make_rig(names=("a", "b"), busy_s={"small": 0.005, "large": 0.02})
    a = rig.orchestrator.dispatcher.endpoints[0]
    break_down(rig.fakes["a"], CallRejected("500: no memory"), "large")
    async with watched(rig):
        futures = [submit(rig, 0.0, label=i, certainty=0.1) for i in range(200)]
        assert await outcomes(futures) == [[i + 100] for i in range(200)]
        for i in range(20):
            assert await outcomes([submit(rig, 0.0, label=i, certainty=0.1)]) == [[i + 100]]
    assert set(a.failing) == {LARGE}
    assert SMALL in a.hosted


async def test_poison_rows_alone_never_take_an_endpoint_out() -> None:
    rig = await make_rig(names=("a", "b"), busy_s={"small": 0.01})
    async with watched(rig):
        for _ in range(30):
            results = await outcomes([submit(rig, ERRS) for _ in range(5)])
            assert all(isinstance(each, InternalError) for each in results)
        assert counter(rig, "cascadeserve_poison_rows_total") == 150
        assert all(not each.failing and SMALL in each.hosted for each in rig.orchestrator.dispatcher.endpoints)
        check_idle(rig)


async def test_poison_rows_are_found_while_an_endpoint_is_broken() -> None:
    rig = await make_rig(names=("a", "b"), busy_s={"small": 0.01})
    break_down(rig.fakes["a"], CallRejected("500: out of order"))
    async with watched(rig):
        futures = [submit(rig, ERRS if i % 20 == 7 else 0.0, label=i) for i in range(200)]
        for i, result in enumerate(await outcomes(futures)):
            assert isinstance(result, InternalError) if i % 20 == 7 else result == [i]
        check_idle(rig)


@KINDS
async def test_the_last_endpoint_stays_and_its_errors_are_answered(error: BackendError) -> None:
    rig = await make_rig(names=("a", "b"))
    for fake in rig.fakes.values():
        break_down(fake, error)
    async with watched(rig):
        results = await outcomes([submit(rig, 0.0, timeout_s=1.0) for _ in range(40)])
        assert all(isinstance(each, Exception) for each in results)
        assert not any(each.failing for each in rig.orchestrator.dispatcher.endpoints)
        check_idle(rig)


async def test_now_and_then_an_error_takes_nothing_out() -> None:
    rig = await make_rig(names=("a", "b"), busy_s={"small": 0.005})
    fake = rig.fakes["a"]
    infer, turn = fake.infer, 0

    async def fail_often(*args: Any, **options: Any) -> Any:
        nonlocal turn
        turn += 1
        if turn % 3:
            raise CallRejected("500: no memory")
        return await infer(*args, **options)

    fake.infer = fail_often  # type: ignore[method-assign]
    async with watched(rig):
        futures = []
        for i in range(300):
            futures.append(submit(rig, 0.0, label=i))
            await asyncio.sleep(0.004)
        assert await outcomes(futures) == [[i] for i in range(300)]
        assert not rig.orchestrator.dispatcher.endpoints[0].failing


async def test_a_model_that_is_unloaded_and_loaded_again_starts_anew() -> None:
    rig = await make_rig(names=("a", "b"), busy_s={"small": 0.01})
    a = rig.orchestrator.dispatcher.endpoints[0]
    mend = break_down(rig.fakes["a"], CallRejected("500: out of order"))
    async with watched(rig):
        await outcomes([submit(rig, 0.0) for _ in range(100)])
        assert SMALL in a.failing
        instances = dict(rig.fakes["a"].instances)
        rig.fakes["a"].instances.pop("small")
        mend()
        await asyncio.sleep(1.1)
        assert not a.failing
        rig.fakes["a"].instances = instances
        await asyncio.sleep(0.6)
        assert SMALL in a.hosted


async def test_what_waits_for_another_endpoint_is_answered_at_close() -> None:
    rig = await make_rig(names=("a", "b"), busy_s={"small": 5.0})
    break_down(rig.fakes["a"], CallRejected("500: out of order"))
    futures = [submit(rig, 0.0) for _ in range(30)]
    await asyncio.sleep(0.5)
    assert rig.orchestrator.dispatcher.flights.opinions.waiting
    assert rig.orchestrator.dispatcher.is_needed(SMALL)
    await rig.orchestrator.close()
    results = await outcomes(futures)
    assert all(isinstance(each, list | Exception) for each in results)
    check_idle(rig)
