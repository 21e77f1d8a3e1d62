"""What one gRPC client may take of connections, calls and memory."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import pytest

from orchestrator.wire import rpc_stream
from orchestrator.wire.limits import Limits
from orchestrator.wire.rpc import build_rpc_server
from tests.orchestrator.wire.conftest import MAX_BYTES
from tests.orchestrator.wire.raw_http2 import SERVICE, raw_connection
from tests.orchestrator.wire.test_rpc import connect, message
from tests.orchestrator.wire.test_rpc_stream import numbered

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from orchestrator.wire.tensors import InferRequest, InferResponse
    from tests.orchestrator.wire.echo_plane import EchoPlane


@asynccontextmanager
async def serving(plane: EchoPlane, **limits: Any) -> AsyncIterator[str]:
    server = build_rpc_server(plane, max_message_bytes=MAX_BYTES, limits=Limits(**limits))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(None)


async def test_one_connection_does_not_take_all_calls(plane: EchoPlane) -> None:
    plane.delay_s = 0.2
    echo, now, most = plane.infer, 0, 0

    async def counted(request: InferRequest) -> InferResponse:
        nonlocal now, most
        now += 1
        most = max(most, now)
        try:
            return await echo(request)
        finally:
            now -= 1

    plane.infer = counted  # type: ignore[method-assign]
    async with serving(plane, max_connections=200) as address, connect(address) as stub:
        (request,) = numbered(1)
        # a burst at once on a new connection, and nothing of it is refused
        answers = await asyncio.gather(*(stub.ModelInfer(request) for _ in range(250)))
    assert len(answers) == 250
    assert most <= 100


@pytest.mark.parametrize("beginning", [b"", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"], ids=["nothing", "a preface"])
async def test_a_connection_that_does_not_begin_is_closed(plane: EchoPlane, beginning: bytes) -> None:
    async with serving(plane, client_timeout_s=0.4) as address:
        host, _, port = address.partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(beginning)
        async with asyncio.timeout(5):
            while await reader.read(1000):
                pass
        writer.close()


@pytest.mark.parametrize("begun", [True, False], ids=["half a request", "nothing of a request"])
async def test_a_request_that_does_not_arrive_is_not_waited_for(plane: EchoPlane, begun: bool) -> None:
    (request,) = numbered(1)
    data = bytes(MAX_BYTES - 10)

    async with serving(plane, client_timeout_s=0.4) as address, connect(address) as stub:
        raw = await raw_connection(address)
        raw.call(f"{SERVICE}/ModelInfer", data[:16000] if begun else b"", length=len(data), ends=False)
        read = b""
        async with asyncio.timeout(5):
            while b"did not arrive" not in read:
                more = await raw.reader.read(1000)
                assert more
                read += more
        raw.close()
        # one that takes its time to be answered has arrived
        plane.delay_s = 1.0
        assert (await stub.ModelInfer(request)).id == "0"
    assert len(plane.requests) == 1


async def test_idle_streams_make_room(plane: EchoPlane) -> None:
    first, second = numbered(2)
    async with serving(plane, max_connections=4) as address, AsyncExitStack() as stack:

        async def opened() -> Any:
            stub = await stack.enter_async_context(connect(address))
            call = stub.ModelStreamInfer()
            await call.wait_for_connection()
            return call

        used = await opened()
        await used.write(first)
        assert (await used.read()).infer_response.id == "0"
        silent = await opened()
        await asyncio.sleep(0.1)
        # the one that never asked goes first, then the other one
        for leaves in (silent, used):
            call = await opened()
            await call.write(second)
            assert (await call.read()).infer_response.id == "1"
            async with asyncio.timeout(5):
                assert await leaves.code() is grpc.StatusCode.UNAVAILABLE
            assert "needed its place" in await leaves.details()
        # no stream takes another one's place while it is asked
        plane.delay_s = 2.0
        busy = await opened()
        for asks in (call, busy):
            plane.started.clear()
            await asks.write(first)
            await plane.started.wait()
        # not `opened`: where the refusal comes with the headers, waiting for them raises it
        refused = (await stack.enter_async_context(connect(address))).ModelStreamInfer()
        async with asyncio.timeout(5):
            assert await refused.code() is grpc.StatusCode.UNAVAILABLE
        assert "2 streams are open" in await refused.details()
        assert (await call.read()).infer_response.id == (await busy.read()).infer_response.id == "0"
        # and calls of the other kind go on
        stub = await stack.enter_async_context(connect(address))
        assert (await stub.ModelInfer(first)).id == "0"


@pytest.mark.parametrize("read", [True, False], ids=["idle", "waiting"])
async def test_streams_whose_clients_leave_take_no_place(plane: EchoPlane, read: bool) -> None:
    (request,) = numbered(1)
    async with serving(plane, max_connections=4) as address:
        for _ in range(5):
            plane.delay_s = 0.0 if read else 30.0
            plane.started.clear()
            async with connect(address) as stub:
                call = stub.ModelStreamInfer()
                await call.write(request)
                await (call.read() if read else plane.started.wait())
                if not read:
                    call.cancel()
            await asyncio.sleep(0.1)
        plane.delay_s = 0.0
        async with connect(address) as stub:
            # as many as there may be, and each keeps its place
            calls = [stub.ModelStreamInfer() for _ in range(2)]
            for call in [*calls, *calls]:
                await call.write(request)
                assert (await call.read()).infer_response.id == "0"


async def test_a_stream_that_stays_idle_is_ended(plane: EchoPlane, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rpc_stream, "IDLE_S", 0.3)
    first, second = numbered(2)
    async with serving(plane) as address, connect(address) as stub:
        call = stub.ModelStreamInfer()
        plane.delay_s = 1.0  # a long answer is no idleness
        for request in (first, second):
            await call.write(request)
            assert (await call.read()).infer_response.id == request.id
        async with asyncio.timeout(5):
            assert await call.code() is grpc.StatusCode.UNAVAILABLE
        assert "idle for too long" in await call.details()


async def test_a_stream_whose_answers_nobody_reads_is_not_read(
    plane: EchoPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rpc_stream, "MAX_HELD_BYTES", 1 << 20)
    count, size = 100, 200_000
    raw = message({"name": "x", "datatype": "UINT8", "shape": [1, size]}, raw_input_contents=[bytes(size)])

    async def requests() -> AsyncIterator[Any]:
        for _ in range(count):
            yield raw

    async with serving(plane) as address, connect(address) as stub:
        call = stub.ModelStreamInfer(requests())
        seen = await plane.settled()
        # some are with gRPC, the rest is what may be held
        assert seen < count // 2
        # and all are answered once somebody reads
        assert len([answer async for answer in call]) == count


async def test_a_message_of_too_many_parts_is_refused_unread(plane: EchoPlane) -> None:
    request = message()
    request.id = "7"
    for _ in range(100_000):
        request.outputs.add()
    async with serving(plane) as address, connect(address) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.ModelInfer(request)
        assert refused.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        async for answer in stub.ModelStreamInfer(iter([request])):
            assert answer.error_message
        assert not plane.requests
