"""ModelStreamInfer, and the services beside the protocol's own."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tritonclient.grpc import service_pb2

from orchestrator.wire.rpc_stream import MAX_OPEN
from orchestrator.wire.status import SHUTTING_DOWN
from tests.orchestrator.wire.test_rpc import connect, message, typed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from orchestrator.wire.tensors import InferRequest, InferResponse
    from tests.orchestrator.wire.echo_plane import EchoPlane


def numbered(count: int, **rest: Any) -> list[Any]:
    return [message(typed("INT32", [1], int_contents=[i]), id=str(i), **rest) for i in range(count)]


async def test_one_answer_per_request_in_their_order(
    rpc_address: str, plane: EchoPlane, monkeypatch: pytest.MonkeyPatch
) -> None:
    echo = plane.infer

    async def slower_first(request: InferRequest) -> InferResponse:
        await asyncio.sleep(0.05 / (1 + int(request.id)))
        return await echo(request)

    monkeypatch.setattr(plane, "infer", slower_first)
    count = 2 * MAX_OPEN
    async with connect(rpc_address) as stub:
        answers = [answer async for answer in stub.ModelStreamInfer(iter(numbered(count)))]
    assert [answer.infer_response.id for answer in answers] == [str(i) for i in range(count)]
    assert all(answer.infer_response.parameters["triton_final_response"].bool_param for answer in answers)
    assert not any(answer.error_message for answer in answers)


async def test_an_error_takes_no_other_request_with_it(rpc_address: str) -> None:
    first, _, last = numbered(3)
    wrong = service_pb2.ModelInferRequest(model_name="nope", id="1")
    async with connect(rpc_address) as stub:
        answers = [answer async for answer in stub.ModelStreamInfer(iter([first, wrong, last]))]
    assert [answer.infer_response.id for answer in answers] == ["0", "1", "2"]
    assert [answer.error_message for answer in answers] == ["", "no model 'nope'", ""]


async def test_bytes_that_are_no_message(rpc_address: str) -> None:
    async with grpc.aio.insecure_channel(rpc_address) as channel:
        for rpc in ("ModelInfer", "ModelReady"):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await channel.unary_unary(f"/inference.GRPCInferenceService/{rpc}")(b"\xff\xff")
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        good = numbered(1)[0].SerializeToString()
        stream = channel.stream_stream("/inference.GRPCInferenceService/ModelStreamInfer")(iter([b"\xff\xff", good]))
        answers = [service_pb2.ModelStreamInferResponse.FromString(data) async for data in stream]
    assert "cannot be read" in answers[0].error_message
    assert answers[1].infer_response.id == "0"


async def test_an_empty_stream_ends(rpc_address: str) -> None:
    async with connect(rpc_address) as stub:
        assert [answer async for answer in stub.ModelStreamInfer(iter([]))] == []


async def test_the_parameter_for_empty_answers_may_be_given(rpc_address: str) -> None:
    asked = {"triton_enable_empty_final_response": {"bool_param": True}}
    wrong = {"triton_enable_empty_final_response": {"string_param": "yes"}}
    requests = [*numbered(1, parameters=asked), *numbered(1, parameters=wrong)]
    async with connect(rpc_address) as stub:
        first, second = [answer async for answer in stub.ModelStreamInfer(iter(requests))]
    assert not first.error_message
    assert "expected bool_param" in second.error_message


async def test_what_is_under_way_ends_with_its_client(rpc_address: str, plane: EchoPlane) -> None:
    plane.delay_s = 30.0
    async with connect(rpc_address) as stub:
        call = stub.ModelStreamInfer(iter(numbered(3)))
        await plane.started.wait()
        call.cancel()
        await asyncio.wait_for(plane.cancelled.wait(), 5)


async def test_no_more_than_so_many_are_under_way(rpc_address: str, plane: EchoPlane) -> None:
    plane.delay_s = 30.0

    async def requests() -> AsyncIterator[Any]:
        for request in numbered(3 * MAX_OPEN):
            yield request

    async with connect(rpc_address) as stub:
        call = stub.ModelStreamInfer(requests())
        seen = await plane.settled()
        # those in the queue, the one that waits to get in and the one that is waited for
        assert seen == MAX_OPEN + 2
        call.cancel()


async def test_an_idle_stream_ends_with_the_server(rpc_address: str, ending: asyncio.Event) -> None:
    async with connect(rpc_address) as stub:
        call = stub.ModelStreamInfer()
        (request,) = numbered(1)
        await call.write(request)
        assert (await call.read()).infer_response.id == "0"
        ending.set()
        async with asyncio.timeout(5):
            assert await call.code() is grpc.StatusCode.UNAVAILABLE
            assert await call.details() == SHUTTING_DOWN
        # and one that is opened now
        async with asyncio.timeout(5):
            assert await stub.ModelStreamInfer().code() is grpc.StatusCode.UNAVAILABLE


async def test_what_was_read_of_a_stream_is_answered_before_it_ends(
    rpc_address: str, plane: EchoPlane, ending: asyncio.Event
) -> None:
    plane.delay_s = 0.3
    count = MAX_OPEN + 2
    async with connect(rpc_address) as stub:
        call = stub.ModelStreamInfer()
        for request in numbered(count):
            await call.write(request)
        async with asyncio.timeout(10):
            while len(plane.requests) < count:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
            ending.set()
            for number in range(count):
                assert (await call.read()).infer_response.id == str(number)
            assert await call.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_stream_that_its_client_has_ended_ends_well(
    rpc_address: str, plane: EchoPlane, ending: asyncio.Event
) -> None:
    plane.delay_s = 0.3
    async with connect(rpc_address) as stub:
        call = stub.ModelStreamInfer(iter(numbered(2)))
        async with asyncio.timeout(5):
            while len(plane.requests) < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.001)
        await asyncio.sleep(0.1)
        ending.set()
        assert [answer.infer_response.id async for answer in call] == ["0", "1"]
        assert await call.code() is grpc.StatusCode.OK


@pytest.mark.parametrize("service", ["", "inference.GRPCInferenceService", "any"])
async def test_health(rpc_address: str, plane: EchoPlane, service: str) -> None:
    async with grpc.aio.insecure_channel(rpc_address) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service=service)
        assert (await stub.Check(request)).status == health_pb2.HealthCheckResponse.SERVING
        plane.is_ready = False
        assert (await stub.Check(request)).status == health_pb2.HealthCheckResponse.NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Watch(request).read()
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_reflection(rpc_address: str) -> None:
    wanted = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="inference.GRPCInferenceService"),
    ]
    async with grpc.aio.insecure_channel(rpc_address) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        services, file = [answer async for answer in stub.ServerReflectionInfo(iter(wanted))]
    names = [service.name for service in services.list_services_response.service]
    assert "inference.GRPCInferenceService" in names
    assert "grpc.health.v1.Health" in names
    assert file.file_descriptor_response.file_descriptor_proto
