"""Models that are no cascade: what the transports ask about them, and what they get back."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    import grpc

    from orchestrator.wire.exchange import Answer, Call
    from orchestrator.wire.tensors import DataPlane

    Handler = Callable[[Call], Awaitable[Answer]]


class RefusedBehind(Exception):  # noqa: N818 - named by what happened
    """A server behind this one ended an RPC with this status, which is the client's answer."""

    def __init__(self, code: grpc.StatusCode, sentence: str) -> None:
        """As the server said it."""
        super().__init__(sentence)
        self.code = code
        self.sentence = sentence


class Others(Protocol):
    """Passes requests on; errors are `cascadeserve.errors.RequestError`s or `RefusedBehind`."""

    def has(self, model: str) -> bool:
        """Whether this is a model of a server behind this one and no part of the plan."""

    async def http(self, call: Call, verb: str) -> Answer:
        """Pass on a request for `/v2/models/{model}/{verb}`; an empty verb stands for the metadata."""

    async def rpc(self, name: str, request: Any, model: str, version: str, timeout_s: float | None) -> Any:  # noqa: ANN401
        """Pass on an RPC of GRPCInferenceService; returns its response."""


def deadlines(data_plane: DataPlane, others: Others | None) -> Callable[[str, str], float | None]:
    """Extend `DataPlane.default_deadline_s` by the models of others, which are waited for without end."""

    def default_deadline_s(model: str, version: str) -> float | None:
        if others is not None and others.has(model):
            return math.inf
        return data_plane.default_deadline_s(model, version)

    return default_deadline_s


def or_passed_on(others: Others | None, verb: str, handler: Handler) -> Handler:
    """Have a handler answer for the plan's families only."""
    if others is None:
        return handler

    async def handle(call: Call) -> Answer:
        if others.has(call.model):
            return await others.http(call, verb)
        return await handler(call)

    return handle
