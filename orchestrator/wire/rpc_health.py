"""The gRPC services beside the protocol's own: `grpc.health.v1.Health` for probes, and reflection for tools."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc.aio
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

if TYPE_CHECKING:
    from orchestrator.wire.tensors import DataPlane

    Context = grpc.aio.ServicerContext[Any, Any]

_STATUS = health_pb2.HealthCheckResponse.ServingStatus


class HealthServicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Readiness, under whatever service name it is asked for, as Triton has it."""

    def __init__(self, data_plane: DataPlane) -> None:
        self._data_plane = data_plane

    async def Check(self, _request: Any, _context: Context) -> Any:  # noqa: ANN401, N802 - untyped, named by gRPC
        """Answer whether requests can be answered now."""
        status = _STATUS.Value("SERVING" if self._data_plane.ready() else "NOT_SERVING")
        return health_pb2.HealthCheckResponse(status=status)

    async def Watch(self, _request: Any, context: Context) -> None:  # noqa: ANN401, N802
        """Say that it is not offered; gRPC clients then take the server for healthy, as they do with Triton."""
        await context.abort(
            grpc.StatusCode.UNIMPLEMENTED, "Watch is not offered by this server; ask Check now and then"
        )


def add_services(server: grpc.aio.Server, data_plane: DataPlane, inference: str) -> None:
    """Add both to a server whose inference service has the full name `inference`."""
    health_pb2_grpc.add_HealthServicer_to_server(HealthServicer(data_plane), server)
    health = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
    reflection.enable_server_reflection([inference, health, reflection.SERVICE_NAME], server)
