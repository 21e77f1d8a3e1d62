"""HTTP: what stock clients cannot send, and what they do not show."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import select
import socket
import threading
import time
import zlib
from typing import TYPE_CHECKING, Any

import aiohttp
import numpy as np
import pytest

from cascadeserve.errors import Unavailable
from orchestrator.wire import compression
from orchestrator.wire.rest import RestServer
from orchestrator.wire.tensors import Tensor
from tests.orchestrator.wire.bodies import HEADER, INFER, binary, head, tensor, with_buffer
from tests.orchestrator.wire.conftest import MAX_BYTES
from tests.orchestrator.wire.stock_clients import StockClient, send, serve_http

if TYPE_CHECKING:
    from tests.orchestrator.wire.echo_plane import EchoPlane


async def test_parameters_that_are_null_are_none(rest_address: str) -> None:
    body = {"inputs": [tensor([1]) | {"parameters": None}], "outputs": [{"name": "x", "parameters": None}]}
    reply = await send(rest_address, INFER, json.dumps(body).encode())
    assert (reply.status, json.loads(reply.body)["outputs"][0]["data"]) == (200, [1])


async def test_no_answer_names_what_it_is_made_with(rest_address: str) -> None:
    packed = await send(rest_address, INFER, gzip.compress(head(tensor([1]))), headers={"Content-Encoding": "gzip"})
    plain = await send(rest_address, INFER, head(tensor([1])))
    assert (packed.status, plain.status) == (200, 200)
    assert "Server" not in packed.headers
    assert "Server" not in plain.headers


@pytest.mark.parametrize(
    ("datatype", "values"),
    [
        ("BOOL", [True, False]),
        ("UINT8", [0, 255]),
        ("UINT16", [0, 2**16 - 1]),
        ("UINT32", [0, 2**32 - 1]),
        ("UINT64", [0, 2**64 - 1]),
        ("INT8", [-128, 127]),
        ("INT16", [-(2**15), 2**15 - 1]),
        ("INT32", [-(2**31), 2**31 - 1]),
        ("INT64", [-(2**63), 2**63 - 1]),
        ("FP32", [-1.5, 2]),
        ("FP64", [0.1, 1e308]),
        ("BYTES", ["", "Grüße"]),
    ],
)
async def test_json_in_and_out(rest_address: str, datatype: str, values: list[Any]) -> None:
    reply = await send(rest_address, INFER, head(tensor(values, datatype)))
    assert reply.status == 200
    assert reply.headers["Content-Type"].startswith("application/json")
    assert HEADER not in reply.headers
    assert json.loads(reply.body) == {
        "model_name": "echo",
        "model_version": "1",
        "outputs": [{"name": "x", "datatype": datatype, "shape": [2], "data": values}],
    }


@pytest.mark.parametrize("datatype", ["FP32", "FP64"])
async def test_json_may_hold_what_is_not_finite(rest_address: str, datatype: str) -> None:
    """It is not JSON, but what tritonclient writes and Triton reads."""
    values = [float("inf"), float("-inf"), 1.5, float("nan")]
    for body in (head(tensor(values, datatype)), head(tensor([values[:2], values[2:]], datatype, shape=[4]))):
        reply = await send(rest_address, INFER, body)
        assert reply.status == 200
        np.testing.assert_array_equal(json.loads(reply.body)["outputs"][0]["data"], values)


@pytest.mark.parametrize("kind", ["http", "http.aio"])
async def test_clients_choose_json_or_binary_per_tensor(rest_address: str, kind: str) -> None:
    client = StockClient(kind, rest_address)
    array = np.arange(6, dtype=np.float32).reshape(1, 6)
    inputs = [client.input("a", "FP32", array, binary=False), client.input("b", "FP32", array)]
    outputs = [client.output("b", binary=False), client.output("a", binary=True)]
    result = await client.call("infer", "echo", inputs, outputs=outputs)
    first, second = result.get_response()["outputs"]
    assert "data" in first
    assert second["parameters"] == {"binary_data_size": 24}
    for name in ("a", "b"):
        np.testing.assert_array_equal(result.as_numpy(name), array)


@pytest.mark.parametrize("kind", ["http", "http.aio"])
async def test_nan_is_written_as_triton_writes_it(rest_address: str, plane: EchoPlane, kind: str) -> None:
    client = StockClient(kind, rest_address)
    array = np.array([np.nan, np.inf, -np.inf, 1], np.float32)
    plane.outputs = [Tensor("y", "FP32", array)]
    inputs = [client.input("x", "FP32", array)]
    result = await client.call("infer", "echo", inputs, outputs=[client.output("y", binary=False)])
    np.testing.assert_array_equal(result.as_numpy("y"), array)


@pytest.mark.parametrize(
    "data", [[[1, 2], [3, 4], [5, 6]], [1, 2, 3, 4, 5, 6], [[1, 2, 3], [4, 5, 6]], [[[1], 2], 3, 4, 5, 6]]
)
async def test_data_may_be_nested(rest_address: str, data: Any) -> None:
    reply = await send(rest_address, INFER, head(tensor(data, shape=[2, 3])))
    assert json.loads(reply.body)["outputs"][0]["data"] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("requested", "default", "is_binary"),
    [
        (None, None, False),
        (None, True, True),
        (None, False, False),
        ({}, True, True),
        ({"binary_data": False}, True, False),
        ({"binary_data": True}, False, True),
        ({"binary_data": True}, None, True),
    ],
)
async def test_output_form(
    rest_address: str,
    plane: EchoPlane,
    requested: dict[str, bool] | None,
    default: bool | None,
    is_binary: bool,
) -> None:
    rest: dict[str, Any] = {}
    if requested is not None:
        rest["outputs"] = [{"name": "x", "parameters": requested}]
    if default is not None:
        rest["parameters"] = {"binary_data_output": default}
    reply = await send(rest_address, INFER, head(tensor([7]), **rest))
    assert (HEADER in reply.headers) is is_binary
    if is_binary:
        assert reply.headers["Content-Type"] == "application/octet-stream"
        assert reply.body[int(reply.headers[HEADER]) :] == b"\x07\0\0\0"
    # how the answer is written is the wire's business
    assert plane.requests[0].parameters == {}


async def test_unknown_keys_are_ignored(rest_address: str) -> None:
    item = tensor([1]) | {"parameters": {"content_type": "np"}, "more": {"a": [1, None]}}
    assert (await send(rest_address, INFER, head(item, extra=[1]))).status == 200


@pytest.mark.parametrize(
    ("model", "body", "shape"),
    [
        ("echo", np.ones((1, 1, 32, 32), np.float32).tobytes(), [1, 1, 32, 32]),
        ("variable", b"\x01\0" * 6, [1, 3, 2]),
        ("variable", b"", [1, 0, 2]),
    ],
)
async def test_raw_request(rest_address: str, model: str, body: bytes, shape: list[int]) -> None:
    reply = await send(rest_address, f"/v2/models/{model}/infer", body, headers={HEADER: "0"})
    assert reply.status == 200
    length = int(reply.headers[HEADER])
    (output,) = json.loads(reply.body[:length])["outputs"]
    assert output["shape"] == shape
    assert reply.body[length:] == body


async def test_raw_request_of_text(rest_address: str, plane: EchoPlane) -> None:
    reply = await send(rest_address, "/v2/models/text/infer", b"a line\0", headers={HEADER: "0"})
    assert reply.status == 200
    assert plane.requests[0].inputs[0].array.tolist() == [[b"a line\0"]]


@pytest.mark.parametrize(
    ("path", "status", "sentence"),
    [
        ("/v2/models/echo/infer", 400, "needs 4096 bytes of data but got 5"),
        ("/v2/models/variable/infer", 400, "needs 4 bytes of data but got 5"),
        ("/v2/models/ragged/infer", 400, "several variable dimensions"),
        ("/v2/models/pair/infer", 400, "one input but 'pair' has 2"),
        ("/v2/models/nobody/infer", 404, "no model 'nobody'"),
        ("/v2/models/echo/versions/7/infer", 404, "no version '7'"),
    ],
)
async def test_bad_raw_requests(rest_address: str, path: str, status: int, sentence: str) -> None:
    reply = await send(rest_address, path, b"abcde", headers={HEADER: "0"})
    assert reply.status == status
    assert sentence in reply.error


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 404),
        ("GET", "/v2/", 404),
        ("GET", "/v3", 404),
        ("GET", "/v2/repository/index", 405),
        ("POST", "/v2/models/echo/config", 405),
        ("GET", "/v2/models/nope/config", 404),
        ("GET", "/v2/models/echo/versions/9/config", 404),
        ("GET", "/v2/models/nope/stats", 400),
        ("POST", "/v2/repository/models/echo/load", 501),
        ("POST", "/v2/repository/other/models/echo/unload", 501),
        ("GET", "/v2/systemsharedmemory/status", 501),
        ("POST", "/v2/cudasharedmemory/region/a/register", 501),
        ("GET", "/v2/trace/setting", 501),
        ("POST", "/v2/models/echo/trace/setting", 501),
        ("GET", "/v2/logging", 501),
        ("POST", "/v2/models/echo/versions/1/generate_stream", 501),
        ("GET", INFER, 405),
        ("PUT", INFER, 405),
        ("POST", "/v2/health/live", 405),
        ("DELETE", "/v2/models/echo", 405),
        ("GET", "/v2/models/%ff%00", 404),
        ("GET", "/v2/models/%ED%A0%80", 404),
    ],
)
async def test_other_paths_and_methods(rest_address: str, method: str, path: str, status: int) -> None:
    reply = await send(rest_address, path, method=method)
    assert reply.status == status
    assert reply.error
    assert ("Allow" in reply.headers) is (status == 405)
    if path == INFER and method != "POST":
        assert reply.headers["Allow"] == "POST"


async def test_head_is_not_allowed(rest_address: str) -> None:
    assert (await send(rest_address, "/v2", method="HEAD")).status == 405


async def test_readiness_as_triton_answers_it(rest_address: str, plane: EchoPlane) -> None:
    async def state(path: str) -> tuple[int, bytes]:
        reply = await send(rest_address, path, method="GET")
        return reply.status, reply.body

    assert await state("/v2/health/live") == (200, b"")
    assert await state("/v2/health/ready") == (200, b"")
    assert await state("/v2/models/echo/versions/1/ready") == (200, b"")
    assert await state("/v2/models/nobody/ready") == (400, b'{"error":"Model version not ready"}')
    plane.is_ready = False
    assert await state("/v2/health/ready") == (400, b"")


async def test_model_names_may_be_escaped(rest_address: str) -> None:
    reply = await send(rest_address, "/v2/models/no%20b%C3%BCdy", method="GET")
    assert (reply.status, reply.error) == (404, "no model 'no büdy'")


async def test_metrics(rest_address: str, plane: EchoPlane) -> None:
    reply = await send(rest_address, "/metrics", method="GET")
    assert (reply.body, reply.headers["Content-Type"]) == await plane.metrics()


async def test_without_metrics(plane: EchoPlane) -> None:
    async with serve_http(RestServer(plane, max_body_bytes=MAX_BYTES, metrics=None)) as address:
        assert (await send(address, "/metrics", method="GET")).status == 404


async def test_a_limit_is_needed(plane: EchoPlane) -> None:
    with pytest.raises(ValueError, match="max_body_bytes"):
        RestServer(plane, max_body_bytes=0, metrics=None)


async def test_unavailable_says_when_to_come_back(rest_address: str, plane: EchoPlane) -> None:
    plane.error = Unavailable("full")
    reply = await send(rest_address, INFER, head(tensor([1])))
    assert (reply.status, reply.error, reply.headers["Retry-After"]) == (503, "full", "1")


@pytest.mark.parametrize(("encoding", "pack"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
async def test_compressed_bodies(rest_address: str, encoding: str, pack: Any) -> None:
    body, length = with_buffer(binary(4), b"abcd")
    headers = {"Content-Encoding": encoding, HEADER: str(length)}
    assert (await send(rest_address, INFER, pack(body), headers=headers)).status == 200
    # small as sent, too large as it unfolds
    bomb = pack(head(tensor([1])) + b" " * (64 << 20))
    assert len(bomb) < MAX_BYTES
    reply = await send(rest_address, INFER, bomb, headers={"Content-Encoding": encoding})
    assert reply.status == 413
    assert "larger than the limit" in reply.error


async def test_the_wait_to_be_unfolded_counts(
    rest_address: str, plane: EchoPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("orchestrator.wire.turns._LEAST_S", -1.0)
    may_go_on = threading.Event()
    compression._THREAD.submit(may_go_on.wait, 10)
    # longer than what is unfolded without the thread
    packed = gzip.compress(head(tensor([1])) + b" " * 200_000)
    sent = [
        asyncio.create_task(send(rest_address, INFER, packed, headers={"Content-Encoding": "gzip"})) for _ in range(5)
    ]
    async with asyncio.timeout(10):
        while len(plane.not_read) < 3:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    may_go_on.set()
    refused = [reply for reply in await asyncio.gather(*sent) if reply.status != 200]
    assert [reply.status for reply in refused] == [503] * 3
    first, second = plane.requests
    assert 0 <= first.waited_s < second.waited_s
    # as demand that was not served
    assert len(plane.not_read) == 3
    assert {(reply.error, reply.headers["Retry-After"]) for reply in refused} == {
        ("too many compressed requests wait to be unfolded; send them as they are", "1")
    }


@pytest.mark.parametrize(
    ("encoding", "body", "status"),
    [
        ("gzip", b"not gzip at all", 400),
        ("deflate", b"not deflate", 400),
        ("gzip", gzip.compress(b" " * 1000, mtime=0)[:-20], 400),
        ("br", b"x", 501),
        ("nonsense", b"x", 501),
    ],
)
async def test_broken_encodings(rest_address: str, encoding: str, body: bytes, status: int) -> None:
    reply = await send(rest_address, INFER, body, headers={"Content-Encoding": encoding})
    assert reply.status == status
    assert reply.error


async def test_limit_is_exact_and_holds_for_chunks(rest_address: str) -> None:
    small = head(tensor([1]))
    full = small + b" " * (MAX_BYTES - len(small))
    assert (await send(rest_address, INFER, full)).status == 200
    assert (await send(rest_address, INFER, full + b" ")).status == 413

    async def chunks() -> Any:
        for _ in range(5):
            yield b" " * (MAX_BYTES // 4)

    async with (
        aiohttp.ClientSession() as session,
        session.post(f"http://{rest_address}{INFER}", data=chunks()) as response,
    ):
        assert response.status == 413
        assert "larger than the limit" in (await response.json())["error"]


async def test_large_answers(rest_address: str, plane: EchoPlane) -> None:
    array = np.arange(1 << 19, dtype=np.int32)
    plane.outputs = [Tensor("y", "INT32", array)]
    reply = await send(rest_address, INFER, head(tensor([1]), parameters={"binary_data_output": True}))
    assert reply.body[int(reply.headers[HEADER]) :] == array.tobytes()


@pytest.mark.parametrize(
    ("output", "sentence"),
    [
        (Tensor("y", "FP16", np.ones(1, np.float16)), "sending FP16 data via JSON is not supported"),
        (Tensor("y", "BYTES", np.array([b"\xff"], object)), "not UTF-8"),
    ],
)
async def test_answers_without_a_json_form(rest_address: str, plane: EchoPlane, output: Tensor, sentence: str) -> None:
    plane.outputs = [output]
    reply = await send(rest_address, INFER, head(tensor([1])))
    assert reply.status == 400
    assert sentence in reply.error


async def test_a_client_that_hangs_up_cancels_its_request(rest_address: str, plane: EchoPlane) -> None:
    plane.delay_s = 60
    sending = asyncio.create_task(send(rest_address, INFER, head(tensor([1]))))
    await plane.started.wait()
    sending.cancel()
    await asyncio.wait_for(plane.cancelled.wait(), 5)
    # and the server goes on
    plane.delay_s = 0
    assert (await send(rest_address, INFER, head(tensor([1])))).status == 200


async def test_a_client_that_hangs_up_within_its_body_is_no_error(
    rest_address: str, plane: EchoPlane, caplog: pytest.LogCaptureFixture
) -> None:
    host, port = rest_address.split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"POST %b HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{" % INFER.encode())
    await writer.drain()
    writer.close()
    await writer.wait_closed()
    assert (await send(rest_address, INFER, head(tensor([1])))).status == 200
    assert len(plane.requests) == 1
    assert [record for record in caplog.records if record.levelno >= logging.WARNING] == []


async def test_no_line_is_logged_per_request(rest_address: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "aiohttp")
    await send(rest_address, INFER, head(tensor([1])))
    await send(rest_address, INFER, b"{")
    assert [record for record in caplog.records if record.name.startswith("aiohttp")] == []


async def test_a_burst_of_new_connections_is_not_made_to_wait_for_a_second_syn(rest_address: str) -> None:
    """While the loop is busy the kernel takes them in; where its queue is full it drops them for a second."""
    host, _, port = rest_address.rpartition(":")
    clients = [socket.socket() for _ in range(600)]
    try:
        for client in clients:
            client.setblocking(False)
            client.connect_ex((host, int(port)))
        time.sleep(0.2)  # noqa: ASYNC251 - the server must not get a chance to accept
        poll = select.poll()
        for client in clients:
            poll.register(client, select.POLLOUT)
        assert len(poll.poll(0)) == len(clients)
    finally:
        for client in clients:
            client.close()
