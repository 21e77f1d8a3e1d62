"""A client that hangs up takes its rows along: those that wait are dropped, and what is in flight is ignored."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc.aio
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from orchestrator.wire.rest import RestServer
from orchestrator.wire.rpc import build_rpc_server
from tests.fakes.tiny import rows
from tests.orchestrator.conftest import Rig, make_rig
from tests.orchestrator.wire.bodies import binary, with_buffer
from tests.orchestrator.wire.conftest import MAX_BYTES
from tests.orchestrator.wire.stock_clients import serve_http
from tests.orchestrator.wire.test_plain_http import HEADER, connect, post

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine

BUSY_S = 0.3
X = rows([1, 2, 3], [0.9, 0.9, 0.9])
GOOD = X[:1]


def http_request(x: Any) -> bytes:
    body, length = with_buffer(binary(x.nbytes, shape=list(x.shape)), x.tobytes())
    return post(body, f"{HEADER}: {length}", path="/v2/models/family/infer")


async def hang_up_http(rig: Rig, then: Callable[[], Coroutine[Any, Any, None]]) -> None:
    server = RestServer(rig.orchestrator.data_plane, max_body_bytes=MAX_BYTES)
    async with serve_http(server) as address:
        async with connect(address) as client:
            client.send(http_request(X))
            await then()
        await asyncio.sleep(0.05)


async def hang_up_grpc(rig: Rig, then: Callable[[], Coroutine[Any, Any, None]]) -> None:
    server = build_rpc_server(rig.orchestrator.data_plane, max_message_bytes=MAX_BYTES)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    request = service_pb2.ModelInferRequest(model_name="family", raw_input_contents=[X.tobytes()])
    request.inputs.add(name="x", datatype="FP32", shape=X.shape)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        call = service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request)
        await then()
        call.cancel()
        await asyncio.sleep(0.05)
    await server.stop(None)


@pytest.mark.parametrize("hang_up", [hang_up_http, hang_up_grpc])
async def test_rows_that_wait_are_dropped(hang_up: Any) -> None:
    rig = await make_rig(busy_s={"small": BUSY_S})
    dispatcher = rig.orchestrator.dispatcher
    running = [dispatcher.submit(rig.family, [GOOD], timeout_s=5.0, want_scores=False) for _ in range(2)]

    async def until_it_waits() -> None:
        while dispatcher.queued_rows("small") < len(X):  # noqa: ASYNC110
            await asyncio.sleep(0.005)

    await hang_up(rig, until_it_waits)
    assert dispatcher.open_tickets == 2
    await asyncio.gather(*running)
    await asyncio.sleep(0)
    assert [call.rows for call in rig.fakes["a"].calls] == [1, 1]
    assert rig.family.waiting_rows() == 0
    text = rig.orchestrator.metrics.render()[0].decode()
    assert 'cascadeserve_requests_total{family="family",outcome="Cancelled"} 1.0' in text
    await rig.orchestrator.close()


@pytest.mark.parametrize("hang_up", [hang_up_http, hang_up_grpc])
async def test_rows_in_flight_go_no_further(hang_up: Any) -> None:
    rig = await make_rig(busy_s={"small": BUSY_S})
    X[:, 1] = 0.1

    async def until_it_left() -> None:
        while not rig.fakes["a"].calls:  # noqa: ASYNC110
            await asyncio.sleep(0.005)

    try:
        await hang_up(rig, until_it_left)
    finally:
        X[:, 1] = 0.9
    await asyncio.sleep(1.5 * BUSY_S)
    assert [(call.model, call.rows) for call in rig.fakes["a"].calls] == [("small", 3)]
    assert rig.orchestrator.dispatcher.endpoints[0].in_flight == 0
    assert rig.orchestrator.dispatcher.open_tickets == 0
    await rig.orchestrator.close()
