"""The client's side of HTTP/1.1: what is a response, when it is complete, and which connections are used again."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import pytest

from cascadeserve.http_connection import Connection, ConnectionClosed, ConnectionPool, NotHttp, parse_response

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi"


@pytest.mark.parametrize(
    ("data", "body", "keep_alive"),
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nhi", b"hi", True),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length:2\r\n\r\nhi", b"hi", True),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n1;x=y\r\n!\r\n0\r\n\r\n", b"hi!", True),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\nA: b\r\n\r\n", b"hi", True),
        (b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nhi", b"hi", False),
        (b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nhi", b"hi", False),
        (b"HTTP/1.1 204 No Content\r\n\r\n", b"", True),
    ],
)
def test_responses_are_parsed_when_complete_and_not_before(data: bytes, body: bytes, keep_alive: bool) -> None:
    for length in range(len(data)):
        answer, needed = parse_response(data[:length], at_end=False)
        assert answer is None
        assert length < needed <= len(data)
    answer, length = parse_response(data + b"more", at_end=False)
    assert answer is not None
    assert (answer.body, answer.keep_alive, length) == (body, keep_alive, len(data))


def test_a_body_of_unstated_length_ends_with_the_connection() -> None:
    data = b"HTTP/1.1 200 OK\r\n\r\nhi"
    assert parse_response(data, at_end=False)[0] is None
    answer, _ = parse_response(data, at_end=True)
    assert answer is not None
    assert answer.body == b"hi"


@pytest.mark.parametrize(
    "data",
    [
        b"SSH-2.0-x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -1\r\n\r\n",
        b"HTTP/1.1 20 OK\r\nContent-Length: 0\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + bytes(1 << 16),
    ],
)
def test_what_is_no_http_is_said_so(data: bytes) -> None:
    with pytest.raises(NotHttp):
        parse_response(data, at_end=False)


class Scripted(asyncio.Protocol):
    """Calls `act` with itself when bytes arrive."""

    def __init__(self, act: Callable[[Scripted], None], all_connections: list[Scripted]) -> None:
        self._act = act
        self.received = b""
        all_connections.append(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.received += data
        self._act(self)


@contextlib.asynccontextmanager
async def scripted(act: Callable[[Scripted], None]) -> AsyncIterator[tuple[ConnectionPool, list[Scripted]]]:
    connections: list[Scripted] = []
    server = await asyncio.get_running_loop().create_server(lambda: Scripted(act, connections), "127.0.0.1", 0)
    pool = ConnectionPool(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    try:
        yield pool, connections
    finally:
        await pool.close()
        server.close()
        for connection in connections:
            connection.transport.abort()
        await asyncio.sleep(0)


def answer_ok(server: Scripted) -> None:
    server.transport.write(OK)


async def ask(pool: ConnectionPool) -> Connection:
    connection = await pool.acquire()
    assert (await connection.exchange(b"?")).body == b"hi"
    pool.release(connection)
    return connection


async def test_a_connection_that_the_server_closed_while_idle_is_not_used_again() -> None:
    async with scripted(answer_ok) as (pool, connections):
        first = await ask(pool)
        connections[0].transport.close()
        await asyncio.sleep(0.05)
        assert await ask(pool) is not first
        assert len(connections) == 2


async def test_a_connection_is_used_again_until_it_is_retired() -> None:
    async with scripted(answer_ok) as (pool, connections):
        first = await ask(pool)
        assert await pool.acquire() is first
        second = await ask(pool)
        pool.retire()
        assert not second.is_open
        assert (await first.exchange(b"?")).body == b"hi"  # in use: it ends when it is given back
        pool.release(first)
        assert not first.is_open
        await ask(pool)
        assert len(connections) == 3


async def test_an_answer_that_came_before_its_whole_request_was_sent_ends_the_connection() -> None:
    def act(server: Scripted) -> None:
        server.transport.pause_reading()
        server.transport.write(OK)

    async with scripted(act) as (pool, _):
        connection = await pool.acquire()
        assert (await connection.exchange(bytes(1 << 26))).body == b"hi"
        assert connection.is_open
        pool.release(connection)
        assert not connection.is_open


async def test_a_large_answer_in_many_pieces_is_parsed_twice_only(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(data: bytes, *, at_end: bool) -> object:
        calls.append(len(data))
        return parse_response(data, at_end=at_end)

    monkeypatch.setattr("cascadeserve.http_connection.parse_response", counted)
    body = bytes(1 << 24)

    def act(server: Scripted) -> None:
        server.transport.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    async with scripted(act) as (pool, _):
        connection = await pool.acquire()
        assert (await connection.exchange(b"?")).body == body
    assert len(calls) == 2


async def test_a_request_under_way_ends_with_its_pool() -> None:
    async with scripted(lambda _: None) as (pool, _):
        connection = await pool.acquire()
        asking = asyncio.create_task(connection.exchange(b"?"))
        await asyncio.sleep(0)
        await pool.close()
        with pytest.raises(ConnectionClosed, match="no answer"):
            await asking
        with pytest.raises(ConnectionClosed, match="before"):
            await connection.exchange(b"?")


@pytest.mark.parametrize("address", ["127.0.0.1:1", "[::1]:1", "localhost:1"])
async def test_nobody_listens(address: str) -> None:
    with pytest.raises(OSError, match="Errno"):
        await ConnectionPool(f"http://{address}").acquire()


async def test_the_name_is_looked_up_again_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    look_up = asyncio.get_running_loop().getaddrinfo

    async def counted(host: str, *rest: object, **options: object) -> object:
        asked.append(host)
        return await look_up("127.0.0.1", *rest, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", counted)
    async with scripted(answer_ok) as (numbered, _):
        pool = ConnectionPool(f"http://moving.example:{numbered.host_header.rpartition(':')[2]}")
        for _ in range(3):
            pool.drop(await ask(pool))
        assert asked.count("moving.example") == 1
        pool.retire()
        await ask(pool)
        assert asked.count("moving.example") == 2
        await pool.close()
