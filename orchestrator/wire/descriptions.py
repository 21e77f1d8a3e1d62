"""What a server tells of its models besides their metadata: configuration, statistics, index. No HTTP, no protobuf."""

from __future__ import annotations

from dataclasses import dataclass, field

# Read at run time too: front processes are told of models by the types of these fields.
from orchestrator.wire.tensors import TensorMetadata  # noqa: TC001

# under which a family is asked for, whatever the versions of its models
VERSION = "1"


@dataclass(slots=True, frozen=True)
class ModelConfig:
    """`GET v2/models/{name}/config`; the shapes of the tensors have the batch axis first."""

    name: str
    platform: str
    # largest batch that the service-level objective is promised for
    max_batch_size: int
    inputs: tuple[TensorMetadata, ...]
    outputs: tuple[TensorMetadata, ...]


@dataclass(slots=True, frozen=True)
class IndexEntry:
    """One model of `POST v2/repository/index`."""

    name: str
    version: str
    ready: bool


@dataclass(slots=True, frozen=True)
class Duration:
    """How often something happened and how long it took altogether."""

    count: int = 0
    ns: int = 0


@dataclass(slots=True, frozen=True)
class ModelStatistics:
    """Counts of one model since the server started, as Triton names them; they only grow.

    `success` runs from the parsed request to its complete answer. `queue` and `compute` are parts of it: how long a row
    of the request waited in queues and was with Triton, over all its stages, on average over the rows.
    """

    name: str
    version: str
    # milliseconds since 1970; 0 before the first request
    last_inference_ms: int = 0
    # rows answered
    inference_count: int = 0
    # batches sent, over all stages
    execution_count: int = 0
    success: Duration = Duration()
    fail: Duration = Duration()
    queue: Duration = Duration()
    compute: Duration = Duration()
    # by rows of the batch
    batches: dict[int, Duration] = field(default_factory=dict)
