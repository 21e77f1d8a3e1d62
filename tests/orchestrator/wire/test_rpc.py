"""gRPC: what stock clients cannot send, and what they do not show."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from orchestrator.wire.not_offered import RPCS as NOT_OFFERED
from orchestrator.wire.rpc import InferenceServicer, build_rpc_server
from orchestrator.wire.tensors import Tensor
from tests.orchestrator.wire.conftest import MAX_BYTES

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.orchestrator.wire.echo_plane import EchoPlane

RPCS = [name for name, _ in inspect.getmembers(service_pb2_grpc.GRPCInferenceServiceServicer, inspect.isfunction)]


@asynccontextmanager
async def connect(address: str) -> AsyncIterator[Any]:
    async with grpc.aio.insecure_channel(address) as channel:
        yield service_pb2_grpc.GRPCInferenceServiceStub(channel)


def message(*inputs: dict[str, Any], **rest: Any) -> Any:
    return service_pb2.ModelInferRequest(model_name="echo", inputs=inputs, **rest)


def typed(datatype: str, shape: list[int], **contents: Any) -> dict[str, Any]:
    return {"name": "x", "datatype": datatype, "shape": shape, "contents": contents}


async def refused(address: str, request: Any) -> tuple[grpc.StatusCode, str]:
    async with connect(address) as stub:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.ModelInfer(request)
    sentence = caught.value.details()
    assert sentence
    assert "\n" not in sentence
    return caught.value.code(), sentence


@pytest.mark.parametrize(
    ("datatype", "contents", "dtype"),
    [
        ("BOOL", {"bool_contents": [True, False]}, np.bool_),
        ("INT8", {"int_contents": [-128, 127]}, np.int8),
        ("INT16", {"int_contents": [-(2**15), 2**15 - 1]}, np.int16),
        ("INT32", {"int_contents": [-(2**31), 2**31 - 1]}, np.int32),
        ("INT64", {"int64_contents": [-(2**63), 2**63 - 1]}, np.int64),
        ("UINT8", {"uint_contents": [0, 255]}, np.uint8),
        ("UINT16", {"uint_contents": [0, 2**16 - 1]}, np.uint16),
        ("UINT32", {"uint_contents": [0, 2**32 - 1]}, np.uint32),
        ("UINT64", {"uint64_contents": [0, 2**64 - 1]}, np.uint64),
        ("FP32", {"fp32_contents": [-1.5, 0.5]}, np.float32),
        ("FP64", {"fp64_contents": [0.1, 1e308]}, np.float64),
        ("BYTES", {"bytes_contents": [b"", b"\0a\xff"]}, object),
    ],
)
async def test_typed_contents(
    rpc_address: str, plane: EchoPlane, datatype: str, contents: dict[str, Any], dtype: Any
) -> None:
    async with connect(rpc_address) as stub:
        response = await stub.ModelInfer(message(typed(datatype, [2, 1], **contents)))
    (array,) = [tensor.array for tensor in plane.requests[0].inputs]
    (values,) = contents.values()
    assert array.dtype == dtype
    assert array.ravel().tolist() == values
    assert len(response.raw_output_contents) == 1
    assert not response.outputs[0].HasField("contents")


async def test_typed_contents_may_be_empty(rpc_address: str) -> None:
    async with connect(rpc_address) as stub:
        response = await stub.ModelInfer(message(typed("INT8", [0, 2])))
    assert list(response.outputs[0].shape) == [0, 2]


@pytest.mark.parametrize(
    ("request_", "sentence"),
    [
        (message(typed("FP32", [1], fp32_contents=[1]), raw_input_contents=[b"abcd"]), "although the request uses raw"),
        (message(typed("FP32", [1]), raw_input_contents=[b"abcd"]), "although the request uses raw"),
        (message(typed("FP32", [1], fp32_contents=[1]), raw_input_contents=[b"a", b"b"]), "1 inputs but 2 raw"),
        (message(typed("FP32", [1], int_contents=[1])), "has int_contents instead of fp32_contents"),
        (message(typed("FP32", [1], fp32_contents=[1], int_contents=[1])), "has int_contents instead"),
        (message(typed("FP32", [2], fp32_contents=[1])), "has 1 elements in fp32_contents"),
        (message(typed("FP32", [2**62, 2**62], fp32_contents=[1])), "has 1 elements in fp32_contents"),
        (message(typed("FP32", [-1, -1], fp32_contents=[1])), "negative dimension"),
        (message(typed("FP16", [1], fp32_contents=[1])), "FP16 data needs raw_input_contents"),
        (message(typed("BF16", [1], fp32_contents=[1])), "BF16 data needs raw_input_contents"),
        (message(typed("INT7", [1], int_contents=[1])), "unknown datatype 'INT7'"),
        (message(typed("", [1], int_contents=[1])), "unknown datatype ''"),
        (message(typed("INT8", [1], int_contents=[128])), "outside the range of INT8"),
        (message(typed("UINT16", [1], uint_contents=[65536])), "outside the range of UINT16"),
        (message(typed("INT8", [1])), "has 0 elements"),
        (message(typed("BOOL", [1], bool_contents=[True]), typed("BOOL", [1], bool_contents=[True])), "already exists"),
        (message(parameters={"triton_x": {"bool_param": True}}), "reserved"),
        (message(parameters={"a": {}}), "'a' has no value"),
        (
            message({"name": "x", "datatype": "BYTES", "shape": [1]}, raw_input_contents=[b"\x03\0\0\0a"]),
            "ends within an element",
        ),
        (
            message({"name": "x", "datatype": "BOOL", "shape": [1]}, raw_input_contents=[b"\x03"]),
            "neither 0 nor 1",
        ),
    ],
)
async def test_bad_requests_are_refused(rpc_address: str, plane: EchoPlane, request_: Any, sentence: str) -> None:
    code, details = await refused(rpc_address, request_)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert sentence in details
    assert plane.requests == []


@pytest.mark.parametrize("name", NOT_OFFERED)
async def test_other_rpcs_say_that_they_are_not_offered(rpc_address: str, name: str) -> None:
    async with connect(rpc_address) as stub:
        answer = getattr(stub, name)(getattr(service_pb2, f"{name}Request")())
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await answer
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
    assert caught.value.details() == f"{name}: {NOT_OFFERED[name]}"


def test_no_rpc_is_inherited() -> None:
    assert set(RPCS) <= set(vars(InferenceServicer))


async def test_deadline_reaches_the_data_plane(rpc_address: str, plane: EchoPlane) -> None:
    async with connect(rpc_address) as stub:
        await stub.ModelInfer(message(), timeout=20)
        await stub.ModelInfer(message())
    first, second = plane.requests
    assert first.client_timeout_s is not None
    # gRPC rounds up what it sends to two or three digits
    assert 19 < first.client_timeout_s <= 20.2
    assert second.client_timeout_s is None


async def test_a_client_that_hangs_up_cancels_its_request(rpc_address: str, plane: EchoPlane) -> None:
    plane.delay_s = 60
    async with connect(rpc_address) as stub:
        call = stub.ModelInfer(message())
        await plane.started.wait()
        call.cancel()
        await asyncio.wait_for(plane.cancelled.wait(), 5)
        plane.delay_s = 0
        await stub.ModelInfer(message())


async def test_large_answers(rpc_address: str, plane: EchoPlane) -> None:
    array = np.arange(1 << 18, dtype=np.int32)
    plane.outputs = [Tensor("y", "INT32", array)]
    async with connect(rpc_address) as stub:
        response = await stub.ModelInfer(message())
    assert response.raw_output_contents[0] == array.tobytes()


@pytest.mark.parametrize("reuse_port", [False, True])
async def test_a_port_is_shared_only_on_purpose(plane: EchoPlane, reuse_port: bool) -> None:
    first, second = (build_rpc_server(plane, max_message_bytes=MAX_BYTES, reuse_port=reuse_port) for _ in range(2))
    port = first.add_insecure_port("127.0.0.1:0")
    await first.start()
    try:
        with contextlib.nullcontext() if reuse_port else pytest.raises(RuntimeError):
            assert second.add_insecure_port(f"127.0.0.1:{port}") == port
    finally:
        await first.stop(None)
        await second.stop(None)
