"""What the orchestrator needs from one endpoint; `triton.TritonBackend` is the real one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np
    from numpy.typing import NDArray

    from cascadeserve.gear_plan import TensorSpec
    from cascadeserve.http_connection import HttpAnswer


class BackendError(Exception):
    """A call to an endpoint failed."""


class EndpointDown(BackendError):  # noqa: N818 - named by what happened
    """The server could not be reached, went away, or did not answer in time."""


class BatchNotTaken(EndpointDown):
    """The server said that it takes no work: the batch was not begun."""


class NoConnection(BatchNotTaken):
    """The batch was not sent: nobody listens, so that the next look finds the server down, too."""


class ConnectionLost(EndpointDown):
    """The connection broke while the batch was under way, as it does when the server crashes."""


class ModelSilent(BackendError):  # noqa: N818
    """The server is there and other models of it answer; this one did not within any time that it may need."""


class CallRejected(BackendError):  # noqa: N818
    """The server is there and answered with an error."""

    def __init__(self, text: str, *, answer: str | None = None, status: int = 500) -> None:
        """`answer` is the server's own sentence, `status` the one of HTTP that it came with."""
        super().__init__(text)
        self.answer = text if answer is None else answer
        self.status = status


class NotServed(CallRejected):
    """The server does not serve this model or version now."""


class StubDead(CallRejected):
    """The Python process of a model has ended: all requests to it fail, while it and its server look ready (2.51).

    Loading it does nothing; unloading and loading it starts a new process.
    """

    def __init__(self, text: str, *, model: str, answer: str | None = None) -> None:
        """`model` is the one whose process it was: that of the batch, or a part of it."""
        super().__init__(text, answer=answer)
        self.model = model


class ModelVersion(NamedTuple):
    """What a batch is sent to."""

    name: str
    version: int

    def __str__(self) -> str:
        """As people name it."""
        return f"{self.name}:{self.version}"


@dataclass(slots=True, frozen=True)
class BatchAnswer:
    """A model's answers for one batch of n rows."""

    label: NDArray[np.int64]  # [n]
    certainty: NDArray[np.float32]  # [n]
    scores: NDArray[np.float32] | None  # [n, classes], only if asked for


class Backend(Protocol):
    """One endpoint. Every method raises BackendError and nothing else."""

    async def infer(
        self,
        model: ModelVersion,
        specs: Sequence[TensorSpec],
        inputs: Sequence[NDArray[Any]],
        *,
        want_scores: bool,
        timeout_s: float,
    ) -> BatchAnswer:
        """Run one batch; `inputs[i]` has shape [n, *specs[i].shape]."""

    async def is_live(self, *, timeout_s: float) -> bool:
        """Whether the server is there; False also when it cannot be reached.

        Not Triton's readiness, which is false while any model loads: which models can be asked, the counts tell.
        """

    async def instance_counts(self, *, timeout_s: float) -> dict[ModelVersion, int]:
        """Instances of every version that is loaded and ready."""

    async def load(self, model: str, *, timeout_s: float) -> None:
        """Load a model, or reload it in place after its config file changed: what that file says then stands."""

    async def unload(self, model: str, *, timeout_s: float, to_its_end: bool = False) -> None:
        """Unload all versions of a model: nothing new is begun; `to_its_end`: and what they held is free again.

        A model whose Python process has ended is held for up to a minute yet.
        """

    async def pass_http(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> HttpAnswer:
        """Send a request of somebody's as it is; any answer is returned."""

    async def pass_rpc(self, name: str, request: Any) -> Any:  # noqa: ANN401 - untyped protobuf
        """The same with a message of GRPCInferenceService; also raises RefusedBehind with the status it ended with."""

    async def close(self) -> None:
        """Close the connection."""
