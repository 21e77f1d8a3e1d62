"""Models of the Tritons that are no cascade, passed on."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from cascadeserve.errors import DeadlineExceeded, InvalidRequest, Unavailable
from orchestrator.backend import ModelVersion
from orchestrator.wire.exchange import Call
from tests.orchestrator.conftest import Rig, make_rig
from tests.orchestrator.test_isolation import check_idle, outcomes, submit, watched

if TYPE_CHECKING:
    from orchestrator.wire.exchange import Answer

pytestmark = pytest.mark.looptime

MODELS = {"small": 1, "large": 1, "guest": 1}


async def rig_of(*names: str, **fake: Any) -> Rig:
    rig = await make_rig(names=names)
    for each in rig.fakes.values():
        each.instances = dict(MODELS)
        for key, value in fake.items():
            setattr(each, key, value)
    await rig.probe()
    return rig


async def ask(rig: Rig, *, version: str = "", body: bytes = b"body", verb: str = "infer") -> Answer:
    call = Call("guest", version, "4", body, None)
    return await rig.orchestrator.dispatcher.passing.http(call, verb)


async def test_only_what_is_neither_family_nor_model_of_the_plan_is_passed_on() -> None:
    rig = await rig_of("a")
    passing = rig.orchestrator.dispatcher.passing
    assert passing.has("guest")
    assert not any(passing.has(name) for name in ("family", "small", "large", "unknown", ""))
    assert passing.names() == ["guest"]


async def test_request_and_answer_are_untouched() -> None:
    rig = await rig_of("a")
    answer = await ask(rig, version="1", body=b"\x00\xff")
    assert (answer.status, answer.body) == (200, b"POST /v2/models/guest/versions/1/infer \x00\xff")
    assert answer.headers == {"Content-Type": "text/plain", "Inference-Header-Content-Length": "4"}
    assert (await ask(rig, verb="", body=b"")).body == b"GET /v2/models/guest "
    message = SimpleNamespace(model_name="guest", inputs=[])
    said = await rig.orchestrator.dispatcher.passing.rpc("ModelInfer", message, "guest", "", None)
    assert said == ("ModelInfer", message)
    check_idle(rig)


async def test_a_shape_that_may_end_the_server_is_not_passed_on() -> None:
    rig = await rig_of("a")
    passing = rig.orchestrator.dispatcher.passing
    for shape in ([2**63 - 1], [1 << 20, 1 << 20], [0, 2**62]):
        body = json.dumps({"inputs": [{"name": "x", "shape": shape, "datatype": "FP32", "data": [1]}]}).encode()
        with pytest.raises(InvalidRequest, match="more elements than a request can hold"):
            await passing.http(Call("guest", "", None, body, None), "infer")
        message = SimpleNamespace(inputs=[SimpleNamespace(shape=shape)])
        with pytest.raises(InvalidRequest, match="more elements than a request can hold"):
            await passing.rpc("ModelInfer", message, "guest", "", None)
    check_idle(rig)


async def test_it_takes_slots_and_takes_turns_with_batches(looptime: float) -> None:
    rig = await rig_of("a", busy_s={"small": 0.1, "guest": 0.1})
    endpoint = rig.orchestrator.dispatcher.endpoints[0]
    guests = [asyncio.create_task(ask(rig)) for _ in range(40)]
    await asyncio.sleep(0.05)
    assert endpoint.in_flight == endpoint.slots + 1
    # each fills a batch of its own
    futures = [submit(rig, *[0.0] * 64) for _ in range(10)]
    assert all(isinstance(each, list) for each in await outcomes(futures))
    done = sum(guest.done() for guest in guests)
    assert 8 <= done <= 16, (done, looptime)
    await asyncio.gather(*guests)
    assert rig.fakes["a"].max_in_flight == endpoint.slots + 1
    check_idle(rig)


async def test_it_goes_where_there_is_least_to_do() -> None:
    rig = await rig_of("a", "b", busy_s={"guest": 0.1})
    await asyncio.gather(*(ask(rig) for _ in range(20)))
    counts = [sum(call.model == "guest" for call in fake.calls) for fake in rig.fakes.values()]
    assert counts == [10, 10]


async def test_an_endpoint_that_is_lost_costs_no_answer() -> None:
    rig = await rig_of("a", "b", busy_s={"guest": 0.5})
    async with watched(rig):
        guests = [asyncio.create_task(ask(rig)) for _ in range(10)]
        await asyncio.sleep(0.2)
        rig.fakes["a"].kill()
        answers = await asyncio.gather(*guests)
        assert [answer.status for answer in answers] == [200] * 10
        await asyncio.sleep(0.2)
        assert not rig.orchestrator.dispatcher.endpoints[0].up


async def test_an_endpoint_that_hangs_gives_its_requests_to_another() -> None:
    rig = await rig_of("a", "b", busy_s={"guest": 0.1})
    rig.fakes["a"].hang = True
    async with watched(rig):
        answers = await asyncio.gather(*(ask(rig) for _ in range(4)))
        assert [answer.status for answer in answers] == [200] * 4


async def test_without_an_endpoint_or_an_answer_it_is_refused() -> None:
    rig = await rig_of("a", busy_s={"guest": 1e9})
    with pytest.raises(DeadlineExceeded, match="no answer within 60 s"):
        await ask(rig)
    await asyncio.sleep(0.1)
    rig.orchestrator.dispatcher.endpoint_is_down(rig.orchestrator.dispatcher.endpoints[0])
    assert rig.orchestrator.dispatcher.passing.has("guest")
    with pytest.raises(Unavailable, match="no endpoint serves model 'guest' now"):
        await ask(rig)
    check_idle(rig)


async def test_a_client_that_leaves_keeps_its_slot_for_as_long_as_the_device_is_busy() -> None:
    rig = await rig_of("a", busy_s={"guest": 1.0})
    guests = [asyncio.create_task(ask(rig)) for _ in range(20)]
    await asyncio.sleep(0.1)
    for guest in guests:
        guest.cancel()
    await asyncio.gather(*guests, return_exceptions=True)
    assert rig.orchestrator.dispatcher.open_tickets == 0
    endpoint = rig.orchestrator.dispatcher.endpoints[0]
    assert endpoint.in_flight == endpoint.slots + 1
    await asyncio.sleep(1.0)
    check_idle(rig)


async def test_a_client_that_leaves_while_it_waits_gets_no_slot() -> None:
    rig = await rig_of("a", busy_s={"guest": 0.1})
    endpoint = rig.orchestrator.dispatcher.endpoints[0]
    guests = [asyncio.create_task(ask(rig)) for _ in range(endpoint.slots + 3)]
    await asyncio.sleep(0.05)
    waiting = [guest for guest in guests if not guest.done()][-2:]
    for each in waiting:
        each.cancel()
    endpoint.slots += 2
    # in the same round of the loop, before they have noticed
    rig.orchestrator.dispatcher.pump()
    endpoint.slots -= 2
    assert endpoint.in_flight == endpoint.slots + 1
    results = await asyncio.gather(*guests, return_exceptions=True)
    assert sum(isinstance(each, asyncio.CancelledError) for each in results) == 2
    check_idle(rig)


async def test_what_waits_at_close_is_refused_and_nothing_new_is_taken() -> None:
    rig = await rig_of("a", busy_s={"guest": 1.0})
    guests = [asyncio.create_task(ask(rig)) for _ in range(6)]
    await asyncio.sleep(0.1)
    assert rig.orchestrator.dispatcher.open_tickets == 6
    rig.orchestrator.data_plane.refusing = True
    with pytest.raises(Unavailable, match="shutting down"):
        await ask(rig)
    await rig.orchestrator.close()
    results = await asyncio.gather(*guests, return_exceptions=True)
    assert all(isinstance(each, Unavailable) for each in results)
    check_idle(rig)


async def test_the_reconciler_leaves_them_alone() -> None:
    rig = await rig_of("a")
    async with watched(rig):
        await asyncio.sleep(3.0)
    assert rig.fakes["a"].unloads == []
    assert ModelVersion("guest", 1) in rig.orchestrator.dispatcher.endpoints[0].hosted
