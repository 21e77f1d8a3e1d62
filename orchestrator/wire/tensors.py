"""What the two transports hand to the data plane and get back: requests and responses without HTTP or protobuf."""

from __future__ import annotations

from collections import Counter

# Those that fields are written in are read at run time too: front processes send requests and answers by them.
from collections.abc import Mapping, Sequence  # noqa: TC003
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import numpy.typing as npt

from cascadeserve.errors import InvalidRequest

if TYPE_CHECKING:
    from orchestrator.wire.descriptions import IndexEntry, ModelConfig, ModelStatistics

Array = npt.NDArray[Any]
Parameter = bool | int | float | str

# What gRPC's int64 and uint64 parameters hold, and so both transports.
_MIN_INT, _MAX_INT = -(2**63), 2**64 - 1


@dataclass(slots=True)
class Tensor:
    """A named tensor.

    `array` has the shape of the tensor; BYTES are an object array of `bytes`, BF16 is carried as uint16.
    """

    name: str
    datatype: str
    array: Array


@dataclass(slots=True)
class RequestedOutput:
    """An output the client asked for; `binary` only means something over HTTP."""

    name: str
    binary: bool = False
    # so many of its largest values, as text; 0: the values
    num_classes: int = 0


@dataclass(slots=True)
class InferRequest:
    """One inference request. `outputs` is empty when the client named none."""

    model_name: str
    inputs: list[Tensor]
    model_version: str = ""
    id: str = ""
    # shared by requests that say the same
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    outputs: Sequence[RequestedOutput] = ()
    # HTTP only: the form of the outputs that the client did not name
    binary_outputs: bool = False
    # time left until the client stops waiting, if the transport knows it (gRPC deadline)
    client_timeout_s: float | None = None
    # what `DataPlane.admit` said: where False, it is let in only if it is important
    admitted: bool = True
    # how long it waited before the data plane could see it, also in another process; client_timeout_s is without that
    waited_s: float = 0.0


@dataclass(slots=True)
class InferResponse:
    """One answer, its outputs in the order asked for."""

    model_name: str
    model_version: str
    outputs: list[Tensor]
    id: str = ""
    parameters: dict[str, Parameter] = field(default_factory=dict)


@dataclass(slots=True, frozen=True)
class TensorMetadata:
    """Name, KServe datatype and shape (with the batch axis, -1 where variable)."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(slots=True, frozen=True)
class ServerMetadata:
    """`GET v2`."""

    name: str
    version: str
    extensions: tuple[str, ...]


@dataclass(slots=True, frozen=True)
class ModelMetadata:
    """`GET v2/models/{name}`."""

    name: str
    versions: tuple[str, ...]
    platform: str
    inputs: tuple[TensorMetadata, ...]
    outputs: tuple[TensorMetadata, ...]


class DataPlane(Protocol):
    """What both transports call. Errors are `cascadeserve.errors.RequestError`s."""

    def ready(self) -> bool:
        """Whether requests can be answered now."""

    def server_metadata(self) -> ServerMetadata:
        """Describe the server."""

    def model_ready(self, name: str, version: str) -> bool:
        """Whether this model can be asked now; raises NotFound for an unknown one."""

    def model_metadata(self, name: str, version: str) -> ModelMetadata:
        """Describe a model; raises NotFound for an unknown one."""

    def admit(self, name: str, version: str, beginning: bytes = b"") -> bool:
        """Let a request in whose body is not read yet, or raise Overloaded; it must cost next to nothing.

        `beginning` is what there is of the body. The answer is to become `InferRequest.admitted`.
        """

    def default_deadline_s(self, name: str, version: str) -> float | None:
        """How long an answer is waited for where its request does not say; None for an unknown model."""

    def unread(self, name: str, version: str) -> None:
        """Count a request that was let in and then refused before it was read: too much waits for that."""

    def model_config(self, name: str, version: str) -> ModelConfig:
        """Tell how a model is configured; raises NotFound for an unknown one."""

    def repository_index(self) -> list[IndexEntry]:
        """List the models, by name."""

    async def statistics(self, name: str, version: str) -> list[ModelStatistics]:
        """Count what was asked of a model, or of all if `name` is empty; raises InvalidRequest for an unknown one."""

    async def infer(self, request: InferRequest) -> InferResponse:
        """Answer a request that was let in or raise one RequestError."""


def check_parameter(name: str, value: Parameter) -> None:
    """Refuse a request parameter that Triton refuses."""
    if name.startswith("triton_"):
        raise InvalidRequest(
            "parameter keys starting with 'triton_' are reserved for Triton usage and should not be specified."
        )
    if isinstance(value, int) and not _MIN_INT <= value <= _MAX_INT:
        raise InvalidRequest(f"the request parameter '{name}' does not fit into 64 bits")


def check_unique(names: list[str]) -> None:
    """Refuse two inputs of one name."""
    if len(names) > 1 and len(set(names)) < len(names):
        twice = next(name for name, count in Counter(names).items() if count > 1)
        raise InvalidRequest(f"input '{twice}' already exists in request; give each input once")
