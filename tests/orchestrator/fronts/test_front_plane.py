"""The dispatcher's data plane as a front has it: over a real socket, in one process."""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

import numpy as np
import pytest

from cascadeserve.errors import (
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    NotFound,
    NotSupported,
    Overloaded,
    RequestError,
    Unavailable,
)
from orchestrator.entry import Ahead
from orchestrator.fronts import front as front_module
from orchestrator.wire.descriptions import Duration, ModelStatistics
from orchestrator.wire.exchange import Call
from orchestrator.wire.tensors import RequestedOutput, Tensor
from tests.orchestrator.fronts.conftest import IMAGE, Joined, image_request
from tests.orchestrator.wire.echo_plane import MODELS


async def comes_true(condition: Any) -> None:
    async with asyncio.timeout(5):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def test_a_request_and_its_answer_travel_whole(joined: Joined) -> None:
    joined.echo.parameters = {"gear": "calm", "certified": True}
    request = image_request(id="7", parameters={"timeout": 5, "whatever": "x"}, client_timeout_s=1.5)
    response = await joined.plane.infer(request)
    np.testing.assert_array_equal(response.outputs[0].array, IMAGE)
    assert response.parameters == joined.echo.parameters
    (asked,) = joined.echo.requests
    assert (asked.id, asked.parameters) == ("7", request.parameters)
    assert asked.client_timeout_s == pytest.approx(1.5, abs=0.1)
    assert joined.plane.open_tickets == 0


async def test_what_is_asked_without_waiting_is_known_here(joined: Joined) -> None:
    plane, echo = joined.plane, joined.echo
    assert plane.ready()
    assert plane.server_metadata() == echo.server_metadata()
    assert plane.model_metadata("echo", "2") == MODELS["echo"]
    assert plane.model_ready("echo", "")
    assert not plane.model_ready("loading", "")
    for name, version in (("nobody", ""), ("echo", "9")):
        with pytest.raises(NotFound, match=f"Request for unknown model: '{name}'"):
            plane.model_ready(name, version)
    echo.is_ready = False
    joined.hub._tell()
    await comes_true(lambda: not plane.ready())
    echo.is_ready = True
    joined.hub._tell()
    await comes_true(plane.ready)
    plane.draining = True
    assert not plane.ready()
    assert not plane.model_ready("echo", "")


async def test_models_are_described_here_too(joined: Joined) -> None:
    plane, echo = joined.plane, joined.echo
    assert plane.model_config("echo", "2") == echo.model_config("echo", "2")
    with pytest.raises(NotFound, match="Request for unknown model: 'nobody'"):
        plane.model_config("nobody", "")
    ready = {entry.name: entry.ready for entry in plane.repository_index()}
    assert ready == {entry.name: entry.ready for entry in echo.repository_index()}
    assert list(ready) == sorted(ready)


async def test_the_dispatcher_counts_for_all_fronts(joined: Joined) -> None:
    counted = ModelStatistics("echo", "1", 5, 3, 2, success=Duration(2, 99), batches={1: Duration(1, 7), 2: Duration()})
    joined.echo.counted["echo"] = counted
    assert await joined.plane.statistics("echo", "") == [counted]
    assert [each.name for each in await joined.plane.statistics("", "")] == sorted(MODELS)
    with pytest.raises(InvalidRequest, match="requested model 'nobody' is not available"):
        await joined.plane.statistics("nobody", "")
    assert joined.plane.open_tickets == 0


async def test_a_request_of_too_many_rows_is_refused_here(joined: Joined) -> None:
    joined.plane._max_rows = 1
    with pytest.raises(InvalidRequest, match="batch-size must be <= 1 for 'echo'"):
        await joined.plane.infer(image_request())
    await joined.plane.metrics()
    assert joined.metrics.statistics.of("echo", 0.0).fail.count == 1
    assert not joined.echo.requests


class Poisoned(InternalError):  # noqa: N818
    """An error of which a front knows only the base class."""


@pytest.mark.parametrize("kind", [InvalidRequest, NotFound, Unavailable, DeadlineExceeded, InternalError])
async def test_errors_keep_their_class_their_words_and_what_they_carry(
    joined: Joined, kind: type[RequestError]
) -> None:
    joined.echo.error = kind("said there")
    joined.echo.error.retry_after_s = 2.5  # type: ignore[attr-defined]
    with pytest.raises(kind, match=r"^said there$") as caught:
        await joined.plane.infer(image_request())
    assert vars(caught.value) == {"retry_after_s": 2.5}


async def test_an_unknown_kind_of_error_is_the_nearest_known_one(joined: Joined) -> None:
    joined.echo.error = Poisoned("a row that breaks models")
    with pytest.raises(InternalError, match="a row that breaks models"):
        await joined.plane.infer(image_request())


async def test_a_bug_in_the_dispatcher_is_logged_there_and_kept_from_the_client(
    joined: Joined, caplog: pytest.LogCaptureFixture
) -> None:
    joined.echo.error = ZeroDivisionError("secret")
    with pytest.raises(InternalError, match=r"^internal error$"):
        await joined.plane.infer(image_request())
    (record,) = caplog.records
    assert record.exc_info is not None


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"inputs": []}, "expected 1 inputs but got 0 inputs for model 'echo'; it takes 'image'"),
        ({"inputs": [Tensor("image", "FP32", IMAGE[:, :, 1:])]}, r"Expected \[-1,1,32,32\], got \[2,1,31,32\]"),
        ({"outputs": [RequestedOutput("logits")]}, "unexpected inference output 'logits' for model 'echo'"),
    ],
)
async def test_a_request_that_does_not_fit_is_refused_here_and_counted_there(
    joined: Joined, changes: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InvalidRequest, match=sentence):
        await joined.plane.infer(image_request(**changes))
    body, content_type = await joined.plane.metrics()
    assert b'cascadeserve_requests_total{family="echo",outcome="InvalidRequest"} 1.0' in body
    assert content_type.startswith("text/plain")
    assert not joined.echo.requests


async def test_a_client_that_leaves_is_cancelled_there(joined: Joined) -> None:
    joined.echo.delay_s = 60.0
    asking = asyncio.create_task(joined.plane.infer(image_request()))
    await joined.echo.started.wait()
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    async with asyncio.timeout(5):
        await joined.echo.cancelled.wait()
    assert joined.plane.open_tickets == 0
    await comes_true(lambda: not joined.front._open)


async def test_answers_come_in_any_order(joined: Joined) -> None:
    joined.echo.delay_s = 0.05
    slow = asyncio.create_task(joined.plane.infer(image_request(id="slow")))
    await joined.echo.started.wait()
    joined.echo.delay_s = 0.0
    await joined.plane.infer(image_request(id="fast"))
    assert not slow.done()
    assert not await joined.plane.drain(0.001)
    assert await joined.plane.drain(5.0)
    await slow


async def test_more_open_requests_than_a_front_may_have_are_refused(
    joined: Joined, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(front_module, "MAX_OPEN", 1)
    joined.echo.delay_s = 60.0
    asking = asyncio.create_task(joined.plane.infer(image_request()))
    await joined.echo.started.wait()
    with pytest.raises(Unavailable, match="1 requests are open here already"):
        await joined.plane.infer(image_request())
    await joined.plane.close()
    with pytest.raises(Unavailable, match="shutting down"):
        await asking


async def test_when_the_dispatcher_ends_everything_is_refused(joined: Joined) -> None:
    joined.echo.delay_s = 60.0
    asking = asyncio.create_task(joined.plane.infer(image_request()))
    await joined.echo.started.wait()
    assert joined.front._link is not None
    joined.front._link.close()
    for attempt in (asking, joined.plane.infer(image_request()), joined.plane.metrics()):
        with pytest.raises(Unavailable, match="dispatcher behind this server has ended"):
            await attempt


async def test_when_a_front_ends_what_it_had_open_is_cancelled(joined: Joined) -> None:
    joined.echo.delay_s = 60.0
    asking = asyncio.create_task(joined.plane.infer(image_request()))
    await joined.echo.started.wait()
    joined.plane._link.close()
    async with asyncio.timeout(5):
        await joined.echo.cancelled.wait()
    with contextlib.suppress(Unavailable):
        await asking
    assert joined.front._dropped == 1
    joined.hub._tell()  # to nobody


async def test_a_front_waits_while_the_dispatcher_does_not_keep_up(joined: Joined) -> None:
    joined.plane._link.pause_writing()
    asking = asyncio.create_task(joined.plane.infer(image_request()))
    await asyncio.sleep(0.02)
    assert not joined.echo.requests
    joined.plane._link.resume_writing()
    assert (await asking).outputs


async def test_what_a_request_has_waited_is_taken_off_its_time(joined: Joined) -> None:
    watch = asyncio.create_task(joined.plane.watch())
    await asyncio.sleep(0)
    joined.plane._link.pause_writing()
    await asyncio.sleep(0)
    time.sleep(0.2)  # noqa: ASYNC251 - the front is late
    asking = asyncio.create_task(joined.plane.infer(image_request(client_timeout_s=1.5, waited_s=2.0)))
    await asyncio.sleep(0.1)
    joined.plane._link.resume_writing()
    await asking
    watch.cancel()
    (asked,) = joined.echo.requests
    assert 2.25 < asked.waited_s < 3.0
    # of the transport's deadline the first part was gone when it was read
    assert 0.8 < asked.client_timeout_s < 1.41


async def test_refused_rows_are_told_in_one_message_for_many(joined: Joined, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[tuple[str, str, float]] = []
    monkeypatch.setattr(joined.front, "_on_refusal", lambda *refusal: told.append(refusal))
    sent: list[object] = []
    send = joined.plane._link.send
    monkeypatch.setattr(joined.plane._link, "send", lambda each: (sent.append(each), send(each)))
    monkeypatch.setattr(front_module, "MAX_OPEN", 0)
    for _ in range(50):
        with pytest.raises(Unavailable, match="0 requests are open here already"):
            await joined.plane.infer(image_request(parameters={"work": 3.0}))
        with pytest.raises(InvalidRequest):
            await joined.plane.infer(image_request(inputs=[]))
    joined.plane.tell_refused()
    joined.plane.tell_refused()
    await comes_true(lambda: len(told) == 100)
    assert len(sent) == 2
    assert told.count(("echo", "Unavailable", 6.0)) == told.count(("echo", "InvalidRequest", 0.0)) == 50


async def test_what_the_door_left_open_is_refused_here_if_it_is_not_important(joined: Joined) -> None:
    joined.plane._entry.show({"echo": Ahead(slo_s=0.1, own_s=0.0, surge_slos=2.0, wait_s=60.0, row_s=0.0)})
    assert joined.plane.default_deadline_s("echo", "1") == pytest.approx(0.4)
    assert joined.plane.default_deadline_s("echo", "7") is None
    for priority in (0, 2, 3):
        assert not joined.plane.admit("echo", "", b'{"parameters":{"priority":')
        with pytest.raises(Overloaded, match="so much work waits for 'echo'") as caught:
            await joined.plane.infer(image_request(parameters={"priority": priority}, admitted=False))
        assert caught.value.retry_after_s == pytest.approx(59.8, abs=0.1)
    await joined.plane.infer(image_request(parameters={"priority": 1}, admitted=False))
    body, _ = await joined.plane.metrics()
    assert b'cascadeserve_requests_total{family="echo",outcome="Overloaded"} 3.0' in body
    assert [request.admitted for request in joined.echo.requests] == [False]


async def test_what_is_no_cascade_is_refused_here_in_a_sentence(joined: Joined) -> None:
    plane = joined.plane
    assert plane.has("guest")
    assert not any(plane.has(name) for name in (*MODELS, "nobody"))
    with pytest.raises(NotSupported, match="model 'guest' is no cascade, and a server with --fronts passes nothing on"):
        await plane.http(Call("guest"), "infer")
    with pytest.raises(NotSupported, match="model 'guest' is no cascade"):
        await plane.rpc("ModelInfer", None, "guest", "", None)
