"""The wire below HTTP: one send per request, and nothing that comes back goes unseen."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING

import numpy as np
import pytest

from cascadeserve.replay.client import SECOND_ANSWER, Outcome
from cascadeserve.replay.http_sender import HttpSender
from cascadeserve.replay.payload import Question, encode_rows

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

LABEL = np.array([7], dtype=np.int64).tobytes()


def make_answer(request_id: str) -> bytes:
    text = (
        f'{{"id":"{request_id}","outputs":[{{"name":"label","datatype":"INT64","shape":[1,1],'
        f'"parameters":{{"binary_data_size":8}}}}]}}'
    ).encode()
    length = len(text)
    head = f"HTTP/1.1 200 OK\r\nContent-Length: {length + 8}\r\ninference-header-content-length: {length}\r\n\r\n"
    return head.encode() + text + LABEL


class Scripted(asyncio.Protocol):
    """Calls `act` with itself for every request that arrives whole."""

    requests = 0

    def __init__(self, act: Callable[[Scripted], None], all_connections: list[Scripted]) -> None:
        self._act = act
        self._received = b""
        all_connections.append(self)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self._received += data
        if self._received.endswith(b"ENDING!!"):
            self.requests += 1
            self._received = b""
            self._act(self)


@contextlib.asynccontextmanager
async def scripted(act: Callable[[Scripted], None]) -> AsyncIterator[tuple[HttpSender, list[Scripted]]]:
    connections: list[Scripted] = []
    server = await asyncio.get_running_loop().create_server(lambda: Scripted(act, connections), "127.0.0.1", 0)
    # the raw tensor of a row ends in the bytes that the server waits for
    rows = encode_rows("x", np.frombuffer(b"ENDING!!", dtype=np.float32).reshape(1, 2))
    question = Question("digits", (rows,), ("label",), 1.0)
    sender = HttpSender(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", question)
    try:
        yield sender, connections
    finally:
        await sender.close()
        server.close()
        for connection in connections:
            connection.transport.abort()
        await asyncio.sleep(0)


def soon() -> float:
    return asyncio.get_running_loop().time() + 2.0


async def test_a_post_on_a_connection_that_just_closed_is_sent_once() -> None:
    def act(server: Scripted) -> None:
        if server.requests == 1:
            server.transport.write(make_answer("a"))
        else:
            server.transport.close()

    async with scripted(act) as (sender, connections):
        first = await sender.send("a", [0], soon())
        second = await sender.send("b", [0], soon())
    assert (first.outcome, second.outcome) == (Outcome.ANSWERED, Outcome.LOST)
    assert [connection.requests for connection in connections] == [2]


@pytest.mark.parametrize("cut", [5, 60, 150])
async def test_an_incomplete_answer_is_lost(cut: int) -> None:
    def act(server: Scripted) -> None:
        server.transport.write(make_answer("a")[:cut])
        server.transport.close()

    async with scripted(act) as (sender, _):
        reply = await sender.send("a", [0], soon())
    assert reply.outcome is Outcome.LOST
    assert "incomplete" in reply.error


async def test_a_second_answer_at_once_is_counted() -> None:
    async with scripted(lambda server: server.transport.write(make_answer("a") * 2)) as (sender, _):
        reply = await sender.send("a", [0], soon())
        assert reply.outcome is Outcome.ANSWERED
        assert sender.unasked == 1
        assert (await sender.send("a", [0], soon())).outcome is Outcome.ANSWERED
    assert sender.unasked == 2


async def test_a_second_answer_while_idle_is_counted() -> None:
    async with scripted(lambda server: server.transport.write(make_answer("a"))) as (sender, connections):
        await sender.send("a", [0], soon())
        connections[0].transport.write(make_answer("a"))
        await asyncio.sleep(0.05)
        assert sender.unasked == 1
        # other unasked bytes are no answers
        await sender.send("a", [0], soon())
        connections[1].transport.write(b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\n\r\n")
        await asyncio.sleep(0.05)
    assert sender.unasked == 1


async def test_a_second_answer_in_place_of_the_next_one_is_counted_and_ends_the_connection() -> None:
    async with scripted(lambda server: server.transport.write(make_answer("a"))) as (sender, connections):
        await sender.send("a", [0], soon())
        reply = await sender.send("b", [0], soon())
        assert (reply.outcome, reply.duplicated) == (Outcome.LOST, 1)
        await sender.send("a", [0], soon())
    assert len(connections) == 2


async def test_connections_are_kept_alive() -> None:
    async with scripted(lambda server: server.transport.write(make_answer("a"))) as (sender, connections):
        for _ in range(5):
            assert (await sender.send("a", [0], soon())).outcome is Outcome.ANSWERED
    assert len(connections) == 1


async def test_connections_are_open_before_the_first_request() -> None:
    async with scripted(lambda server: server.transport.write(make_answer("a"))) as (sender, connections):
        await sender.prepare(3)
        for _ in range(2):
            assert (await sender.send("a", [0], soon())).outcome is Outcome.ANSWERED
    assert len(connections) == 3


async def test_a_server_that_is_not_there_is_found_out_by_the_requests() -> None:
    async with scripted(lambda _: None) as (sender, _):
        pass
    await sender.prepare(3)
    assert (await sender.send("a", [0], soon())).outcome is Outcome.REFUSED


def test_second_answers_have_a_name() -> None:
    assert "second" in SECOND_ANSWER
