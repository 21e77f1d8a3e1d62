"""Servers on real sockets that behave well or badly, each over HTTP and gRPC."""

from __future__ import annotations

import asyncio
import contextlib
import json
import struct
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import numpy as np
import pytest
from aiohttp import web
from tritonclient.grpc import service_pb2, service_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

INPUT, SHAPE = "image", (2, 3)
OUTPUTS = ("label", "stage", "certainty")


@dataclass
class Script:
    """How a server behaves, and what it saw."""

    behaviour: str = "good"
    ids: list[str] = field(default_factory=list)
    timeouts_us: list[int] = field(default_factory=list)
    arrived_s: list[float] = field(default_factory=list)
    stall_until: asyncio.Event = field(default_factory=asyncio.Event)

    async def answer(self, request_id: str, timeout_us: int, rows: NDArray[Any]) -> dict[str, NDArray[Any]]:
        self.ids.append(request_id)
        self.timeouts_us.append(timeout_us)
        self.arrived_s.append(asyncio.get_running_loop().time())
        if self.behaviour == "silent":
            await asyncio.sleep(30)
        if self.behaviour == "stall":
            await self.stall_until.wait()
        # the label a row asks for is its first element
        label = rows.reshape(len(rows), -1)[:, 0].astype(np.int64)
        if self.behaviour == "short":
            label = label[:0]
        return {
            "label": label,
            "stage": (label % 2).astype(np.int32),
            "certainty": np.full(len(label), 0.75, dtype=np.float32),
        }


def _infer_body(head: dict[str, Any], outputs: dict[str, NDArray[Any]], request_id: str) -> tuple[bytes, int]:
    wanted = [one["name"] for one in head["outputs"]]
    datatypes = {"label": "INT64", "stage": "INT32", "certainty": "FP32"}
    described = [
        {
            "name": name,
            "datatype": datatypes[name],
            "shape": [len(outputs[name]), 1],
            "parameters": {"binary_data_size": outputs[name].nbytes},
        }
        for name in wanted
    ]
    answer = {
        "model_name": "digits",
        "model_version": "1",
        "id": request_id,
        "parameters": {"gear": "g0", "certified": True, "plan": "p0"},
        "outputs": described,
    }
    text = json.dumps(answer).encode()
    return text + b"".join(outputs[name].tobytes() for name in wanted), len(text)


def _read_request(body: bytes, json_length: int) -> tuple[dict[str, Any], NDArray[Any]]:
    head = json.loads(body[:json_length])
    (tensor,) = head["inputs"]
    assert tensor["parameters"]["binary_data_size"] == len(body) - json_length
    assert tensor["datatype"] == "FP32"
    return head, np.frombuffer(body[json_length:], dtype=np.float32).reshape(tensor["shape"])


@contextlib.asynccontextmanager
async def http_server(script: Script) -> AsyncIterator[str]:
    async def metadata(_: web.Request) -> web.Response:
        inputs = [{"name": INPUT, "datatype": "FP32", "shape": [-1, *SHAPE]}]
        outputs = [{"name": name, "datatype": "FP32", "shape": [-1, 1]} for name in OUTPUTS]
        return web.json_response({"name": "digits", "inputs": inputs, "outputs": outputs, "platform": "x"})

    async def infer(request: web.Request) -> web.Response:
        body = await request.read()
        head, rows = _read_request(body, int(request.headers["Inference-Header-Content-Length"]))
        outputs = await script.answer(head["id"], head["parameters"]["timeout"], rows)
        errors = {"refuse": 503, "late": 504, "fail": 500}
        if script.behaviour in errors:
            return web.json_response({"error": f"no: {head['id']}"}, status=errors[script.behaviour])
        if script.behaviour == "refuse_empty":
            return web.Response(status=503)
        if script.behaviour == "reset":
            assert request.transport is not None
            request.transport.abort()
        answer, length = _infer_body(head, outputs, "other" if script.behaviour == "wrong_id" else head["id"])
        if script.behaviour == "chunked":
            response = web.StreamResponse(headers={"Inference-Header-Content-Length": str(length)})
            response.enable_chunked_encoding()
            await response.prepare(request)
            for byte in range(0, len(answer), 50):
                await response.write(answer[byte : byte + 50])
            return response  # type: ignore[return-value]
        return web.Response(body=answer, headers={"Inference-Header-Content-Length": str(length)})

    app = web.Application()
    app.router.add_get("/v2/models/digits", metadata)
    app.router.add_post("/v2/models/digits/infer", infer)
    runner = web.AppRunner(app, shutdown_timeout=0.05, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


class _Servicer(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    def __init__(self, script: Script) -> None:
        self._script = script

    async def ModelMetadata(self, request: Any, context: Any) -> Any:  # noqa: N802
        if request.name != "digits":
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such model")
        answer = service_pb2.ModelMetadataResponse(name="digits")
        answer.inputs.add(name=INPUT, datatype="FP32", shape=[-1, *SHAPE])
        for name in OUTPUTS:
            answer.outputs.add(name=name, datatype="FP32", shape=[-1, 1])
        return answer

    async def ModelInfer(self, request: Any, context: Any) -> Any:  # noqa: N802
        rows = np.frombuffer(request.raw_input_contents[0], dtype=np.float32).reshape(request.inputs[0].shape)
        behaviour = self._script.behaviour
        outputs = await self._script.answer(request.id, request.parameters["timeout"].int64_param, rows)
        errors = {
            # the text must not be taken for the transport's own
            "refuse": (grpc.StatusCode.UNAVAILABLE, "Socket closed for the day"),
            "late": (grpc.StatusCode.DEADLINE_EXCEEDED, "the deadline passed"),
            "fail": (grpc.StatusCode.INTERNAL, f"no: {request.id}"),
        }
        if behaviour in errors:
            await context.abort(*errors[behaviour])
        answer = service_pb2.ModelInferResponse(id="other" if behaviour == "wrong_id" else request.id)
        answer.parameters["gear"].string_param = "g0"
        answer.parameters["plan"].string_param = "p0"
        answer.parameters["certified"].bool_param = True
        datatypes = {"label": "INT64", "stage": "INT32", "certainty": "FP32"}
        for one in request.outputs:
            array = outputs[one.name]
            answer.outputs.add(name=one.name, datatype=datatypes[one.name], shape=[len(array), 1])
            answer.raw_output_contents.append(array.tobytes())
        return answer


class ResettingHttp2(asyncio.Protocol):
    """Completes the HTTP/2 handshake, then resets the connection when a call arrives."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.write(b"\0\0\0\x04\0\0\0\0\0")
        self._received = b""

    def data_received(self, data: bytes) -> None:
        self._received += data
        if INPUT.encode() in self._received:
            linger = struct.pack("ii", 1, 0)
            self._transport.get_extra_info("socket").setsockopt(1, 13, linger)
            self._transport.abort()


@contextlib.asynccontextmanager
async def grpc_server(script: Script) -> AsyncIterator[str]:
    if script.behaviour == "reset":
        server = await asyncio.get_running_loop().create_server(ResettingHttp2, "127.0.0.1", 0)
        try:
            yield f"grpc://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            server.close()
        return
    grpc_aio_server = grpc.aio.server()
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(_Servicer(script), grpc_aio_server)
    port = grpc_aio_server.add_insecure_port("127.0.0.1:0")
    await grpc_aio_server.start()
    try:
        yield f"grpc://127.0.0.1:{port}"
    finally:
        await grpc_aio_server.stop(None)


@pytest.fixture(scope="session", autouse=True)
def _no_forgotten_loop() -> None:
    # Where no loop was ever set, pytest-asyncio makes one to find out and never closes it: a ResourceWarning, here an
    # error, in whatever test is running at the next garbage collection.
    asyncio.set_event_loop(None)


@pytest.fixture(params=["http", "grpc"])
def serve(request: pytest.FixtureRequest) -> Callable[[Script], contextlib.AbstractAsyncContextManager[str]]:
    return http_server if request.param == "http" else grpc_server


@pytest.fixture
def new_script() -> type[Script]:
    return Script


@pytest.fixture
def rows_path(tmp_path: Path) -> Path:
    """Ten rows, of which the last is labelled wrong."""
    rows = np.zeros((10, *SHAPE), dtype=np.float32)
    rows[:, 0, 0] = np.arange(10)
    label = np.arange(10)
    label[9] = -5
    path = tmp_path / "rows.npz"
    np.savez(path, **{f"input:{INPUT}": rows, "label": label})
    return path


@pytest.fixture
def http_thread() -> Iterator[tuple[Script, str]]:
    """A good HTTP server in a thread, for commands that run an event loop of their own."""
    script = Script()
    loop = asyncio.new_event_loop()
    started: list[str] = []
    ready, stop = threading.Event(), asyncio.Event()

    async def main() -> None:
        async with http_server(script) as url:
            started.append(url)
            ready.set()
            await stop.wait()

    def run() -> None:
        loop.run_until_complete(main())
        loop.close()

    thread = threading.Thread(target=run, name="http server")
    thread.start()
    assert ready.wait(10)
    yield script, started[0]
    loop.call_soon_threadsafe(stop.set)
    thread.join(10)


@pytest.fixture
def serve_http() -> Callable[[Script], contextlib.AbstractAsyncContextManager[str]]:
    return http_server
