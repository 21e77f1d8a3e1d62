"""Whatever comes while a server closes is closed with it, and nothing is logged of it."""

from __future__ import annotations

import asyncio
import gc
import socket
import ssl
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from orchestrator.wire import greetings
from orchestrator.wire.rest import RestServer
from orchestrator.wire.tensors import Tensor
from tests.orchestrator.wire.bodies import head, tensor
from tests.orchestrator.wire.conftest import MAX_BYTES
from tests.orchestrator.wire.test_greetings import certificate, within_tls
from tests.orchestrator.wire.test_plain_http import BODY, LIVE, Client, connect, post
from tests.orchestrator.wire.test_slow_clients import is_cut, until

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.orchestrator.wire.echo_plane import EchoPlane

__all__ = ["certificate"]  # a fixture
ODD = post(BODY, "X_y: goes to aiohttp")


@pytest.fixture(autouse=True)
def _nothing_is_logged(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    yield
    assert [record.getMessage() for record in caplog.get_records("call")] == []


async def test_a_connection_that_was_not_accepted_yet_is_closed(plane: EchoPlane) -> None:
    server = RestServer(plane, max_body_bytes=MAX_BYTES)
    await server.start("127.0.0.1", 0)
    host, port = server.address.split(":")
    # no turn of the event loop: the kernel has it
    with socket.create_connection((host, int(port))) as client:
        await server.close()
        assert server._late is not None
        assert server._late.done()
        client.settimeout(20)
        assert client.recv(1) == b""


async def test_a_connection_that_is_made_later_is_closed(plane: EchoPlane) -> None:
    server = RestServer(plane, max_body_bytes=MAX_BYTES)
    await server.start("127.0.0.1", 0)
    await server.close()
    ours, theirs = socket.socketpair()
    client = Client(*await asyncio.open_connection(sock=theirs))
    client.send(LIVE + ODD)
    await asyncio.get_running_loop().connect_accepted_socket(server._plain.new_connection, ours)
    assert await is_cut(client)
    client.writer.close()
    await until(lambda: len(server._plain.connections) == 0)


async def test_an_odd_request_that_waits_behind_an_answer_is_not_begun(plane: EchoPlane) -> None:
    plane.outputs = [Tensor("y", "INT32", np.zeros(1 << 22, np.int32))]
    server = RestServer(plane, max_body_bytes=MAX_BYTES)
    await server.start("127.0.0.1", 0)
    async with connect(server.address) as client:
        transport: Any = client.writer.transport
        transport.pause_reading()
        client.send(post(head(tensor([1]), parameters={"binary_data_output": True})) + ODD)
        await until(lambda: any(each._drained is not None for each in server._plain.connections))
        closing = asyncio.create_task(server.close())
        await until(lambda: server._runner.server is None)
        transport.resume_reading()
        assert (await client.reply())[0] == 200
        assert await is_cut(client)
        await closing
    assert len(plane.requests) == 1
    # a task that failed says so when it goes
    del closing
    gc.collect()


async def test_greetings_end_at_once(plane: EchoPlane, certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(greetings, "_HANDSHAKE_S", 60.0)
    plane.delay_s = 60.0
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate / "cert", certificate / "key")
    server = RestServer(plane, max_body_bytes=MAX_BYTES)
    await server.start("127.0.0.1", 0, tls=context)
    async with within_tls(server, certificate) as busy, connect(server.address) as greeting:
        busy.send(post())
        await plane.started.wait()
        greeting.send(b"\x16\x03\x01")
        await until(lambda: bool(server._greetings))
        closing = asyncio.create_task(server.close())
        assert await is_cut(greeting)
        assert not closing.done()
        plane.cancelled.clear()
        busy.writer.close()
        await closing
    assert len(server._plain.connections) == 0


async def test_a_greeting_that_ends_meanwhile_is_closed(
    plane: EchoPlane,
    certificate: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate / "cert", certificate / "key")
    server = RestServer(plane, max_body_bytes=MAX_BYTES)
    await server.start("127.0.0.1", 0, tls=context)
    assert server._greetings is not None
    # as if it had read all that it needs
    monkeypatch.setattr(server._greetings, "end", lambda: None)
    async with connect(server.address) as begun:
        await until(lambda: bool(server._greetings))
        await server.close()
        trust = ssl.create_default_context(cafile=str(certificate / "cert"))
        loop = asyncio.get_running_loop()
        # the client's end of the greeting, on the same socket
        transport: Any = begun.writer.transport
        tls = await loop.start_tls(transport, asyncio.Protocol(), trust, server_hostname="localhost")
        assert tls is not None
        await until(transport.is_closing)
        await until(lambda: len(server._plain.connections) == 0)
