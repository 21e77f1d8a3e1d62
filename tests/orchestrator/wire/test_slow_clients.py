"""Slow but steady clients are let through, idle ones stay; those that do not go on are cut off. On a clock of ours."""

from __future__ import annotations

import asyncio
import gzip
import socket
from contextlib import asynccontextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from aiohttp import web

from orchestrator.wire.bodies import Bodies
from orchestrator.wire.limits import Limits
from orchestrator.wire.rest import RestServer
from orchestrator.wire.slow_clients import STEP_BYTES
from orchestrator.wire.tensors import Tensor
from orchestrator.wire.watch import Watch
from tests.orchestrator.wire.bodies import head, tensor
from tests.orchestrator.wire.stock_clients import serve_http
from tests.orchestrator.wire.test_plain_http import BODY, LIVE, Client, connect, post

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from tests.orchestrator.wire.echo_plane import EchoPlane

# none of it passes
TIMEOUT_S = 1000.0
MAX_BYTES = 64 * STEP_BYTES
ODD = "X_y: goes to aiohttp"


class Watched:
    """A server, and a look at its only client whenever it is said so."""

    def __init__(self, server: RestServer) -> None:
        self.server = server
        self.watch = Watch(Limits(client_timeout_s=TIMEOUT_S))

    def look(self, now_s: float) -> None:
        self.watch.look(self.server._plain.connections, self.server._handed_over, now_s)

    @property
    def connection(self) -> Any:
        (only,) = (*self.server._plain.connections, *self.server._handed_over)
        return only


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110
            await asyncio.sleep(0.005)


@asynccontextmanager
async def serving(plane: EchoPlane) -> AsyncIterator[tuple[Watched, Client]]:
    server = RestServer(plane, max_body_bytes=MAX_BYTES, limits=Limits(client_timeout_s=TIMEOUT_S))
    async with serve_http(server) as address, connect(address) as client:
        yield Watched(server), client


async def is_cut(client: Client) -> bool:
    async with asyncio.timeout(20):
        try:
            return await client.reader.read(1) == b""
        except ConnectionResetError:
            return True


async def test_a_body_that_comes_slowly_but_steadily_arrives(plane: EchoPlane) -> None:
    body = head(tensor([1])) + b" " * (3 * STEP_BYTES)
    request = post(body)
    async with serving(plane) as (watched, client):
        for number in range(4):
            client.send(request[:-1][number * STEP_BYTES : (number + 1) * STEP_BYTES])
            await until(lambda: len(watched.server._plain.connections) == 1)
            sent = min((number + 1) * STEP_BYTES, len(request) - 1)
            await until(lambda sent=sent: watched.connection.received_bytes >= sent)
            watched.look(number * 0.9 * TIMEOUT_S)
        client.send(request[-1:])
        assert (await client.reply())[0] == 200


async def test_the_body_of_a_refused_request_may_come_slowly_too(plane: EchoPlane) -> None:
    plane.refusal = web.HTTPServiceUnavailable()
    request = post(BODY + b" " * (3 * STEP_BYTES))
    async with serving(plane) as (watched, client):
        client.send(request[:STEP_BYTES])
        assert (await client.reply())[0] == 500
        for number in range(1, 3):
            watched.look(number * 0.9 * TIMEOUT_S)
            left = watched.connection._skip - STEP_BYTES
            client.send(request[number * STEP_BYTES : (number + 1) * STEP_BYTES])
            await until(lambda left=left: watched.connection._skip <= left)
        watched.look(2.9 * TIMEOUT_S)
        client.send(request[3 * STEP_BYTES :] + LIVE)
        assert (await client.reply())[0] == 200


async def test_a_byte_now_and_then_is_too_little(plane: EchoPlane) -> None:
    request = post(BODY + b" " * STEP_BYTES)
    async with serving(plane) as (watched, client):
        for number in range(5):
            client.send(request[100 * number : 100 * (number + 1)])
            await until(lambda: len(watched.server._plain.connections) == 1)
            await until(lambda sent=100 * (number + 1): watched.connection.received_bytes >= sent)
            watched.look(number * 0.25 * TIMEOUT_S)
        assert await is_cut(client)


async def test_an_odd_body_has_its_time_for_each_step() -> None:
    bodies = Bodies(MAX_BYTES, Limits(client_timeout_s=TIMEOUT_S), lambda _model, _version: None)
    parts = iter([bytes(STEP_BYTES - 1), b"a", b"a", bytes(STEP_BYTES), bytes(5 * STEP_BYTES), b""])
    until_s: list[float | None] = []

    async def readany() -> bytes:
        await asyncio.sleep(0.001)
        (arriving,) = bodies.arriving.values()
        until_s.append(arriving.timeout.when())
        return next(parts)

    content = SimpleNamespace(readany=readany)
    upload: Any = SimpleNamespace(protocol=object(), content_length=None, headers={}, content=content, match_info={})
    assert len((await bodies.read(upload))[0]) == 7 * STEP_BYTES + 1
    begun, before, first, same, second, last = until_s
    assert begun == before
    assert first == same
    assert before < first < second < last  # type: ignore[operator]


@pytest.mark.parametrize("extra", [(), (ODD,)], ids=["plain", "odd"])
async def test_an_answer_may_be_read_slowly_but_steadily(plane: EchoPlane, extra: tuple[str, ...]) -> None:
    plane.outputs = [Tensor("y", "INT32", np.zeros(1 << 22, np.int32))]
    request = post(head(tensor([1]), parameters={"binary_data_output": True}), *extra)
    loop = asyncio.get_running_loop()
    server = RestServer(plane, max_body_bytes=MAX_BYTES, limits=Limits(client_timeout_s=TIMEOUT_S))
    async with serve_http(server) as address:
        watched = Watched(server)
        host, port = address.split(":")
        with socket.socket() as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, STEP_BYTES)
            client.setblocking(False)
            await loop.sock_connect(client, (host, int(port)))
            await loop.sock_sendall(client, request)
            await until(lambda: bool(plane.requests) and watched.connection.owes)
            now_s = 0.0
            for _ in range(5):
                watched.look(now_s)
                now_s += 0.9 * TIMEOUT_S
                # what the kernels have on the way comes on top
                goal = watched.connection.unread_bytes - STEP_BYTES
                while watched.connection.unread_bytes > goal:
                    await loop.sock_recv(client, STEP_BYTES)
            # no more is read, and some more may still go its way
            for _ in range(100):
                watched.look(now_s)
                now_s += 0.9 * TIMEOUT_S
                await asyncio.sleep(0.01)
                if not len(server._plain.connections) + len(server._handed_over):
                    break
            assert not len(server._plain.connections) + len(server._handed_over)


@dataclass(eq=False)
class Holding:
    """A connection that holds so much."""

    received_bytes: int = 0
    unread_bytes: int = 0
    owes: bool = True
    num_requests: int = 1
    progress: int = 0
    is_cut: bool = False

    def abort(self) -> None:
        self.is_cut = True


def test_slow_readers_together_hold_so_much() -> None:
    watch = Watch(Limits(client_timeout_s=10.0, max_received_bytes=100))
    slow = [Holding(unread_bytes=number) for number in (50, 60, 30)]
    new = Holding(unread_bytes=200)
    for now_s in (0.0, 9.0, 10.0):
        assert not any(each.is_cut for each in slow)
        for each in slow:
            # they read on
            each.progress += 1
        # who has just begun holds as much as an answer is long
        watch.look(slow, [new] if now_s > 9.0 else [], now_s)
    assert [each.is_cut for each in (*slow, new)] == [False, True, False, False]


def test_unfinished_requests_together_hold_so_much() -> None:
    watch = Watch(Limits(max_received_bytes=100))
    each = [Holding(number) for number in (50, 60, 30)]
    watch.look(each, [], 0.0)
    assert [one.is_cut for one in each] == [False, True, False]


async def test_an_idle_connection_stays_after_an_odd_request(plane: EchoPlane) -> None:
    odd = [
        post(gzip.compress(BODY), "Content-Encoding: gzip"),
        post(BODY, ODD),
        post(BODY, "Transfer-Encoding: chunked").replace(b"Content-Length", b"X-Length").replace(
            BODY, b"%x\r\n%b\r\n0\r\n\r\n" % (len(BODY), BODY)
        ),
        post(BODY, ODD),
    ]  # fmt: skip
    async with serving(plane) as (watched, client):
        for number, request in enumerate(odd):
            # in pieces: the rest of a body is not the beginning of a request
            client.send(request[:-2])
            await until(lambda: len(watched.server._handed_over) == 1 and not watched.connection.owes)
            client.send(request[-2:])
            assert (await client.reply())[0] == 200
            for hours in range(1, 10):
                watched.look((10 * number + hours) * 3600.0)
        # a beginning that does not go on
        client.send(LIVE[:-1])
        await until(lambda: watched.connection.owes)
        watched.look(1e6)
        watched.look(1e6 + 0.9 * TIMEOUT_S)
        assert watched.connection.owes
        watched.look(1e6 + TIMEOUT_S)
        assert await is_cut(client)


async def test_a_request_that_is_there_does_not_make_room(plane: EchoPlane) -> None:
    plane.delay_s = 0.1
    async with serving(plane) as (watched, client):
        client.send(post(BODY, ODD))
        assert (await client.reply())[0] == 200
        others = watched.server._handed_over
        plane.started.clear()
        # as if it came in this turn; its handler begins in some turn after it
        watched.connection.data_received(post(BODY, ODD))
        for _ in range(10):
            assert not others.cut_idle()
            if plane.started.is_set():
                break
            await asyncio.sleep(0)
        assert (await client.reply())[0] == 200
        await until(others.cut_idle)
        assert await is_cut(client)


async def test_half_an_odd_head_makes_room(plane: EchoPlane) -> None:
    async with serving(plane) as (watched, client):
        client.send(b"HEAD /v2")
        await until(lambda: len(watched.server._handed_over) == 1)
        await until(watched.server._handed_over.cut_idle)
        assert await is_cut(client)
