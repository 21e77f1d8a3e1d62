"""TritonBackend: one endpoint over one grpc.aio channel. The only place where Triton's client stubs are called."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

from cascadeserve.triton_config import instance_count
from orchestrator.backend import BatchAnswer, CallRejected, EndpointDown
from orchestrator.wire.datatypes import array_to_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from cascadeserve.gear_plan import TensorSpec

# The server is gone, hangs, or was told to stop: nothing is wrong with the batch.
_DOWN = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED}

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
    """A tritonserver at `address` (host:port of its gRPC service)."""

    def __init__(self, address: str) -> None:
        """Connects lazily, at the first call."""
        self._channel = grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._address = address

    async def infer(
        self,
        model: str,
        specs: Sequence[TensorSpec],
        inputs: Sequence[NDArray[Any]],
        *,
        want_scores: bool,
        timeout_s: float,
    ) -> BatchAnswer:
        """See `Backend.infer`."""
        request = service_pb2.ModelInferRequest(model_name=model)
        for spec, array in zip(specs, inputs, strict=True):
            request.inputs.add(name=spec.name, datatype=spec.datatype, shape=array.shape)
            request.raw_input_contents.append(array_to_bytes(array, spec.datatype))
        names = ("label", "certainty", "scores") if want_scores else ("label", "certainty")
        for name in names:
            request.outputs.add(name=name)
        with self._mapped_errors(f"inference of {model!r}"):
            response = await self._stub.ModelInfer(request, timeout=timeout_s)
        raw = {
            output.name: contents
            for output, contents in zip(response.outputs, response.raw_output_contents, strict=True)
        }
        rows = inputs[0].shape[0]
        try:
            label = np.frombuffer(raw["label"], dtype=np.int64)
            certainty = np.frombuffer(raw["certainty"], dtype=np.float32)
            scores = np.frombuffer(raw["scores"], dtype=np.float32).reshape(rows, -1) if want_scores else None
        except (KeyError, ValueError) as error:
            raise CallRejected(f"{model!r} at {self._address} answered without a usable output: {error}") from error
        if label.shape != (rows,) or certainty.shape != (rows,):
            raise CallRejected(f"{model!r} at {self._address} answered {label.size} labels for {rows} rows")
        return BatchAnswer(label, certainty, scores)

    async def is_live(self, *, timeout_s: float) -> bool:
        """See `Backend.is_live`."""
        try:
            with self._mapped_errors("liveness"):
                response = await self._stub.ServerLive(service_pb2.ServerLiveRequest(), timeout=timeout_s)
        except (EndpointDown, CallRejected):
            return False
        return bool(response.live)

    async def instance_counts(self, *, timeout_s: float) -> dict[str, int]:
        """See `Backend.instance_counts`."""
        with self._mapped_errors("repository index"):
            index = await self._stub.RepositoryIndex(service_pb2.RepositoryIndexRequest(ready=True), timeout=timeout_s)
        counts: dict[str, int] = {}
        for model in index.models:
            with contextlib.suppress(CallRejected), self._mapped_errors(f"config of {model.name!r}"):
                # rejected: the model went away since the index was made
                answer = await self._stub.ModelConfig(
                    service_pb2.ModelConfigRequest(name=model.name), timeout=timeout_s
                )
                counts[model.name] = instance_count(answer.config)
        return counts

    async def load(self, model: str, *, timeout_s: float) -> None:
        """See `Backend.load`."""
        with self._mapped_errors(f"load of {model!r}"):
            await self._stub.RepositoryModelLoad(
                service_pb2.RepositoryModelLoadRequest(model_name=model), timeout=timeout_s
            )

    async def unload(self, model: str, *, timeout_s: float) -> None:
        """See `Backend.unload`."""
        with self._mapped_errors(f"unload of {model!r}"):
            await self._stub.RepositoryModelUnload(
                service_pb2.RepositoryModelUnloadRequest(model_name=model), timeout=timeout_s
            )

    async def close(self) -> None:
        """See `Backend.close`."""
        await self._channel.close()

    @contextlib.contextmanager
    def _mapped_errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except grpc.aio.AioRpcError as error:
            text = f"{what} at {self._address}: {error.code().name}: {error.details()}"
            if error.code() in _DOWN:
                raise EndpointDown(text) from error
            raise CallRejected(text) from error
