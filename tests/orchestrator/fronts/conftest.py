from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pytest

from cascadeserve.local_stack import free_ports
from orchestrator.front_door import ServeSettings
from orchestrator.fronts.front import FrontPlane
from orchestrator.fronts.hub import Front, Hub
from orchestrator.metrics import Metrics
from orchestrator.wire.tensors import InferRequest, RequestedOutput, Tensor
from tests.orchestrator.wire.echo_plane import MODELS, EchoPlane

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

IMAGE = np.arange(2 * 1024, dtype=np.float32).reshape(2, 1, 32, 32)


class ClosableEcho(EchoPlane):
    """An EchoPlane that can be shut down."""

    draining = False
    refusing = False

    def ready(self) -> bool:
        return self.is_ready and not self.draining


class Joined(NamedTuple):
    """A front's data plane and the dispatcher's side of it, in one process."""

    plane: FrontPlane
    echo: ClosableEcho
    front: Front
    hub: Hub
    metrics: Metrics


def settings(**changes: Any) -> ServeSettings:
    http_port, grpc_port = free_ports(2)
    fields: dict[str, Any] = {"fronts": 2, "max_request_bytes": 1 << 20} | changes
    return ServeSettings("127.0.0.1", http_port, grpc_port, linger_s=0.1, drain_s=5.0, **({"max_work": 10.0} | fields))


def count_refusal(metrics: Metrics, family: str, outcome: str) -> None:
    metrics.request(family, outcome, 0.0)
    metrics.statistics.failed(family, 0.0, 0.0)


def hub_over(echo: ClosableEcho, wanted: ServeSettings, metrics: Metrics) -> Hub:
    return Hub(
        echo,
        wanted,
        models=lambda: MODELS,
        others=lambda: ["guest"],
        metrics=metrics,
        on_refusal=lambda family, outcome, _rows: count_refusal(metrics, family, outcome),
    )


@pytest.fixture
async def joined() -> AsyncIterator[Joined]:
    echo, metrics = ClosableEcho(), Metrics()
    hub = hub_over(echo, settings(fronts=1), metrics)
    (front,) = hub._fronts
    ours, theirs = socket.socketpair()
    link = await front.join(ours)
    plane = FrontPlane()
    await plane.connect(theirs)
    yield Joined(plane, echo, front, hub, metrics)
    link.close()
    await plane.lost.wait()


def image_request(**changes: object) -> InferRequest:
    request = InferRequest("echo", [Tensor("image", "FP32", IMAGE)], outputs=[RequestedOutput("image", binary=True)])
    for name, value in changes.items():
        setattr(request, name, value)
    return request
