"""The gRPC services beside the protocol's own: `grpc.health.v1.Health` for probes, and reflection for tools."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection, reflection_pb2

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from orchestrator.wire.rpc_calls import Calls
    from orchestrator.wire.tensors import DataPlane

    Context = grpc.aio.ServicerContext[Any, Any]

_HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
_STATUS = health_pb2.HealthCheckResponse.ServingStatus
_ANSWER = health_pb2.HealthCheckResponse.SerializeToString
# A tool asks by a stream of its own, and leaves. One more ends the oldest.
_MAX_REFLECTING = 100
_TOO_MANY = "too many streams ask for reflection; try again"
# The request comes back with its answer; it holds one name.
_MAX_NAME_BYTES = 4096


def add_services(server: grpc.aio.Server, data_plane: DataPlane, inference: str, calls: Calls) -> None:
    """Add both to a server whose inference service has the full name `inference`."""

    async def check(_request: bytes, _context: Context) -> Any:  # noqa: ANN401 - untyped protobuf
        # whatever service is asked for, as in Triton
        status = _STATUS.Value("SERVING" if data_plane.ready() else "NOT_SERVING")
        return health_pb2.HealthCheckResponse(status=status)

    async def watch(_request: bytes, context: Context) -> None:
        # gRPC clients then take the server for healthy, as they do with Triton
        await context.abort(
            grpc.StatusCode.UNIMPLEMENTED, "Watch is not offered by this server; ask Check now and then"
        )

    health = {"Check": calls.handler(check, None, _ANSWER), "Watch": calls.handler(watch, None, _ANSWER)}
    reflect: grpc.RpcMethodHandler[Any, Any] = grpc.stream_stream_rpc_method_handler(
        _Reflection([inference, _HEALTH, reflection.SERVICE_NAME]).answer,
        response_serializer=reflection_pb2.ServerReflectionResponse.SerializeToString,
    )
    server.add_generic_rpc_handlers(
        (
            grpc.method_handlers_generic_handler(_HEALTH, health),
            grpc.method_handlers_generic_handler(reflection.SERVICE_NAME, {"ServerReflectionInfo": reflect}),
        )
    )


class _Reflection:
    """gRPC's own answers, to requests of a few bytes on a few streams."""

    def __init__(self, services: list[str]) -> None:
        self._servicer = reflection.aio.ReflectionServicer(services)
        self._num_open = 0
        # those that are not asked anything, the oldest first, and those that leave
        self._idle: dict[asyncio.Task[Any], None] = {}
        self._leaving: set[asyncio.Task[Any]] = set()

    async def answer(self, requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[Any]:
        if self._num_open >= _MAX_REFLECTING:
            oldest = next(iter(self._idle), None)
            if oldest is None:
                await context.abort(grpc.StatusCode.UNAVAILABLE, _TOO_MANY)
            self._idle.pop(oldest)
            self._leaving.add(oldest)
            oldest.cancel()
        self._num_open += 1
        try:
            async for answer in self._servicer.ServerReflectionInfo(self._read(requests, context), context):
                yield answer
        finally:
            self._num_open -= 1

    async def _read(self, requests: AsyncIterator[bytes], context: Context) -> AsyncIterator[Any]:
        task = asyncio.current_task()
        assert task is not None
        while True:
            self._idle[task] = None
            try:
                data = await anext(requests, None)
            except asyncio.CancelledError:
                if task not in self._leaving:
                    raise
                task.uncancel()
                await context.abort(grpc.StatusCode.UNAVAILABLE, _TOO_MANY)
            finally:
                self._idle.pop(task, None)
                self._leaving.discard(task)
            if data is None:
                return
            try:
                # what is longer is cut short, and so no message
                yield reflection_pb2.ServerReflectionRequest.FromString(data[:_MAX_NAME_BYTES])
            except DecodeError:
                await context.abort(
                    grpc.StatusCode.INVALID_ARGUMENT, "the request cannot be read: it is no question of a name"
                )
