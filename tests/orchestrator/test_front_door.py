"""How both servers close: what was sent by then is answered, and nothing that is idle holds them up."""

from __future__ import annotations

import asyncio
import http.client
import socket
import time
from typing import TYPE_CHECKING

import grpc
import pytest
from tritonclient.grpc import service_pb2

from cascadeserve.local_stack import free_ports
from orchestrator.front_door import FrontDoor, ServeSettings
from tests.orchestrator.wire.echo_plane import EchoPlane
from tests.orchestrator.wire.test_plain_http import post
from tests.orchestrator.wire.test_rpc import connect, message, typed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.orchestrator.wire.echo_plane import EchoPlane as Plane

LINGER_S, DRAIN_S = 1.0, 30.0


class ClosableEcho(EchoPlane):
    """An EchoPlane that can be shut down, and knows what it has open."""

    draining = False
    refusing = False
    open_tickets = 0

    async def drain(self, _timeout_s: float) -> bool:
        return True

    async def close(self) -> None:
        """Nothing is left."""


@pytest.fixture
def plane() -> ClosableEcho:
    return ClosableEcho()


@pytest.fixture
def settings() -> ServeSettings:
    http_port, grpc_port = free_ports(2)
    return ServeSettings("127.0.0.1", http_port, grpc_port, 1 << 20, LINGER_S, DRAIN_S)


@pytest.fixture
async def door(plane: ClosableEcho, settings: ServeSettings) -> AsyncIterator[FrontDoor]:
    door = FrontDoor(plane, plane, settings, others=None, metrics=plane.metrics)
    await door.open()
    return door


async def test_connections_that_nobody_has_accepted_yet_are_answered(door: FrontDoor, settings: ServeSettings) -> None:
    # the loop does nothing meanwhile: the kernel takes connections and bytes
    clients = [socket.create_connection(("127.0.0.1", settings.http_port)) for _ in range(20)]
    for client in clients:
        client.sendall(post())
    await door.close()
    for client in clients:
        response = http.client.HTTPResponse(client)
        response.begin()
        assert (response.status, response.headers["Connection"]) == (200, "close")
        response.close()
        client.close()


async def test_calls_that_were_sent_but_not_taken_yet_are_answered(
    door: FrontDoor, settings: ServeSettings, plane: Plane
) -> None:
    request = message(typed("INT32", [1], int_contents=[1])).SerializeToString()
    with grpc.insecure_channel(f"127.0.0.1:{settings.grpc_port}") as channel:
        ready = grpc.channel_ready_future(channel)
        async with asyncio.timeout(10):
            while not ready.done():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        infer = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        calls = [infer.future(request, timeout=20) for _ in range(50)]
        time.sleep(0.5)  # noqa: ASYNC251 - the loop is busy with something else
        assert plane.requests == []
        await door.close()
        answers = [service_pb2.ModelInferResponse.FromString(call.result(5)) for call in calls]
    assert all(answer.model_name == "echo" for answer in answers)


async def test_an_idle_stream_does_not_hold_it_up(door: FrontDoor, settings: ServeSettings, plane: Plane) -> None:
    async with connect(f"127.0.0.1:{settings.grpc_port}") as stub:
        idle, busy = stub.ModelStreamInfer(), stub.ModelStreamInfer()
        await idle.write(message(typed("INT32", [1], int_contents=[1])))
        await idle.read()
        plane.delay_s = LINGER_S + 0.5
        await busy.write(message(typed("INT32", [1], int_contents=[1]), id="last"))
        began_s = time.monotonic()
        await door.close()
        assert LINGER_S < time.monotonic() - began_s < DRAIN_S / 4
        assert (await busy.read()).infer_response.id == "last"
        for call in (idle, busy):
            assert await call.code() is grpc.StatusCode.UNAVAILABLE
