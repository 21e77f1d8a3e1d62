"""What a hostile, broken or unlucky client may do: each request gets one answer or a closed connection."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING

import pytest

from orchestrator.wire.rest import RestServer
from tests.orchestrator.wire.conftest import MAX_BYTES
from tests.orchestrator.wire.stock_clients import serve_http
from tests.orchestrator.wire.test_plain_http import BODY, LIVE, connect, post

if TYPE_CHECKING:
    from orchestrator.wire.tensors import InferRequest, InferResponse
    from tests.orchestrator.wire.echo_plane import EchoPlane

ODD = post(BODY, "X_y: goes to aiohttp")
TLS_HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(100, 240))


@pytest.mark.parametrize(
    "beginning",
    [
        TLS_HELLO,
        b"SSH-2.0-OpenSSH_9.2p1\r\n",
        LIVE.replace(b"\r\n", b"\n"),
        LIVE.replace(b"\r\n", b"\r"),
        LIVE[:-2] + b"X: a\0",
    ],
)
async def test_what_cannot_become_http_is_refused_without_waiting_for_more(rest_address: str, beginning: bytes) -> None:
    async with connect(rest_address) as client:
        client.send(LIVE)
        assert (await client.reply())[0] == 200
        client.send(beginning)
        async with asyncio.timeout(5):
            assert (await client.reader.read()).split()[1] == b"400"


@pytest.mark.parametrize("method", [b"GET", b"POST"])
async def test_any_part_of_a_plain_head_is_waited_with(rest_address: str, method: bytes) -> None:
    data = method + LIVE[3:-2] + b"X:\ta~ !\r\nContent-Length: 0\r\n\r\n"
    async with connect(rest_address) as client:
        for length in range(1, len(data)):
            client.send(data[:length])
            await asyncio.sleep(0)
            client.send(data[length:])
            assert (await client.reply())[0] in (200, 405)


@pytest.mark.parametrize("request_bytes", [post(), ODD])
async def test_a_request_cancelled_from_within_closes_its_connection(
    rest_address: str, plane: EchoPlane, monkeypatch: pytest.MonkeyPatch, request_bytes: bytes
) -> None:
    async def infer(_request: InferRequest) -> InferResponse:
        raise asyncio.CancelledError

    monkeypatch.setattr(plane, "infer", infer)
    async with connect(rest_address) as client:
        client.send(request_bytes)
        assert await client.is_closed()


@pytest.mark.parametrize("behind", [post(), ODD, LIVE])
async def test_close_answers_what_is_under_way_and_nothing_behind_it(plane: EchoPlane, behind: bytes) -> None:
    plane.delay_s = 0.05
    server = RestServer(plane, max_body_bytes=MAX_BYTES)
    await server.start("127.0.0.1", 0)
    async with connect(server.address) as client:
        client.send(post() + behind)
        await plane.started.wait()
        await server.close()
        status, headers, _ = await client.reply()
        assert (status, headers["Connection"]) == (200, "close")
        assert await client.is_closed()
    assert len(plane.requests) == 1


async def test_a_body_in_tiny_pieces_takes_no_more_memory_than_its_bytes(plane: EchoPlane) -> None:
    server = RestServer(plane, max_body_bytes=MAX_BYTES)
    body = BODY + b" " * 20_000
    async with serve_http(server) as address, connect(address) as client:
        client.send(LIVE)
        assert (await client.reply())[0] == 200
        (connection,) = server._plain.connections
        data = post(body)
        for number in data[:-1]:
            # as the event loop calls it, so that the pieces stay apart
            connection.data_received(bytes([number]))
        assert len(connection._chunks) <= len(data) / 1000
        client.send(data[-1:])
        status, _, answer = await client.reply()
        assert status == 200
        assert json.loads(answer)["outputs"][0]["data"] == [1]
