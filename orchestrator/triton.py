"""TritonBackend: one endpoint, batches over HTTP and everything else over one grpc.aio channel.

The only place where Triton's client stubs are called.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Any

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from cascadeserve.triton_config import instance_count
from orchestrator.backend import CallRejected, EndpointDown, ModelVersion
from orchestrator.triton_http import BatchSender
from orchestrator.wire.others import RefusedBehind

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from cascadeserve.gear_plan import TensorSpec
    from cascadeserve.http_connection import HttpAnswer
    from orchestrator.backend import BatchAnswer

_log = logging.getLogger(__name__)

# The server is gone, hangs, or was told to stop: nothing is wrong with the batch.
_DOWN = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED}

_UNLOAD_POLL_S = 0.02

_CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # A batch is sent once: whether it may be sent again is the dispatcher's decision.
    ("grpc.enable_retries", 0),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 500),
    # A private connection per backend, so that closing one never disturbs another.
    ("grpc.use_local_subchannel_pool", 1),
)


class TritonBackend:
    """A tritonserver at `grpc_address` and `http_address` (host:port of the two services)."""

    def __init__(self, grpc_address: str, http_address: str) -> None:
        """Connects lazily, at the first call."""
        self._channel = grpc.aio.insecure_channel(grpc_address, options=_CHANNEL_OPTIONS)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._address = grpc_address
        self._batches = BatchSender(http_address)
        # live over gRPC and not over HTTP, which is said once
        self._half_live = False

    async def infer(
        self,
        model: ModelVersion,
        specs: Sequence[TensorSpec],
        inputs: Sequence[NDArray[Any]],
        *,
        want_scores: bool,
        timeout_s: float,
    ) -> BatchAnswer:
        """See `Backend.infer`."""
        return await self._batches.infer(model, specs, inputs, want_scores=want_scores, timeout_s=timeout_s)

    async def is_live(self, *, timeout_s: float) -> bool:
        """See `Backend.is_live`; a server that takes no batches, because it is stopping, is not live."""
        live = await self._is_live_over_grpc(timeout_s) and await self._is_live_over_http(timeout_s)
        if not live:
            # It ends when its clients have closed their connections.
            self._batches.retire()
        return live

    async def instance_counts(self, *, timeout_s: float) -> dict[ModelVersion, int]:
        """See `Backend.instance_counts`."""
        with self._mapped_errors("repository index"):
            index = await self._stub.RepositoryIndex(service_pb2.RepositoryIndexRequest(ready=True), timeout=timeout_s)
        versions: dict[str, list[int]] = {}
        for entry in index.models:
            versions.setdefault(entry.name, []).append(int(entry.version))
        counts: dict[ModelVersion, int] = {}
        for name, ready in versions.items():
            with contextlib.suppress(CallRejected), self._mapped_errors(f"config of {name!r}"):
                # rejected: the model went away since the index was made. Asked of a version that did, the server would
                # say that it is unavailable; all versions have the same config.
                answer = await self._stub.ModelConfig(service_pb2.ModelConfigRequest(name=name), timeout=timeout_s)
                counts |= dict.fromkeys((ModelVersion(name, each) for each in ready), instance_count(answer.config))
        return counts

    async def load(self, model: str, *, timeout_s: float) -> None:
        """See `Backend.load`."""
        with self._mapped_errors(f"load of {model!r}"):
            await self._stub.RepositoryModelLoad(
                service_pb2.RepositoryModelLoadRequest(model_name=model), timeout=timeout_s
            )

    async def unload(self, model: str, *, timeout_s: float, to_its_end: bool = False) -> None:
        """See `Backend.unload`."""
        with self._mapped_errors(f"unload of {model!r}"):
            await self._stub.RepositoryModelUnload(
                service_pb2.RepositoryModelUnloadRequest(model_name=model), timeout=timeout_s
            )
            # The call returns at once.
            async with asyncio.timeout(timeout_s):
                while to_its_end and await self._is_unloading(model, timeout_s):  # noqa: ASYNC110 - Triton tells nobody
                    await asyncio.sleep(_UNLOAD_POLL_S)

    async def pass_http(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> HttpAnswer:
        """See `Backend.pass_http`."""
        return await self._batches.pass_on(method, path, headers, body)

    async def pass_rpc(self, name: str, request: Any) -> Any:  # noqa: ANN401 - untyped protobuf
        """See `Backend.pass_rpc`."""
        try:
            return await getattr(self._stub, name)(request)
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNAVAILABLE:
                raise EndpointDown(f"{name} at {self._address}: {error.details()}") from error
            raise RefusedBehind(error.code(), error.details() or "") from error

    async def close(self) -> None:
        """See `Backend.close`."""
        await self._batches.close()
        await self._channel.close()

    async def _is_live_over_grpc(self, timeout_s: float) -> bool:
        try:
            with self._mapped_errors("liveness"):
                response = await self._stub.ServerLive(service_pb2.ServerLiveRequest(), timeout=timeout_s)
        except (EndpointDown, CallRejected):
            return False
        return bool(response.live)

    async def _is_live_over_http(self, timeout_s: float) -> bool:
        try:
            await self._batches.check(timeout_s=timeout_s)
        except EndpointDown as error:
            if not self._half_live:
                _log.warning("%s: live over gRPC, not over HTTP; it is stopping, or this address is wrong", error)
            self._half_live = True
            return False
        self._half_live = False
        return True

    async def _is_unloading(self, model: str, timeout_s: float) -> bool:
        index = await self._stub.RepositoryIndex(service_pb2.RepositoryIndexRequest(), timeout=timeout_s)
        return any(entry.name == model and entry.state == "UNLOADING" for entry in index.models)

    @contextlib.contextmanager
    def _mapped_errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except grpc.aio.AioRpcError as error:
            text = f"{what} at {self._address}: {error.code().name}: {error.details()}"
            if error.code() in _DOWN:
                raise EndpointDown(text) from error
            raise CallRejected(text) from error
        except TimeoutError as error:
            raise EndpointDown(f"{what} at {self._address}: it did not end in time") from error
