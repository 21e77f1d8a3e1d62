"""KServe v2 over gRPC, as one Triton server speaks it.

No logic lives here: messages become requests in `codec_grpc`, the data plane answers, errors become codes in
`status`. HTTP is the cheaper door; this one is complete for clients that speak gRPC.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import math
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, NamedTuple

import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from google.protobuf.message_factory import GetMessageClass
from tritonclient.grpc import service_pb2, service_pb2_grpc

from cascadeserve.errors import InvalidRequest, NotFound, NotSupported, Overloaded, RequestError, Unavailable
from orchestrator.wire.codec_grpc import check_version, decode_infer_request, encode_infer_response, model_of
from orchestrator.wire.codec_grpc_models import (
    encode_model_config,
    encode_model_metadata,
    encode_repository_index,
    encode_statistics,
)
from orchestrator.wire.limits import PEEK_BYTES, Limits
from orchestrator.wire.not_offered import RPCS
from orchestrator.wire.others import RefusedBehind
from orchestrator.wire.rpc_calls import Calls
from orchestrator.wire.rpc_entries import check_message
from orchestrator.wire.rpc_health import add_services
from orchestrator.wire.rpc_stream import Streams
from orchestrator.wire.status import INTERNAL_ERROR, message_of, status_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from orchestrator.wire.others import Others
    from orchestrator.wire.tensors import DataPlane

    Context = grpc.aio.ServicerContext[Any, Any]
    Rpc = Callable[["InferenceServicer", Any, Context], Awaitable[Any]]

logger = logging.getLogger(__name__)

# where a client with a retry policy finds how long to wait, in milliseconds
_PUSH_BACK = "grpc-retry-pushback-ms"

_SERVICE = service_pb2.DESCRIPTOR.services_by_name["GRPCInferenceService"]
_READS_BYTES = "ModelInfer"
_UNREADABLE = "the request cannot be read: it is no message of this call's type"
# what HTTP/2 advises as the least
_MIN_CALLS_PER_CONNECTION = 100
# as for TLS over HTTP
_GREETING_S = 15.0
_KEEPALIVE = (
    # A client that is gone without a word is noticed: this long without a byte and it is asked, then waited for.
    ("grpc.keepalive_time_ms", 60_000),
    ("grpc.keepalive_timeout_ms", 20_000),
    # Clients may ask the same of us, also while no call is open. One that asks more often is sent away.
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
    # A connection without a call holds a place that others may need; its client connects again when it has one.
    ("grpc.max_connection_idle_ms", 300_000),
)


def build_rpc_server(
    data_plane: DataPlane,
    *,
    others: Others | None = None,
    max_message_bytes: int,
    ending: asyncio.Event | None = None,
    reuse_port: bool = False,
    limits: Limits | None = None,
) -> grpc.aio.Server:
    """Make the gRPC server; the caller binds its port.

    `max_message_bytes` bounds a request; gRPC itself refuses a larger one with RESOURCE_EXHAUSTED. `reuse_port` lets
    several front processes share a port; gRPC's own default would let a second orchestrator take one by accident. Once
    `ending` is set, streams end with the answers to what was read of them.
    """
    limits = limits or Limits()
    server = grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", max_message_bytes),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", int(reuse_port)),
            ("grpc.max_allowed_incoming_connections", limits.max_connections),
            # one connection does not take the calls of all; its client holds further ones back
            ("grpc.max_concurrent_streams", max(limits.max_connections // 10, _MIN_CALLS_PER_CONNECTION)),
            # gRPC would refuse some of a burst on the way there, and those that came before the client knew
            ("grpc.http.overload_protection", 0),
            # the same for calls that came while the event loop was busy: a quarter of 3,000 at once would be cancelled
            ("grpc.server.max_pending_requests", limits.max_connections),
            ("grpc.server.max_pending_requests_hard_limit", limits.max_connections),
            # to begin to speak TLS and HTTP/2: until then it takes the place of another one
            ("grpc.server_handshake_timeout_ms", math.ceil(1e3 * min(limits.client_timeout_s, _GREETING_S))),
            *_KEEPALIVE,
        ],
    )
    servicer = InferenceServicer(data_plane, others, limits, ending or asyncio.Event())
    calls = Calls(limits)
    server.add_generic_rpc_handlers((_handlers(servicer, calls),))
    add_services(server, data_plane, _SERVICE.full_name, calls)
    return server


class _Unreadable:
    """Stands for a request that is no message of its type: gRPC would log a traceback and answer UNKNOWN."""

    def __init__(self, error: RequestError | None = None) -> None:
        self.error = InvalidRequest(_UNREADABLE) if error is None else error


def _reader(kind: Any) -> Callable[[bytes], Any]:  # noqa: ANN401 - a class made by protobuf
    def read(data: bytes) -> Any:  # noqa: ANN401
        try:
            return kind.FromString(data)
        except DecodeError:
            return _Unreadable()

    return read


_read_message = _reader(service_pb2.ModelInferRequest)


def _read_infer(data: bytes, *, max_listed_elements: int) -> Any:  # noqa: ANN401
    try:
        check_message(data, max_listed_elements)
    except RequestError as error:
        return _Unreadable(error)
    return _read_message(data)


def _handlers(servicer: InferenceServicer, calls: Calls) -> grpc.GenericRpcHandler:
    """Bind the servicer's RPCs to their names, as generated code does, but for what reads their requests."""
    handlers: dict[str, grpc.RpcMethodHandler[Any, Any]] = {}
    for method in _SERVICE.methods:
        rpc = getattr(servicer, method.name)
        if method.client_streaming:
            # takes and gives bytes
            handlers[method.name] = grpc.stream_stream_rpc_method_handler(rpc)
            continue
        handlers[method.name] = calls.handler(
            rpc,
            # None: the RPC takes bytes
            None if method.name == _READS_BYTES else _reader(GetMessageClass(method.input_type)),
            GetMessageClass(method.output_type).SerializeToString,
        )
    return grpc.method_handlers_generic_handler(_SERVICE.full_name, handlers)


class _Failure(NamedTuple):
    """What went wrong, as `abort` takes it."""

    code: grpc.StatusCode
    sentence: str
    trailer: tuple[tuple[str, str], ...] = ()


async def _outcome(answer: Awaitable[Any]) -> tuple[Any, _Failure | None]:
    """Await an answer: it, or what went wrong; cancellation passes."""
    try:
        return await answer, None
    except RequestError as error:
        code, sentence = status_of(error).grpc, message_of(error)
        if code is grpc.StatusCode.INTERNAL:
            logger.error("request failed: %s", error)  # noqa: TRY400 - where it was raised says nothing more
        if isinstance(error, Overloaded):
            after_ms = math.ceil(1e3 * error.retry_after_s)
            return None, _Failure(code, sentence, ((_PUSH_BACK, str(after_ms)),))
        return None, _Failure(code, sentence)
    except RefusedBehind as error:
        return None, _Failure(error.code, error.sentence)
    except Exception:
        logger.exception("request failed")
        return None, _Failure(grpc.StatusCode.INTERNAL, INTERNAL_ERROR)


def _answered(rpc: Rpc) -> Rpc:
    """Wrap an RPC so that it ends in an answer or in one clean status."""

    async def answer(self: InferenceServicer, request: Any, context: Context) -> Any:  # noqa: ANN401 - untyped protobuf
        if isinstance(request, _Unreadable):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, _UNREADABLE)
        response, failure = await _outcome(rpc(self, request, context))
        if failure is not None:
            await context.abort(*failure)
        return response

    return answer


def _not_offered(name: str) -> Rpc:
    """Make an RPC that says it is not offered; the inherited one would answer with a Python exception's name."""

    async def refuse(_self: InferenceServicer, _request: Any, context: Context) -> None:  # noqa: ANN401
        await context.abort(grpc.StatusCode.UNIMPLEMENTED, f"{name}: {RPCS[name]}")

    return refuse


class InferenceServicer(service_pb2_grpc.GRPCInferenceServiceServicer):  # type: ignore[misc]
    """`inference.GRPCInferenceService` over the data plane; its RPCs are named by the protocol."""

    def __init__(self, data_plane: DataPlane, others: Others | None, limits: Limits, ending: asyncio.Event) -> None:
        self._data_plane = data_plane
        self._others = others
        self._max_listed_elements = limits.max_listed_elements
        self._read_infer = functools.partial(_read_infer, max_listed_elements=limits.max_listed_elements)
        self._streams = Streams(limits, self._read_infer, ending)

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
        check_version(request.version)
        try:
            if self._others is not None and self._others.has(request.name):
                return await self._pass_on("ModelReady", request)
            ready = self._data_plane.model_ready(request.name, request.version)
        except (NotFound, Unavailable):
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
        check_version(request.version)
        if self._others is not None and self._others.has(request.name):
            return await self._pass_on("ModelMetadata", request)
        return encode_model_metadata(self._data_plane.model_metadata(request.name, request.version))

    @_answered
    async def ModelConfig(self, request: Any, _context: Context) -> Any:  # noqa: ANN401, N802
        """Tell how a model is configured."""
        check_version(request.version)
        if self._others is not None and self._others.has(request.name):
            return await self._pass_on("ModelConfig", request)
        return encode_model_config(self._data_plane.model_config(request.name, request.version))

    @_answered
    async def ModelStatistics(self, request: Any, _context: Context) -> Any:  # noqa: ANN401, N802
        """Count what was asked of a model, or of all."""
        check_version(request.version)
        return encode_statistics(await self._data_plane.statistics(request.name, request.version))

    @_answered
    async def RepositoryIndex(self, request: Any, _context: Context) -> Any:  # noqa: ANN401, N802
        """List the models."""
        if request.repository_name:
            raise NotSupported("'repository_name' specification is not supported")
        entries = self._data_plane.repository_index()
        return encode_repository_index([entry for entry in entries if entry.ready or not request.ready])

    @_answered
    async def ModelInfer(self, request: Any, context: Context) -> Any:  # noqa: ANN401, N802
        """Answer an inference request, which comes as bytes: it is read when it has been let in, not before."""
        admitted = self._data_plane.admit(*model_of(request), request[:PEEK_BYTES])
        return await self._infer(self._read_infer(request), context, admitted=admitted)

    async def ModelStreamInfer(  # noqa: N802
        self, requests: AsyncIterator[bytes], context: Context
    ) -> AsyncIterator[bytes]:
        """Answer the requests of a stream, in their order."""

        async def admitted(request: Any) -> Any:  # noqa: ANN401
            # read already: who sent it looks for its id in the answer
            admitted = isinstance(request, _Unreadable) or self._data_plane.admit(
                request.model_name, request.model_version, b"".join(map(str.encode, request.parameters))
            )
            return await self._infer(request, context, admitted=admitted)

        async def infer(request: Any) -> tuple[Any, str]:  # noqa: ANN401
            response, failure = await _outcome(admitted(request))
            return response, "" if failure is None else failure.sentence

        try:
            async with aclosing(self._streams.answer(requests, infer, context.peer())) as answers:
                async for answer in answers:
                    yield answer
        except Unavailable as error:
            await context.abort(status_of(error).grpc, message_of(error))

    async def _infer(self, request: Any, context: Context, *, admitted: bool) -> Any:  # noqa: ANN401
        if isinstance(request, _Unreadable):
            raise request.error
        if self._others is not None and self._others.has(request.model_name):
            model, version = request.model_name, request.model_version
            return await self._others.rpc("ModelInfer", request, model, version, context.time_remaining())
        infer_request = decode_infer_request(
            request, context.time_remaining(), max_listed_elements=self._max_listed_elements
        )
        infer_request.admitted = admitted
        return encode_infer_response(infer_request, await self._data_plane.infer(infer_request))

    async def _pass_on(self, name: str, request: Any) -> Any:  # noqa: ANN401
        assert self._others is not None
        return await self._others.rpc(name, request, request.name, request.version, None)

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
