from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest

from orchestrator.wire.rest import RestServer
from orchestrator.wire.rpc import build_rpc_server
from tests.orchestrator.wire.echo_plane import EchoPlane
from tests.orchestrator.wire.stock_clients import CLIENTS, StockClient, serve_http

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

MAX_BYTES = 1 << 18


@pytest.fixture(scope="session", autouse=True)
def no_loop_for_synchronous_tests() -> None:
    # looptime asks for a loop even around a synchronous test; Python 3.11 would make one that nobody closes.
    asyncio.set_event_loop(None)


@pytest.fixture
def plane() -> EchoPlane:
    return EchoPlane()


@pytest.fixture
async def rest_address(plane: EchoPlane) -> AsyncIterator[str]:
    server = RestServer(plane, max_body_bytes=MAX_BYTES, metrics=plane.metrics)
    async with serve_http(server) as address:
        yield address


@pytest.fixture
def ending() -> asyncio.Event:
    """Set when the gRPC server is about to end."""
    return asyncio.Event()


@pytest.fixture
async def rpc_address(plane: EchoPlane, ending: asyncio.Event) -> AsyncIterator[str]:
    server = build_rpc_server(plane, max_message_bytes=MAX_BYTES, ending=ending)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(None)


@pytest.fixture(params=CLIENTS)
async def client(request: pytest.FixtureRequest, rest_address: str, rpc_address: str) -> StockClient:
    """Each of the four stock clients in turn; a test that takes it runs over both transports."""
    return StockClient(request.param, rest_address if request.param.startswith("http") else rpc_address)
