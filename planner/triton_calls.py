"""The calls that recording and profiling make to a running Triton, over one grpc.aio channel."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

from cascadeserve.errors import CascadeServeError
from cascadeserve.replay.payload import ModelSignature, TensorSignature
from cascadeserve.triton_config import composing_models, instance_count
from planner.records import ModelAnswers

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from cascadeserve.replay.payload import InputRows
    from cascadeserve.triton_config import ModelConfig

_CALL_TIMEOUT_S = 60.0
# a dear model on a CPU takes tens of seconds for a large batch; building a TensorRT engine takes minutes
_INFER_TIMEOUT_S = 300.0
_LOAD_TIMEOUT_S = 900.0
_CHANNEL_OPTIONS = (
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    # a call that was sent twice would be counted twice by the server's statistics
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),
)
_NS = 1e-9


@dataclass(frozen=True)
class ServedModel:
    """A version of a model as Triton has it loaded; `max_batch` 0 means that it has no batch axis.

    Of an ensemble, `instances` are the fewest of any model that it is composed of.
    """

    name: str
    backend: str
    max_batch: int
    instances: int
    # Triton joins or splits calls of such a model itself, so that a call is not a batch
    dynamic_batching: bool
    signature: ModelSignature
    version: int
    # all that are loaded
    versions: tuple[int, ...]
    # of an ensemble: its models, each with the version that Triton joins, which is the newest
    composed_of: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Executions:
    """Triton's counters of a model since it was loaded: batches executed, and the seconds they took.

    The seconds are compute_input + compute_infer + compute_output: the batch has an instance of the model for so long.
    """

    count: int
    compute_s: float


class TritonCalls:
    """A tritonserver at `address` (host:port of its gRPC service).

    Every method raises CascadeServeError, saying what was asked, when the server does not answer or refuses.
    """

    def __init__(self, address: str) -> None:
        """Connects lazily, at the first call."""
        self._address = address
        self._channel = grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        # Encoded messages both ways: what is the same for every call is not paid for in every call.
        self._infer: Any = self._channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")

    async def server_version(self) -> str:
        """Version of the server, such as 2.51.0."""
        with self._mapped_errors("its version"):
            answer = await self._stub.ServerMetadata(service_pb2.ServerMetadataRequest(), timeout=_CALL_TIMEOUT_S)
        return str(answer.version)

    async def describe(self, model: str, version: int) -> ServedModel:
        """What Triton says about a loaded version of a model."""
        config, metadata = await self._config(model, str(version)), await self._metadata(model)
        parts = {part: max(_versions(await self._metadata(part))) for part in composing_models(config)}
        working = [await self._config(part, "") for part in parts] or [config]
        return ServedModel(
            name=model,
            backend=config.backend or config.platform,
            max_batch=config.max_batch_size,
            instances=min(map(instance_count, working)),
            dynamic_batching=any(each.HasField("dynamic_batching") for each in working),
            signature=ModelSignature(
                inputs=tuple(TensorSignature(one.name, one.datatype, tuple(one.shape)) for one in metadata.inputs),
                outputs=tuple(one.name for one in metadata.outputs),
            ),
            version=version,
            versions=_versions(metadata),
            composed_of=parts,
        )

    async def _config(self, model: str, version: str) -> ModelConfig:
        with self._mapped_errors(f"the config of {model!r}" + f" in version {version}" * bool(version)):
            request = service_pb2.ModelConfigRequest(name=model, version=version)
            answer = await self._stub.ModelConfig(request, timeout=_CALL_TIMEOUT_S)
        return answer.config

    async def _metadata(self, model: str) -> Any:  # noqa: ANN401 - tritonclient carries no types
        with self._mapped_errors(f"the metadata of {model!r}"):
            return await self._stub.ModelMetadata(service_pb2.ModelMetadataRequest(name=model), timeout=_CALL_TIMEOUT_S)

    def encode(
        self, model: str, version: int, inputs: Sequence[InputRows], rows: list[int], *, want_scores: bool = False
    ) -> bytes:
        """Encode a call that puts these rows to a version of a model as one batch."""
        request = service_pb2.ModelInferRequest(model_name=model, model_version=str(version))
        for tensor in inputs:
            request.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=[len(rows), *tensor.row_shape])
            request.raw_input_contents.append(bytes(tensor.chunk(rows)))
        for name in ("label", "certainty", "scores") if want_scores else ("label", "certainty"):
            request.outputs.add(name=name)
        encoded: bytes = request.SerializeToString()
        return encoded

    async def send(self, request: bytes) -> bytes:
        """Send an encoded call and return the encoded answer."""
        with self._mapped_errors("an inference"):
            answer: bytes = await self._infer(request, timeout=_INFER_TIMEOUT_S)
        return answer

    async def answer(
        self, model: str, version: int, inputs: Sequence[InputRows], rows: list[int], *, want_scores: bool
    ) -> ModelAnswers:
        """Put rows to a version of a model as one batch."""
        response = service_pb2.ModelInferResponse.FromString(
            await self.send(self.encode(model, version, inputs, rows, want_scores=want_scores))
        )
        raw = dict(zip((output.name for output in response.outputs), response.raw_output_contents, strict=False))
        try:
            label = np.frombuffer(raw["label"], np.dtype("<i8")).reshape(len(rows))
            certainty = np.frombuffer(raw["certainty"], np.dtype("<f4")).reshape(len(rows))
            scores = np.frombuffer(raw["scores"], np.dtype("<f4")).reshape(len(rows), -1) if want_scores else None
        except (KeyError, ValueError) as error:
            raise CascadeServeError(
                f"model {model!r} at {self._address} does not answer {len(rows)} rows with `label` INT64 [n, 1], "
                f"`certainty` FP32 [n, 1] and `scores` FP32 [n, classes] ({error}); write it with `cascadeserve export`"
            ) from error
        with np.errstate(over="ignore"):  # a score beyond FP16 becomes infinite, which keeps its rank
            kept = None if scores is None else scores.astype(np.float16)
        return ModelAnswers(label.astype(np.int64), certainty.astype(np.float32), kept)

    async def executions(self, model: str) -> Executions:
        """Triton's counters of a model, all its versions together; they start at zero when it is reloaded."""
        with self._mapped_errors(f"statistics of {model!r}"):
            answer = await self._stub.ModelStatistics(
                service_pb2.ModelStatisticsRequest(name=model), timeout=_CALL_TIMEOUT_S
            )
        count, compute_ns = 0, 0
        for version in answer.model_stats:
            stats = version.inference_stats
            count += version.execution_count
            compute_ns += stats.compute_input.ns + stats.compute_infer.ns + stats.compute_output.ns
        return Executions(count, compute_ns * _NS)

    async def is_gone(self, model: str) -> bool:
        """Whether a model is unloaded, all of it: neither ready nor on its way out."""
        with self._mapped_errors("the repository index"):
            index = await self._stub.RepositoryIndex(service_pb2.RepositoryIndexRequest(), timeout=_CALL_TIMEOUT_S)
        return all(entry.state == "UNAVAILABLE" for entry in index.models if entry.name == model)

    async def load(self, model: str) -> None:
        """Load a model; returns when it is ready."""
        with self._mapped_errors(f"a load of {model!r}"):
            await self._stub.RepositoryModelLoad(
                service_pb2.RepositoryModelLoadRequest(model_name=model), timeout=_LOAD_TIMEOUT_S
            )

    async def unload(self, model: str) -> None:
        """Unload a model; it may go some time later."""
        with self._mapped_errors(f"an unload of {model!r}"):
            await self._stub.RepositoryModelUnload(
                service_pb2.RepositoryModelUnloadRequest(model_name=model), timeout=_CALL_TIMEOUT_S
            )

    async def close(self) -> None:
        """Close the connection."""
        await self._channel.close()

    @contextlib.contextmanager
    def _mapped_errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except grpc.aio.AioRpcError as error:
            raise CascadeServeError(
                f"Triton at {self._address} was asked for {what} and did not give it "
                f"({error.code().name}: {error.details()})"
            ) from error


def _versions(metadata: Any) -> tuple[int, ...]:  # noqa: ANN401 - tritonclient carries no types
    return tuple(int(version) for version in metadata.versions)
