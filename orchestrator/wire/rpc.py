"""KServe v2 over gRPC, as one Triton server speaks it.

No logic lives here: messages become requests in `codec_grpc`, the data plane answers, errors become codes in
`status`. HTTP is the cheaper door; this one is complete for clients that speak gRPC.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from tritonclient.grpc import service_pb2, service_pb2_grpc

from cascadeserve.errors import InvalidRequest, NotFound, Overloaded, RequestError
from orchestrator.wire.codec_grpc import decode_infer_request, encode_infer_response, encode_model_metadata, model_of
from orchestrator.wire.status import INTERNAL_ERROR, message_of, status_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from orchestrator.wire.tensors import DataPlane

    Context = grpc.aio.ServicerContext[Any, Any]
    Rpc = Callable[["InferenceServicer", Any, Context], Awaitable[Any]]

logger = logging.getLogger(__name__)

# where a client with a retry policy finds how long to wait, in milliseconds
_PUSH_BACK = "grpc-retry-pushback-ms"


def build_rpc_server(data_plane: DataPlane, *, max_message_bytes: int, reuse_port: bool = False) -> grpc.aio.Server:
    """Make the gRPC server; the caller binds its port.

    `max_message_bytes` bounds a request; gRPC itself refuses a larger one with RESOURCE_EXHAUSTED. `reuse_port` lets
    several front processes share a port; gRPC's own default would let a second orchestrator take one by accident.
    """
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", int(reuse_port)),
        ]
    )
    servicer = InferenceServicer(data_plane)
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
    # in the place of the generated one: without a deserializer a request is read when it has been let in, not before
    infer: grpc.RpcMethodHandler[bytes, Any] = grpc.unary_unary_rpc_method_handler(
        servicer.ModelInfer, response_serializer=service_pb2.ModelInferResponse.SerializeToString
    )
    server.add_registered_method_handlers("inference.GRPCInferenceService", {"ModelInfer": infer})
    return server


def _answered(rpc: Rpc) -> Rpc:
    """Wrap an RPC so that it ends in an answer or in one clean status; cancellation passes."""

    async def answer(self: InferenceServicer, request: Any, context: Context) -> Any:  # noqa: ANN401 - untyped protobuf
        trailer: tuple[tuple[str, str], ...] = ()
        try:
            return await rpc(self, request, context)
        except RequestError as error:
            code, sentence = status_of(error).grpc, message_of(error)
            if isinstance(error, Overloaded):
                trailer = ((_PUSH_BACK, str(math.ceil(1e3 * error.retry_after_s))),)
            if code is grpc.StatusCode.INTERNAL:
                logger.error("request failed: %s", error)  # noqa: TRY400 - where it was raised says nothing more
        except Exception:
            logger.exception("request failed")
            code, sentence = grpc.StatusCode.INTERNAL, INTERNAL_ERROR
        # Outside the handlers: abort raises, and the cause is no part of the answer.
        await context.abort(code, sentence, trailer)
        return None

    return answer


def _not_offered(name: str) -> Rpc:
    """Make an RPC that says it is not offered; the inherited one would answer with a Python exception's name."""

    async def refuse(_self: InferenceServicer, _request: Any, context: Context) -> None:  # noqa: ANN401
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"{name} is not offered by this server")

    return refuse


class InferenceServicer(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """`inference.GRPCInferenceService` over the data plane; its RPCs are named by the protocol."""

    def __init__(self, data_plane: DataPlane) -> None:
        self._data_plane = data_plane

    @_answered
    async def ServerLive(self, _request: Any, _context: Context) -> Any:  # noqa: ANN401, N802
        """Answer that the process runs."""
        return service_pb2.ServerLiveResponse(live=True)

    @_answered
    async def ServerReady(self, _request: Any, _context: Context) -> Any:  # noqa: ANN401, N802
        """Answer whether requests can be answered now."""
        return service_pb2.ServerReadyResponse(ready=self._data_plane.ready())

    @_answered
    async def ModelReady(self, request: Any, _context: Context) -> Any:  # noqa: ANN401, N802
        """Answer whether a model can be asked now; an unknown one cannot, as in Triton."""
        try:
            ready = self._data_plane.model_ready(request.name, request.version)
        except NotFound:
            ready = False
        return service_pb2.ModelReadyResponse(ready=ready)

    @_answered
    async def ServerMetadata(self, _request: Any, _context: Context) -> Any:  # noqa: ANN401, N802
        """Describe the server."""
        metadata = self._data_plane.server_metadata()
        return service_pb2.ServerMetadataResponse(
            name=metadata.name, version=metadata.version, extensions=metadata.extensions
        )

    @_answered
    async def ModelMetadata(self, request: Any, _context: Context) -> Any:  # noqa: ANN401, N802
        """Describe a model."""
        return encode_model_metadata(self._data_plane.model_metadata(request.name, request.version))

    @_answered
    async def ModelInfer(self, request: Any, context: Context) -> Any:  # noqa: ANN401, N802
        """Answer an inference request, which comes as bytes."""
        self._data_plane.admit(*model_of(request))
        try:
            message = service_pb2.ModelInferRequest.FromString(request)
        except DecodeError:
            raise InvalidRequest("the request is no ModelInferRequest, or was cut short") from None
        infer_request = decode_infer_request(message, context.time_remaining())
        return encode_infer_response(infer_request, await self._data_plane.infer(infer_request))

    ModelStreamInfer = _not_offered("ModelStreamInfer")
    ModelConfig = _not_offered("ModelConfig")
    ModelStatistics = _not_offered("ModelStatistics")
    RepositoryIndex = _not_offered("RepositoryIndex")
    RepositoryModelLoad = _not_offered("RepositoryModelLoad")
    RepositoryModelUnload = _not_offered("RepositoryModelUnload")
    SystemSharedMemoryStatus = _not_offered("SystemSharedMemoryStatus")
    SystemSharedMemoryRegister = _not_offered("SystemSharedMemoryRegister")
    SystemSharedMemoryUnregister = _not_offered("SystemSharedMemoryUnregister")
    CudaSharedMemoryStatus = _not_offered("CudaSharedMemoryStatus")
    CudaSharedMemoryRegister = _not_offered("CudaSharedMemoryRegister")
    CudaSharedMemoryUnregister = _not_offered("CudaSharedMemoryUnregister")
    TraceSetting = _not_offered("TraceSetting")
    LogSettings = _not_offered("LogSettings")
