"""gRPC clients that do not do their part: requests that do not come, answers that are not taken, streams kept open."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from orchestrator.wire import rpc_calls, rpc_health, rpc_unread
from tests.orchestrator.wire.raw_http2 import SERVICE, raw_connection
from tests.orchestrator.wire.test_rpc import connect, message
from tests.orchestrator.wire.test_rpc_limits import serving
from tests.orchestrator.wire.test_rpc_stream import numbered

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.orchestrator.wire.echo_plane import EchoPlane

SIZE = 200_000
HEALTH = "grpc.health.v1.Health"


async def large(count: int) -> AsyncIterator[Any]:
    for number in range(count):
        yield message(
            {"name": "x", "datatype": "UINT8", "shape": [1, SIZE]}, raw_input_contents=[bytes(SIZE)], id=str(number)
        )


async def end_of(call: Any) -> grpc.StatusCode:
    async with asyncio.timeout(5):
        code: grpc.StatusCode = await call.code()
    return code


async def test_streams_hold_no_more_than_so_much_together(plane: EchoPlane) -> None:
    count = 100
    async with serving(plane, max_received_bytes=10 * SIZE) as address, AsyncExitStack() as stack:
        stubs = [await stack.enter_async_context(connect(address)) for _ in range(2)]
        # answers are not taken
        call = stubs[0].ModelStreamInfer(large(count))
        assert 10 <= await plane.settled() < count // 2
        # the other one goes on, one at a time
        assert len([answer async for answer in stubs[1].ModelStreamInfer(large(count))]) == count
        assert len([answer async for answer in call]) == count
        # and nothing is held any more
        plane.delay_s = 1.0
        plane.requests.clear()
        call = stubs[0].ModelStreamInfer(large(5))
        assert await plane.settled() == 5


@pytest.mark.parametrize("service", ["inference.GRPCInferenceService/ModelInfer", "grpc.health.v1.Health/Check"])
async def test_requests_that_do_not_arrive_make_room(
    plane: EchoPlane, monkeypatch: pytest.MonkeyPatch, service: str
) -> None:
    monkeypatch.setattr(rpc_calls, "_MIN_ARRIVING", 3)
    async with serving(plane, max_connections=8) as address, AsyncExitStack() as stack:
        calls = []
        for _ in range(8):
            # a connection each, so that all are there
            channel = await stack.enter_async_context(grpc.aio.insecure_channel(address))
            calls.append(channel.stream_unary(f"/{service}")())
            await asyncio.sleep(0.05)
        (request,) = numbered(1)
        stub = await stack.enter_async_context(connect(address))
        assert (await stub.ModelInfer(request)).id == "0"
        for call in calls[:6]:
            assert await end_of(call) is grpc.StatusCode.UNAVAILABLE
            assert "needed its place" in await call.details()
        assert not calls[6].done()


async def test_a_burst_of_calls_takes_no_place_of_its_own(plane: EchoPlane) -> None:
    async with serving(plane, max_connections=4000) as address, AsyncExitStack() as stack:
        options = [("grpc.use_local_subchannel_pool", 1)]
        channels = [
            await stack.enter_async_context(grpc.aio.insecure_channel(address, options=options)) for _ in range(8)
        ]
        stubs = [health_pb2_grpc.HealthStub(channel) for channel in channels]
        answers = await asyncio.gather(
            *(stub.Check(health_pb2.HealthCheckRequest(), wait_for_ready=True) for stub in stubs for _ in range(400))
        )
    assert len(answers) == 3200


async def test_health_and_its_watch_do_not_wait_for_ever(plane: EchoPlane) -> None:
    async with serving(plane, client_timeout_s=0.4) as address, grpc.aio.insecure_channel(address) as channel:
        for method in ("Check", "Watch"):
            call = channel.stream_unary(f"/grpc.health.v1.Health/{method}")()
            assert await end_of(call) is grpc.StatusCode.DEADLINE_EXCEEDED


async def test_reflection_takes_little(plane: EchoPlane, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc_health, "_MAX_REFLECTING", 2)
    wanted = reflection_pb2.ServerReflectionRequest(list_services="")
    async with serving(plane) as address, grpc.aio.insecure_channel(address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        calls = []
        for _ in range(3):
            calls.append(stub.ServerReflectionInfo())
            await calls[-1].write(wanted)
            assert (await calls[-1].read()).list_services_response.service
        assert await end_of(calls[0]) is not grpc.StatusCode.OK
        for call in calls[1:]:
            await call.write(wanted)
            assert (await call.read()).list_services_response.service
        raw = channel.stream_stream("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")
        for data in (b"\xff", reflection_pb2.ServerReflectionRequest(host="a" * 10_000).SerializeToString()):
            call = raw(iter([data]))
            assert await end_of(call) is grpc.StatusCode.INVALID_ARGUMENT


@pytest.mark.parametrize("method", [f"{SERVICE}/ModelInfer", f"{SERVICE}/ModelStreamInfer", f"{HEALTH}/Check"])
async def test_a_client_that_takes_no_answers_is_cut_off(plane: EchoPlane, method: str) -> None:
    (request,) = numbered(1)
    async with serving(plane, client_timeout_s=0.5) as address, connect(address) as stub:
        raw = await raw_connection(address, window_bytes=0)
        raw.call(method, request.SerializeToString(), ends="Stream" not in method)
        await raw.closed()
        raw.close()
        # one whose answer takes longer is no such client
        plane.delay_s = 1.5
        assert (await stub.ModelInfer(request)).id == "0"


@pytest.mark.parametrize("method", ["ModelInfer", "ModelStreamInfer"])
async def test_answers_that_are_not_taken_make_room(
    plane: EchoPlane, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setattr(rpc_unread, "_ROOM_S", 0.1)
    (request,) = numbered(1)
    async with serving(plane, max_connections=8) as address, connect(address) as stub:
        raw = await raw_connection(address, window_bytes=0)
        for _ in range(8):
            raw.call(f"{SERVICE}/{method}", request.SerializeToString(), ends=False)
        assert await plane.settled() == (4 if "Stream" in method else 8)
        for _ in range(3):
            if "Stream" in method:
                assert [answer.infer_response.id async for answer in stub.ModelStreamInfer(iter([request]))] == ["0"]
            else:
                assert (await stub.ModelInfer(request)).id == "0"
        await raw.closed()
        raw.close()


async def test_calls_beyond_their_number_are_refused(plane: EchoPlane) -> None:
    (request,) = numbered(1)
    plane.delay_s = 1.0
    async with serving(plane, max_connections=3) as address, connect(address) as stub:
        answers = await asyncio.gather(*(stub.ModelInfer(request) for _ in range(4)), return_exceptions=True)
        assert len(plane.requests) == 3
        (error,) = (answer for answer in answers if isinstance(answer, grpc.aio.AioRpcError))
        assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert "3 calls are under way" in str(error.details())
        plane.delay_s = 0.0
        assert (await stub.ModelInfer(request)).id == "0"


@pytest.mark.parametrize(
    ("peer", "is_it"),
    [
        ("ipv4:127.0.0.1:7", ("127.0.0.1", 7)),
        ("ipv4:127.0.0.1:7", ("::ffff:127.0.0.1", 7)),
        ("ipv6:%5B::1%5D:7", ("::1", 7)),
        ("ipv6:[fe80::1%25eth0]:7", ("fe80::1%eth0", 7)),
    ],
)
def test_names_of_peers(peer: str, is_it: tuple[str, int]) -> None:
    assert rpc_unread._address(peer) == rpc_unread._ip(is_it)
