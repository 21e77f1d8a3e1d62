"""A data plane that answers every input as an output of the same name."""

from __future__ import annotations

import asyncio

from cascadeserve.errors import InvalidRequest, NotFound
from orchestrator.entry import may_be_important
from orchestrator.wire.descriptions import IndexEntry, ModelConfig, ModelStatistics
from orchestrator.wire.tensors import (
    InferRequest,
    InferResponse,
    ModelMetadata,
    Parameter,
    ServerMetadata,
    Tensor,
    TensorMetadata,
)

MODELS = {
    "echo": ModelMetadata(
        name="echo",
        versions=("1", "2"),
        platform="echo",
        inputs=(TensorMetadata("image", "FP32", (-1, 1, 32, 32)),),
        outputs=(TensorMetadata("image", "FP32", (-1, 1, 32, 32)), TensorMetadata("label", "INT64", (-1, 1))),
    ),
    "text": ModelMetadata("text", ("1",), "echo", (TensorMetadata("line", "BYTES", (-1, 1)),), ()),
    "variable": ModelMetadata("variable", ("1",), "echo", (TensorMetadata("row", "INT16", (-1, -1, 2)),), ()),
    "ragged": ModelMetadata("ragged", ("1",), "echo", (TensorMetadata("row", "INT16", (-1, -1, -1)),), ()),
    "pair": ModelMetadata(
        "pair", ("1",), "echo", (TensorMetadata("a", "INT8", (-1, 1)), TensorMetadata("b", "INT8", (-1, 1))), ()
    ),
    "loading": ModelMetadata("loading", ("1",), "echo", (), ()),
}


class EchoPlane:
    """Fails on demand: `error` is raised by every inference, `delay_s` holds it up."""

    def __init__(self) -> None:
        self.is_ready = True
        self.error: Exception | None = None
        # raised at the door, if set
        self.refusal: Exception | None = None
        self.asked: list[tuple[str, str]] = []
        self.beginnings: list[bytes] = []
        self.not_read: list[tuple[str, str]] = []
        self.delay_s = 0.0
        self.deadline_s: float | None = None
        self.counted: dict[str, ModelStatistics] = {}
        self.requests: list[InferRequest] = []
        self.parameters: dict[str, Parameter] = {}
        # answered instead of the inputs, if set
        self.outputs: list[Tensor] | None = None
        self.started = asyncio.Event()
        self.cancelled = asyncio.Event()

    def ready(self) -> bool:
        return self.is_ready

    def server_metadata(self) -> ServerMetadata:
        return ServerMetadata("cascadeserve", "0.1.0", ("binary_tensor_data",))

    def model_ready(self, name: str, version: str) -> bool:
        self.model_metadata(name, version)
        return name != "loading"

    def model_metadata(self, name: str, version: str) -> ModelMetadata:
        if name not in MODELS:
            raise NotFound(f"no model '{name}'")
        if version and version not in MODELS[name].versions:
            raise NotFound(f"model '{name}' has no version '{version}'")
        return MODELS[name]

    def admit(self, name: str, version: str, beginning: bytes = b"") -> bool:
        self.asked.append((name, version))
        self.beginnings.append(beginning)
        if self.refusal is not None and not may_be_important(beginning):
            raise self.refusal
        return self.refusal is None

    def default_deadline_s(self, name: str, _version: str) -> float | None:
        return self.deadline_s if name in MODELS else None

    def unread(self, name: str, version: str) -> None:
        self.not_read.append((name, version))

    def model_config(self, name: str, version: str) -> ModelConfig:
        metadata = self.model_metadata(name, version)
        return ModelConfig(name, metadata.platform, 8, metadata.inputs, metadata.outputs)

    def repository_index(self) -> list[IndexEntry]:
        return [IndexEntry(name, "1", name != "loading") for name in sorted(MODELS)]

    async def statistics(self, name: str, _version: str) -> list[ModelStatistics]:
        if name and name not in MODELS:
            raise InvalidRequest(f"requested model '{name}' is not available")
        return [self.counted.get(model, ModelStatistics(model, "1")) for model in ([name] if name else sorted(MODELS))]

    async def settled(self) -> int:
        """How many requests came, once no more come."""
        await self.started.wait()
        seen = -1
        while seen != len(self.requests):
            seen = len(self.requests)
            await asyncio.sleep(0.3)
        return seen

    async def infer(self, request: InferRequest) -> InferResponse:
        self.requests.append(request)
        self.started.set()
        try:
            await asyncio.sleep(self.delay_s)
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        if self.error is not None:
            raise self.error
        self.model_metadata(request.model_name, request.model_version)
        outputs = request.inputs if self.outputs is None else self.outputs
        if request.outputs:
            by_name = {tensor.name: tensor for tensor in outputs}
            outputs = [by_name[output.name] for output in request.outputs]
        version = request.model_version or "1"
        return InferResponse(request.model_name, version, outputs, parameters=self.parameters)

    async def metrics(self) -> tuple[bytes, str]:
        return b"# HELP up whether it runs\nup 1\n", "text/plain; version=0.0.4; charset=utf-8"
