"""Connections that are at their TLS handshake count, and make room."""

from __future__ import annotations

import asyncio
import shutil
import ssl
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING

import pytest

from orchestrator.wire.limits import Limits
from orchestrator.wire.rest import RestServer
from tests.orchestrator.wire.conftest import MAX_BYTES
from tests.orchestrator.wire.test_plain_http import BODY, LIVE, Client, connect, post
from tests.orchestrator.wire.test_tls import KEY, NAMES, openssl

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.orchestrator.wire.echo_plane import EchoPlane

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("certificate")
    openssl(folder, "req", "-x509", *KEY, "-keyout", "key", "-out", "cert", "-subj", "/CN=server", "-addext", NAMES,
            "-days", "2")  # fmt: skip
    return folder


@asynccontextmanager
async def serving(plane: EchoPlane, certificate: Path, max_connections: int) -> AsyncIterator[RestServer]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate / "cert", certificate / "key")
    server = RestServer(plane, max_body_bytes=MAX_BYTES, limits=Limits(max_connections=max_connections))
    await server.start("127.0.0.1", 0, tls=context)
    try:
        yield server
    finally:
        await server.close()


@asynccontextmanager
async def within_tls(server: RestServer, certificate: Path) -> AsyncIterator[Client]:
    host, port = server.address.split(":")
    context = ssl.create_default_context(cafile=str(certificate / "cert"))
    reader, writer = await asyncio.open_connection(host, int(port), ssl=context)
    try:
        yield Client(reader, writer)
    finally:
        writer.close()


def num_open(server: RestServer) -> int:
    assert server._greetings is not None
    return len(server._plain.connections) + len(server._handed_over) + len(server._greetings)


@pytest.mark.parametrize("beginning", [b"", b"\x16\x03\x01"], ids=["nothing", "half a greeting"])
async def test_clients_that_never_greet_make_room(plane: EchoPlane, certificate: Path, beginning: bytes) -> None:
    async with serving(plane, certificate, 16) as server, AsyncExitStack() as stack:
        used = await stack.enter_async_context(within_tls(server, certificate))
        used.send(LIVE)
        assert (await used.reply())[0] == 200
        silent = [await stack.enter_async_context(connect(server.address)) for _ in range(50)]
        for client in silent:
            client.send(beginning)
        await asyncio.sleep(0.05)
        assert num_open(server) == 16
        assert sum(client.reader.at_eof() or client.reader.exception() is not None for client in silent) == 50 - 15
        one_more = await stack.enter_async_context(within_tls(server, certificate))
        for client in (one_more, used):
            client.send(LIVE)
            assert (await client.reply())[0] == 200
        assert num_open(server) == 16


async def test_whoever_is_gone_does_not_count(plane: EchoPlane, certificate: Path) -> None:
    async with serving(plane, certificate, 16) as server:
        async with AsyncExitStack() as stack:
            for beginning in (b"", b"GET / HTTP/1.1\r\n\r\n"):
                (await stack.enter_async_context(connect(server.address))).send(beginning)
            await stack.enter_async_context(within_tls(server, certificate))
            await asyncio.sleep(0.05)
            # one did not speak TLS
            assert num_open(server) == 2
        await asyncio.sleep(0.05)
        assert num_open(server) == 0


async def test_where_all_are_busy_one_more_is_cut_off(plane: EchoPlane, certificate: Path) -> None:
    plane.delay_s = 0.5
    async with serving(plane, certificate, 2) as server, AsyncExitStack() as stack:
        busy = [await stack.enter_async_context(within_tls(server, certificate)) for _ in range(2)]
        for client in busy:
            client.send(post(BODY))
        await plane.started.wait()
        await asyncio.sleep(0.1)
        with pytest.raises(OSError):  # noqa: PT011 - however the end of it is seen
            await stack.enter_async_context(within_tls(server, certificate))
        for client in busy:
            assert (await client.reply())[0] == 200
