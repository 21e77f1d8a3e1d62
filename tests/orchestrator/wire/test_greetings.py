"""Connections that are at their TLS handshake count, and make room."""

from __future__ import annotations

import asyncio
import shutil
import ssl
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from orchestrator.wire.limits import Limits
from orchestrator.wire.rest import RestServer
from orchestrator.wire.tensors import Tensor
from orchestrator.wire.watch import Watch
from tests.orchestrator.wire.bodies import HEADER, head, tensor
from tests.orchestrator.wire.conftest import MAX_BYTES
from tests.orchestrator.wire.test_plain_http import BODY, LIVE, Client, connect, post
from tests.orchestrator.wire.test_slow_clients import until
from tests.orchestrator.wire.test_tls import KEY, NAMES, openssl

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from orchestrator.wire.plain_http import _Connection
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
        cut = 50 - 15
        await until(lambda: sum(each.reader.at_eof() or each.reader.exception() is not None for each in silent) == cut)
        assert num_open(server) == 16
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
            # one did not speak TLS
            await until(lambda: num_open(server) == 2)
        await until(lambda: num_open(server) == 0)


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


def tls_of(connection: _Connection) -> Any:
    transport: Any = connection._transport
    return transport._ssl_protocol


async def test_connections_share_what_they_receive_through(plane: EchoPlane, certificate: Path) -> None:
    async with serving(plane, certificate, 16) as server, AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(within_tls(server, certificate)) for _ in range(3)]
        greetings, plain = server._greetings, server._plain.connections
        assert greetings is not None
        await until(lambda: len(plain) == 3 and not len(greetings))
        assert all(tls_of(each).get_buffer(-1).obj is greetings._received for each in plain)
        # what each had for its greeting
        assert all(tls_of(each).max_size == 1 << 14 for each in plain)
        # all at once
        size = MAX_BYTES - 1000
        texts = [bytes([number]) * size for number in range(3)]
        part = {"datatype": "UINT8", "shape": [size], "parameters": {"binary_data_size": size}}
        begin = head({"name": "x", **part}, parameters={"binary_data_output": True})
        requests = [post(begin + text, f"{HEADER}: {len(begin)}") for text in texts]
        for start in range(0, len(requests[0]), 10_000):
            for client, request in zip(clients, requests, strict=True):
                client.send(request[start : start + 10_000])
            await asyncio.sleep(0)
        for client, text in zip(clients, texts, strict=True):
            status, headers, body = await client.reply()
            assert (status, body[int(headers[HEADER]) :] == text) == (200, True)


@pytest.mark.parametrize("extra", [(), ("X_y: goes to aiohttp",)], ids=["plain", "odd"])
async def test_an_answer_that_is_not_read_within_tls_is_not_kept(
    plane: EchoPlane, certificate: Path, extra: tuple[str, ...]
) -> None:
    plane.outputs = [Tensor("y", "INT32", np.zeros(1 << 22, np.int32))]
    watch = Watch(Limits(client_timeout_s=10.0))
    async with serving(plane, certificate, 16) as server, within_tls(server, certificate) as client:
        transport: Any = client.writer.transport
        transport.pause_reading()
        client.send(post(head(tensor([1]), parameters={"binary_data_output": True}), *extra))
        await until(
            lambda: any(each.owes and each.num_requests for each in (*server._plain.connections, *server._handed_over))
        )
        for now_s in range(0, 1000, 9):
            watch.look(server._plain.connections, server._handed_over, now_s)
            # the kernels take some more, which counts as read
            await asyncio.sleep(0.01)
            if num_open(server) == 0:
                break
        assert num_open(server) == 0
