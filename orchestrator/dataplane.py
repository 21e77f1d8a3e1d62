"""The data plane: one request, checked against its family, through the dispatcher, to one answer.

It knows nothing of HTTP or gRPC; both transports call it alike.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from cascadeserve import __version__
from cascadeserve.errors import InvalidRequest, NotFound, RequestError, Unavailable
from cascadeserve.policy.admission import DEADLINE_SLOS
from orchestrator.wire.descriptions import VERSION, IndexEntry, ModelConfig
from orchestrator.wire.tensors import (
    InferRequest,
    InferResponse,
    ModelMetadata,
    ServerMetadata,
    Tensor,
    TensorMetadata,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from numpy.typing import NDArray

    from cascadeserve.gear_plan import TensorSpec
    from orchestrator.dispatcher import Dispatcher
    from orchestrator.metrics import Metrics
    from orchestrator.rows import Ticket
    from orchestrator.state import FamilyState
    from orchestrator.wire.descriptions import ModelStatistics

# in Triton's words; not "model_repository": what is loaded is the plan's matter
_EXTENSIONS = ("classification", "binary_tensor_data", "parameters", "model_configuration", "statistics")
_OUTPUTS = ("label", "certainty", "scores", "stage")
_PLATFORM = "cascade"
# rows of one request: each takes its own way, and some memory until the last one is answered
MAX_ROWS = 1 << 16


class CascadeDataPlane:
    """Answers for every family of the plan under the family's name."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        metrics: Metrics,
        *,
        on_arrival: Callable[[FamilyState, int], None],
        max_rows: int = MAX_ROWS,
    ) -> None:
        """`on_arrival` is told of every valid request and its number of rows, which is `max_rows` at most."""
        self._dispatcher = dispatcher
        self._metrics = metrics
        self._on_arrival = on_arrival
        self._max_rows = max_rows
        self._loop = asyncio.get_running_loop()
        # set in this order while shutting down: not ready any more, then no new request is taken
        self.draining = False
        self.refusing = False

    def ready(self) -> bool:
        """Ready while every family can be served and no shutdown has begun."""
        return not self.draining and all(map(self._dispatcher.can_serve, self._dispatcher.families.values()))

    def server_metadata(self) -> ServerMetadata:
        """See `DataPlane.server_metadata`."""
        return ServerMetadata("cascadeserve", __version__, _EXTENSIONS)

    def model_ready(self, name: str, version: str) -> bool:
        """See `DataPlane.model_ready`."""
        family = self._family(name, version)
        return not self.draining and self._dispatcher.can_serve(family)

    def model_metadata(self, name: str, version: str) -> ModelMetadata:
        """See `DataPlane.model_metadata`."""
        plan = self._family(name, version).plan
        return ModelMetadata(
            name=name,
            versions=(VERSION,),
            platform=_PLATFORM,
            inputs=tuple(TensorMetadata(spec.name, spec.datatype, (-1, *spec.shape)) for spec in plan.inputs),
            outputs=(
                TensorMetadata("label", "INT64", (-1, 1)),
                TensorMetadata("certainty", "FP32", (-1, 1)),
                *_scores_metadata(plan.num_classes),
                TensorMetadata("stage", "INT32", (-1, 1)),
            ),
        )

    def model_config(self, name: str, version: str) -> ModelConfig:
        """See `DataPlane.model_config`."""
        metadata = self.model_metadata(name, version)
        max_rows = self._family(name, version).plan.max_rows_per_request
        return ModelConfig(name, metadata.platform, max_rows, metadata.inputs, metadata.outputs)

    def repository_index(self) -> list[IndexEntry]:
        """See `DataPlane.repository_index`."""
        return [
            IndexEntry(name, VERSION, self.model_ready(name, VERSION)) for name in sorted(self._dispatcher.families)
        ]

    async def statistics(self, name: str, version: str) -> list[ModelStatistics]:
        """See `DataPlane.statistics`."""
        families = self._dispatcher.families
        if name and name not in families:
            raise InvalidRequest(f"requested model '{name}' is not available")
        if name and version not in ("", VERSION):
            raise InvalidRequest(f"requested model version is not available for model '{name}'")
        now_s = self._loop.time()
        return [self._metrics.statistics.of(family, now_s) for family in ([name] if name else sorted(families))]

    async def infer(self, request: InferRequest) -> InferResponse:
        """Carry the request's rows through the cascade; without named outputs the answer is `label`."""
        family = self._family(request.model_name, request.model_version)
        arrived_s = self._loop.time()
        try:
            inputs = _checked_inputs(family, request)
            outputs = _checked_outputs(family, request)
            rows = inputs[0].shape[0]
            if rows > self._max_rows:
                raise InvalidRequest(f"inference request batch-size must be <= {self._max_rows} for '{family.name}'")
            timeout_s = self._timeout_s(family, request, rows)
            self._metrics.arrived(family.name, rows)
            self._on_arrival(family, rows)
            if self.refusing:
                raise Unavailable("the server is shutting down; try another one")
            ticket = await self._dispatcher.submit(family, inputs, timeout_s=timeout_s, want_scores="scores" in outputs)
        except RequestError as error:
            self._metrics.request(family.name, type(error).__name__, 0.0)
            self._count_failed(family, arrived_s)
            raise
        except asyncio.CancelledError:
            self._metrics.request(family.name, "Cancelled", 0.0)
            self._count_failed(family, arrived_s)
            raise
        now_s = self._loop.time()
        self._metrics.request(family.name, "ok", now_s - arrived_s)
        self._metrics.statistics.answered(family.name, ticket, now_s - arrived_s, now_s)
        return InferResponse(
            model_name=request.model_name,
            model_version=VERSION,
            id=request.id,
            parameters={
                "gear": ",".join(ticket.gears),
                "plan": family.plan_name,
                "certified": ticket.certified,
            },
            outputs=[_output(ticket, name) for name in outputs],
        )

    def _count_failed(self, family: FamilyState, arrived_s: float) -> None:
        now_s = self._loop.time()
        self._metrics.statistics.failed(family.name, now_s - arrived_s, now_s)

    def _family(self, name: str, version: str) -> FamilyState:
        family = self._dispatcher.families.get(name)
        if family is None:
            raise NotFound(f"Request for unknown model: '{name}' is not found")
        if version not in ("", VERSION):
            raise NotFound(f"Request for unknown model: '{name}' version {version} is not found")
        return family

    def _timeout_s(self, family: FamilyState, request: InferRequest, rows: int) -> float:
        """Seconds this request may take: its `timeout` (microseconds, as Triton has it), deadline, or the default."""
        timeout = request.parameters.get("timeout", 0)
        if not isinstance(timeout, int) or isinstance(timeout, bool) or timeout < 0:
            raise InvalidRequest("parameter 'timeout' must be a whole number of microseconds, 0 or more")
        if timeout:
            timeout_s = timeout / 1e6
        else:
            busy_s = rows * family.work_per_row_s()
            timeout_s = DEADLINE_SLOS * max(family.plan.slo_s, busy_s)
        if request.client_timeout_s is not None:
            timeout_s = min(timeout_s, request.client_timeout_s)
        return timeout_s


def _checked_inputs(family: FamilyState, request: InferRequest) -> list[NDArray[Any]]:
    """The request's tensors in the order of the family's inputs, each [n, *shape] with one n >= 1."""
    specs = family.plan.inputs
    given = {tensor.name: tensor for tensor in request.inputs}
    if len(given) != len(specs) or any(spec.name not in given for spec in specs):
        raise _wrong_inputs(family, [spec.name for spec in specs], list(given))
    arrays = [_checked_input(family, spec, given[spec.name]) for spec in specs]
    rows = arrays[0].shape[0]
    for spec, array in zip(specs, arrays, strict=True):
        if array.shape[0] != rows:
            raise InvalidRequest(
                f"input '{spec.name}' has {array.shape[0]} rows but '{specs[0].name}' has {rows}; they must agree"
            )
    return arrays


def _wrong_inputs(family: FamilyState, wanted: list[str], given: list[str]) -> InvalidRequest:
    """Begin as Triton does, then say what would be right."""
    takes = f"it takes {', '.join(map(repr, wanted))}"
    if len(given) == len(wanted):
        unexpected = next(name for name in given if name not in wanted)
        return InvalidRequest(f"unexpected inference input '{unexpected}' for model '{family.name}'; {takes}")
    return InvalidRequest(
        f"expected {len(wanted)} inputs but got {len(given)} inputs for model '{family.name}'; {takes}"
    )


def _checked_input(family: FamilyState, spec: TensorSpec, tensor: Tensor) -> NDArray[Any]:
    array = tensor.array
    if tensor.datatype != spec.datatype:
        raise InvalidRequest(
            f"inference input '{spec.name}' data-type is '{tensor.datatype}', but model '{family.name}' expects "
            f"'{spec.datatype}'"
        )
    fits = array.shape[1:] == spec.shape or (
        array.ndim == len(spec.shape) + 1
        and all(wanted in (-1, size) for wanted, size in zip(spec.shape, array.shape[1:], strict=True))
    )
    if not fits or array.shape[0] < 1:
        expected = ",".join(map(str, (-1, *spec.shape)))
        got = ",".join(map(str, array.shape))
        raise InvalidRequest(
            f"unexpected shape for input '{spec.name}' for model '{family.name}'. Expected [{expected}], got [{got}]"
        )
    return array


def _scores_metadata(num_classes: int | None) -> tuple[TensorMetadata, ...]:
    return () if num_classes is None else (TensorMetadata("scores", "FP32", (-1, num_classes)),)


def _checked_outputs(family: FamilyState, request: InferRequest) -> list[str]:
    # an output that is named twice comes once, as from Triton
    names = list(dict.fromkeys(output.name for output in request.outputs)) or ["label"]
    known = [name for name in _OUTPUTS if name != "scores" or family.plan.num_classes is not None]
    for name in names:
        if name not in known:
            offered = ", ".join(known)
            raise InvalidRequest(
                f"unexpected inference output '{name}' for model '{request.model_name}'; it has {offered}"
            )
    return names


def _output(ticket: Ticket, name: str) -> Tensor:
    if name == "label":
        return Tensor("label", "INT64", ticket.label.reshape(-1, 1))
    if name == "certainty":
        return Tensor("certainty", "FP32", ticket.certainty.reshape(-1, 1))
    if name == "stage":
        return Tensor("stage", "INT32", ticket.stage.reshape(-1, 1))
    if ticket.scores is None:
        raise RuntimeError("scores were not asked for")
    return Tensor("scores", "FP32", ticket.scores)
