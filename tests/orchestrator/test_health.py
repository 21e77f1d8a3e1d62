"""An endpoint that hangs: nothing ends, nothing answers, no connection breaks."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import pytest

from orchestrator.foreign_load import SURE_LOOKS, ForeignLoad, pending_requests
from tests.fakes.tiny import rows
from tests.orchestrator.conftest import Rig, make_rig

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

pytestmark = pytest.mark.looptime

# silence, the probe, and what the watch is late by
FOUND_WITHIN_S = 0.5 + 1.0 + 0.3


@contextlib.asynccontextmanager
async def watched(rig: Rig) -> AsyncIterator[None]:
    """All monitors running, as in the real thing."""
    monitors = rig.orchestrator.monitors.values()
    tasks = [asyncio.create_task(run()) for each in monitors for run in (each.run, each.watch)]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def hang(rig: Rig, name: str) -> None:
    """As SIGSTOP does: a probe is waited for until its timeout."""
    fake = rig.fakes[name]
    fake.hang = True

    async def is_live(*, timeout_s: float) -> bool:
        if fake.hang:
            await asyncio.sleep(timeout_s)
        return not fake.hang

    fake.is_live = is_live  # type: ignore[method-assign]


def submit(rig: Rig, count: int, *, timeout_s: float = 4.0) -> list[asyncio.Future[Any]]:
    dispatcher = rig.orchestrator.dispatcher
    return [
        dispatcher.submit(rig.family, [rows([each], [0.9])], timeout_s=timeout_s, want_scores=False)
        for each in range(count)
    ]


async def test_a_silent_endpoint_is_taken_out_at_once_and_its_rows_are_answered_elsewhere() -> None:
    rig = await make_rig(names=("a", "b"), busy_s={"small": 0.005})
    async with watched(rig):
        await asyncio.gather(*submit(rig, 20))
        hang(rig, "b")
        futures = submit(rig, 20)
        await asyncio.sleep(FOUND_WITHIN_S)
        assert not rig.orchestrator.dispatcher.endpoints[1].up
        answers = await asyncio.gather(*futures)
        assert [answer.label.tolist() for answer in answers] == [[each] for each in range(20)]
        rig.fakes["b"].hang = False
        await asyncio.sleep(3.0)
        assert rig.orchestrator.dispatcher.endpoints[1].up


async def test_a_long_batch_is_not_taken_for_silence_while_the_server_answers_probes() -> None:
    rig = await make_rig(busy_s={"small": 3.0})
    async with watched(rig):
        (future,) = submit(rig, 1, timeout_s=10.0)
        assert (await future).label.tolist() == [0]
        assert rig.orchestrator.dispatcher.endpoints[0].generation == 1


async def test_an_endpoint_with_nothing_to_do_is_found_by_its_probe() -> None:
    rig = await make_rig()
    async with watched(rig):
        hang(rig, "a")
        await asyncio.sleep(3.0)
        assert not rig.orchestrator.dispatcher.endpoints[0].up


def test_pending_requests_are_read_from_the_metrics() -> None:
    text = b"""# TYPE nv_inference_pending_request_count gauge
nv_inference_pending_request_count{model="small",version="1"} 3
nv_inference_pending_request_count{model="large",version="1"} 2
nv_inference_count{model="large",version="1"} 7
"""
    assert pending_requests(text) == 5
    assert pending_requests(b"") == 0


async def test_requests_of_others_are_told_of_once_and_shown_while_they_last(caplog: pytest.LogCaptureFixture) -> None:
    rig = await make_rig()
    metrics = rig.orchestrator.metrics
    watch = ForeignLoad(rig.orchestrator.dispatcher.endpoints[0], "127.0.0.1:1", metrics)
    name = 'cascadeserve_foreign_requests{endpoint="a"}'
    for _ in range(SURE_LOOKS - 1):
        watch.found(4)
    watch.found(0)
    assert "not of this orchestrator" not in caplog.text
    for _ in range(SURE_LOOKS + 5):
        watch.found(4)
    assert caplog.text.count("4 requests wait there that are not of this orchestrator") == 1
    assert f"{name} 4.0" in metrics.render()[0].decode()
    watch.found(0)
    assert f"{name} 0.0" in metrics.render()[0].decode()
