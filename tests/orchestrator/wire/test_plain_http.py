"""Requests as bytes on a connection: what is answered here, what goes to aiohttp, and that both answer alike."""

from __future__ import annotations

import asyncio
import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import numpy as np
import pytest

from cascadeserve.errors import InternalError, Unavailable
from orchestrator.wire import plain_http
from orchestrator.wire.rest import RestServer
from orchestrator.wire.tensors import Tensor
from tests.orchestrator.wire.bodies import HEADER, INFER, binary, head, tensor, with_buffer
from tests.orchestrator.wire.conftest import MAX_BYTES
from tests.orchestrator.wire.stock_clients import serve_http

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.orchestrator.wire.echo_plane import EchoPlane

BODY = head(tensor([1]))
LIVE = b"GET /v2/health/live HTTP/1.1\r\nHost: x\r\n\r\n"


def post(body: bytes = BODY, *lines: str, path: str = INFER) -> bytes:
    text = "\r\n".join([f"POST {path} HTTP/1.1", "Host: x", f"Content-Length: {len(body)}", *lines])
    return text.encode() + b"\r\n\r\n" + body


class Client:
    """One connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def reply(self) -> tuple[int, dict[str, str], bytes]:
        async with asyncio.timeout(5):
            first, *lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")[:-2]
            headers = dict(line.split(": ", 1) for line in lines)
            return int(first.split()[1]), headers, await self.reader.readexactly(int(headers["Content-Length"]))

    async def is_closed(self) -> bool:
        async with asyncio.timeout(5):
            return await self.reader.read(1) == b""


@asynccontextmanager
async def connect(address: str) -> AsyncIterator[Client]:
    host, port = address.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        yield Client(reader, writer)
    finally:
        writer.close()


@pytest.fixture
def handed_over(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """What connections went to aiohttp with."""
    seen: list[bytes] = []
    real = plain_http._Connection._hand_over

    def spy(self: plain_http._Connection, data: bytes) -> None:
        seen.append(data)
        real(self, data)

    monkeypatch.setattr(plain_http._Connection, "_hand_over", spy)
    return seen


async def test_one_connection_serves_any_number_of_requests(rest_address: str, handed_over: list[bytes]) -> None:
    async with connect(rest_address) as client:
        for _ in range(3):
            client.send(LIVE)
            assert (await client.reply())[0] == 200
            client.send(post())
            status, headers, body = await client.reply()
            assert status == 200
            assert json.loads(body)["outputs"][0]["data"] == [1]
            assert headers["Content-Type"] == "application/json"
            assert headers["Date"].endswith(" GMT")
            assert "Connection" not in headers
    assert handed_over == []


@pytest.mark.parametrize("size", [1, 7, 100])
async def test_requests_may_come_in_any_pieces(rest_address: str, handed_over: list[bytes], size: int) -> None:
    body, length = with_buffer(binary(4), b"abcd")
    data = post(body, f"{HEADER}: {length}") + LIVE
    async with connect(rest_address) as client:
        for start in range(0, len(data), size):
            client.send(data[start : start + size])
            await asyncio.sleep(0)
        assert (await client.reply())[0] == 200
        assert (await client.reply())[2] == b""
    assert handed_over == []


async def test_pipelined_requests_are_answered_in_order(rest_address: str, plane: EchoPlane) -> None:
    plane.delay_s = 0.001
    async with connect(rest_address) as client:
        client.send(b"".join(post(head(tensor([number]))) for number in range(20)))
        for number in range(20):
            assert json.loads((await client.reply())[2])["outputs"][0]["data"] == [number]


async def test_a_client_that_sends_far_ahead_is_made_to_wait_and_loses_nothing(
    rest_address: str, plane: EchoPlane
) -> None:
    plane.delay_s = 0.001
    body = BODY + b" " * 50_000
    async with connect(rest_address) as client:
        client.send(post(body) * 40)
        for _ in range(40):
            assert (await client.reply())[0] == 200


async def test_an_answer_waits_for_a_client_that_reads_late(rest_address: str, plane: EchoPlane) -> None:
    array = np.arange(1 << 20, dtype=np.int32)
    plane.outputs = [Tensor("y", "INT32", array)]
    request = post(head(tensor([1]), parameters={"binary_data_output": True}))
    async with connect(rest_address) as client:
        client.send(request * 4)
        await asyncio.sleep(0.1)
        assert len(plane.requests) < 4, "answers pile up for a client that does not read"
        for _ in range(4):
            _, headers, body = await client.reply()
            assert body[int(headers[HEADER]) :] == array.tobytes()


@pytest.mark.parametrize(
    "request_bytes",
    [
        post(BODY, "Transfer-Encoding: chunked"),
        post(BODY, "Content-Length: 1"),
        post(BODY, f"content-length: {len(BODY)}"),
        post(BODY, "Expect: 100-continue"),
        post(BODY, "Connection: close"),
        post(BODY, "Connection: Upgrade", "Upgrade: h2c"),
        post(BODY, "Content-Encoding: gzip"),
        post(BODY, "X: a\x00b"),
        post(BODY, "X : a"),
        post(BODY, " folded"),
        post(BODY, "X: a\nY: b"),
        post(BODY, path="/v2/models/%65cho/infer"),
        post(BODY, path="/v2/models/../infer"),
        post(BODY, path=INFER + "?x=1"),
        post(BODY, path="/v2/models/echo"),
        post(BODY).replace(b"HTTP/1.1", b"HTTP/1.0"),
        post(BODY).replace(b"Host: x\r\n", b""),
        post(BODY).replace(b"POST", b"PUT"),
        post(BODY).replace(b"Content-Length: ", b"Content-Length: +"),
        post(BODY).replace(b"Content-Length: ", b"Content-Length: -"),
        post(b" " * (MAX_BYTES + 1)),
        LIVE.replace(b"\r\n\r\n", b"\r\nContent-Length: 1\r\n\r\nx"),
        b"\r\n" + LIVE,
        b"\x16\x03\x01\x02\x00\r\n\r\n",
        b"GET " + b"a" * 10_000,
    ],
)
async def test_what_is_not_plain_goes_to_aiohttp(
    rest_address: str, handed_over: list[bytes], request_bytes: bytes
) -> None:
    async with connect(rest_address) as client:
        client.send(LIVE)
        assert (await client.reply())[0] == 200
        client.send(request_bytes)
        async with asyncio.timeout(5):
            assert await client.reader.readexactly(7) == b"HTTP/1."
    assert len(handed_over) == 1
    assert request_bytes.startswith(handed_over[0][:100])


async def test_a_connection_handed_over_goes_on(rest_address: str, handed_over: list[bytes]) -> None:
    async with connect(rest_address) as client:
        client.send(LIVE + post(path="/v2/models/%65cho/infer") + post())
        for _ in range(3):
            assert (await client.reply())[0] == 200
        client.send(post())
        assert (await client.reply())[0] == 200
    assert len(handed_over) == 1


@pytest.mark.parametrize("error", [Unavailable("full"), InternalError("broken"), ValueError("a bug")])
async def test_errors_are_answered_alike_on_both_ways(
    rest_address: str, plane: EchoPlane, error: Exception, handed_over: list[bytes]
) -> None:
    plane.error = error
    async with connect(rest_address) as client:
        client.send(post())
        plain = await client.reply()
        client.send(post(path="/v2/models/%65cho/infer"))
        other = await client.reply()
    assert len(handed_over) == 1
    assert (plain[0], plain[2]) == (other[0], other[2])
    assert {name: value for name, value in other[1].items() if name not in ("Server", "Date")} == {
        name: value for name, value in plain[1].items() if name != "Date"
    }


async def test_while_closing_an_answer_is_the_last_one(plane: EchoPlane) -> None:
    closing = False
    server = RestServer(plane, max_body_bytes=MAX_BYTES, closing=lambda: closing)
    async with serve_http(server) as address, connect(address) as client, connect(address) as other:
        client.send(LIVE)
        assert "Connection" not in (await client.reply())[1]
        closing = True
        client.send(post())
        assert (await client.reply())[1]["Connection"] == "close"
        assert await client.is_closed()
        other.send(post(path="/v2/models/%65cho/infer"))
        assert (await other.reply())[1]["Connection"] == "close"
        assert await other.is_closed()


async def test_close_ends_idle_connections_and_waits_for_open_answers(plane: EchoPlane) -> None:
    plane.delay_s = 0.2
    server = RestServer(plane, max_body_bytes=MAX_BYTES)
    await server.start("127.0.0.1", 0)
    async with connect(server.address) as idle, connect(server.address) as busy:
        idle.send(LIVE)
        await idle.reply()
        busy.send(post())
        await plane.started.wait()
        closing = asyncio.create_task(server.close())
        assert await idle.is_closed()
        assert (await busy.reply())[0] == 200
        assert await busy.is_closed()
        await closing


async def test_close_cancels_what_takes_too_long(plane: EchoPlane) -> None:
    plane.delay_s = 60
    server = RestServer(plane, max_body_bytes=MAX_BYTES, close_timeout_s=0.05)
    await server.start("127.0.0.1", 0)
    async with connect(server.address) as client:
        client.send(post())
        await plane.started.wait()
        await server.close()
        assert plane.cancelled.is_set()
        assert await client.is_closed()


async def test_idle_connections_are_closed_in_the_end(plane: EchoPlane, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plain_http, "_IDLE_S", 0.05)
    plane.delay_s = 0.3
    async with serve_http(RestServer(plane, max_body_bytes=MAX_BYTES)) as address, connect(address) as client:
        client.send(post())
        assert (await client.reply())[0] == 200, "closed while its request was under way"
        assert await client.is_closed()
