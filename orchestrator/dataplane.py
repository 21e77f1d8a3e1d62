"""The data plane: one request, checked against its family, through the dispatcher, to one answer.

It knows nothing of HTTP or gRPC; both transports call it alike.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from cascadeserve import __version__
from cascadeserve.errors import InvalidRequest, RequestError, Unavailable
from cascadeserve.policy.admission import DEADLINE_SLOS
from orchestrator.request_options import MAX_WORK, read_options
from orchestrator.wire.descriptions import VERSION, IndexEntry, ModelConfig
from orchestrator.wire.limits import MAX_ROWS
from orchestrator.wire.request_checks import checked_inputs, checked_outputs, unknown_model
from orchestrator.wire.status import SHUTTING_DOWN
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

    from orchestrator.dispatcher import Dispatcher
    from orchestrator.entry import Entry
    from orchestrator.metrics import Metrics
    from orchestrator.request_options import RequestOptions
    from orchestrator.rows import Ticket
    from orchestrator.state import FamilyState
    from orchestrator.wire.descriptions import ModelStatistics

# in Triton's words; not "model_repository": what is loaded is the plan's matter
_EXTENSIONS = ("classification", "binary_tensor_data", "parameters", "model_configuration", "statistics")


class CascadeDataPlane:
    """Answers for every family of the plan under the family's name."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        metrics: Metrics,
        entry: Entry,
        *,
        on_arrival: Callable[[FamilyState, float], None],
        max_rows: int = MAX_ROWS,
        max_work: float = MAX_WORK,
    ) -> None:
        """`on_arrival` is told of every valid request and its work: of `max_rows` rows, `max_work` each, at most."""
        self._dispatcher = dispatcher
        self._entry = entry
        self._metrics = metrics
        self._on_arrival = on_arrival
        self._max_rows = max_rows
        self._max_work = max_work
        self._loop = asyncio.get_running_loop()
        # the same under every plan: one that would change it is refused (`plan_change`)
        self._metadata = {name: _metadata(family) for name, family in dispatcher.families.items()}
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
        return self._metadata[self._family(name, version).name]

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

    def admit(self, name: str, version: str, beginning: bytes = b"") -> bool:
        """See `DataPlane.admit`; what is wrong with the name is left to `infer`."""
        return not self._knows(name, version) or self._entry.admit(name, beginning)

    def default_deadline_s(self, name: str, version: str) -> float | None:
        """See `DataPlane.default_deadline_s`; that of rows of very much work is longer."""
        return DEADLINE_SLOS * self._dispatcher.families[name].plan.slo_s if self._knows(name, version) else None

    def unread(self, name: str, version: str) -> None:
        """See `DataPlane.unread`."""
        if self._knows(name, version):
            self._entry.unread(name)

    def _knows(self, name: str, version: str) -> bool:
        return name in self._dispatcher.families and version in ("", VERSION)

    async def infer(self, request: InferRequest) -> InferResponse:
        """Carry the request's rows through the cascade; without named outputs the answer is `label`."""
        family = self._family(request.model_name, request.model_version)
        arrived_s = self._loop.time()
        try:
            inputs = checked_inputs(self._metadata[family.name], request, self._max_rows)
            outputs = checked_outputs(self._metadata[family.name], request)
            rows = inputs[0].shape[0]
            options = read_options(request.parameters, rows, max_work=self._max_work)
            timeout_s = self._timeout_s(family, request, options, rows)
            self._metrics.arrived(family.name, rows)
            work = rows * options.work_per_row
            self._entry.took(family.name, work)
            self._on_arrival(family, work)
            if self.refusing:
                raise Unavailable(SHUTTING_DOWN)
            if not request.admitted and not options.important:
                raise self._entry.refusal(family.name)
            ticket = await self._dispatcher.submit(
                family,
                inputs,
                timeout_s=timeout_s,
                want_scores="scores" in outputs,
                options=options,
                admitted=request.admitted,
            )
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
        if ticket.cut_rows:
            self._metrics.cut_short(family.name, ticket.cut_rows)
        return InferResponse(
            model_name=request.model_name,
            model_version=VERSION,
            id=request.id,
            parameters={
                "gear": ",".join(ticket.gears),
                "plan": family.plan_name,
                "certified": ticket.certified and not family.mismatches,
            },
            outputs=[_output(ticket, name) for name in outputs],
        )

    def _count_failed(self, family: FamilyState, arrived_s: float) -> None:
        now_s = self._loop.time()
        self._metrics.statistics.failed(family.name, now_s - arrived_s, now_s)

    def _family(self, name: str, version: str) -> FamilyState:
        family = self._dispatcher.families.get(name)
        if family is None:
            raise unknown_model(name)
        if version not in ("", VERSION):
            raise unknown_model(name, version)
        return family

    def _timeout_s(self, family: FamilyState, request: InferRequest, options: RequestOptions, rows: int) -> float:
        """Seconds this request may still take: its `timeout` or the default, or its transport's deadline if sooner."""
        timeout_s = options.timeout_s
        if timeout_s is None:
            busy_s = rows * options.work_per_row * family.work_per_row_s
            timeout_s = DEADLINE_SLOS * max(family.plan.slo_s, busy_s)
        # it has waited to be read; the transport's deadline knows of that
        timeout_s -= self._entry.lag_s() + request.waited_s
        if request.client_timeout_s is not None:
            timeout_s = min(timeout_s, request.client_timeout_s)
        return timeout_s


def _metadata(family: FamilyState) -> ModelMetadata:
    plan = family.plan
    return ModelMetadata(
        name=family.name,
        versions=(VERSION,),
        platform="cascade",
        inputs=tuple(TensorMetadata(spec.name, spec.datatype, (-1, *spec.shape)) for spec in plan.inputs),
        outputs=(
            TensorMetadata("label", "INT64", (-1, 1)),
            TensorMetadata("certainty", "FP32", (-1, 1)),
            *_scores_metadata(plan.num_classes),
            TensorMetadata("stage", "INT32", (-1, 1)),
        ),
    )


def _scores_metadata(num_classes: int | None) -> tuple[TensorMetadata, ...]:
    return () if num_classes is None else (TensorMetadata("scores", "FP32", (-1, num_classes)),)


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
