"""A small client for measuring: prepared requests over one grpc.aio channel, and Triton's own statistics."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc

from benchmarks.gpu.family import INPUT
from cascadeserve.errors import CascadeServeError

if TYPE_CHECKING:
    from numpy.typing import NDArray

_UNLIMITED = (("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1))
# longer than any batch may take: the largest batch on a slow device, behind two others
CALL_TIMEOUT_S = 30.0


class BenchmarkFailed(CascadeServeError):  # noqa: N818 - named by what happened
    """A step of the benchmark could not be carried out."""


class TritonClient:
    """Calls one tritonserver."""

    def __init__(self, address: str) -> None:
        self._channel = grpc.aio.insecure_channel(address, options=_UNLIMITED)
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)

    async def close(self) -> None:
        """Close the channel."""
        await self._channel.close()

    async def server_version(self) -> str:
        """Version of the server."""
        metadata = await self._stub.ServerMetadata(service_pb2.ServerMetadataRequest(), timeout=CALL_TIMEOUT_S)
        return str(metadata.version)

    @staticmethod
    def prepare(model: str, rows: NDArray[np.float32]) -> Any:  # noqa: ANN401 - tritonclient carries no types
        """Make a request for label and certainty of `rows`, to be sent any number of times."""
        request = service_pb2.ModelInferRequest(model_name=model)
        request.inputs.add(name=INPUT, datatype="FP32", shape=rows.shape)
        request.raw_input_contents.append(rows.tobytes())
        for name in ("label", "certainty"):
            request.outputs.add(name=name)
        return request

    async def infer(self, request: Any) -> Any:  # noqa: ANN401
        """Send a prepared request."""
        try:
            return await self._stub.ModelInfer(request, timeout=CALL_TIMEOUT_S)
        except grpc.aio.AioRpcError as error:
            raise BenchmarkFailed(
                f"model {request.model_name!r} did not answer a batch of {request.inputs[0].shape[0]} rows: "
                f"{error.code().name}: {error.details()}"
            ) from error

    async def certainties(self, model: str, rows: NDArray[np.float32], batch: int) -> NDArray[np.float32]:
        """Certainty of every row, float32 [rows], asked for in batches."""
        parts = []
        for start in range(0, len(rows), batch):
            answer = await self.infer(self.prepare(model, rows[start : start + batch]))
            position = [output.name for output in answer.outputs].index("certainty")
            parts.append(np.frombuffer(answer.raw_output_contents[position], np.float32))
        return np.concatenate(parts)

    async def compute_s(self, model: str) -> tuple[int, float]:
        """Batches the model has executed so far, and the seconds it was computing, as Triton counts them."""
        request = service_pb2.ModelStatisticsRequest(name=model)
        statistics = (await self._stub.ModelStatistics(request, timeout=CALL_TIMEOUT_S)).model_stats[0]
        return int(statistics.execution_count), statistics.inference_stats.compute_infer.ns / 1e9
