"""Where the batches of a queue may go: its gear's load weights, what the endpoints host and have room for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cascadeserve.policy.work import share_at

if TYPE_CHECKING:
    from collections.abc import Sequence

    from orchestrator.backend import ModelVersion
    from orchestrator.state import EndpointState, FamilyQueue


def is_hosted(model: ModelVersion, endpoints: Sequence[EndpointState]) -> bool:
    """Whether any endpoint can be sent batches of the model at all."""
    for endpoint in endpoints:  # noqa: SIM110 - asked for every request: any() takes twice as long
        if endpoint.hosts(model):
            return True
    return False


def work_there_s(queue: FamilyQueue, model: ModelVersion, endpoints: Sequence[EndpointState]) -> float:
    """Device-seconds that a row waiting in a queue takes, from there on, of the endpoints that host a model.

    0 where none of them hosts the queue's own.
    """
    there = [endpoint.hosts(model) for endpoint in endpoints]
    if all(there) and is_hosted(queue.model, endpoints):
        return queue.family.work_from_s(queue.model.name)  # as a rule: whatever is done is done there
    slots = [endpoint.slots for endpoint in endpoints]

    def share(of: ModelVersion) -> float:
        return share_at(there, [endpoint.hosts(of) for endpoint in endpoints], slots)

    return queue.family.work_at_s(queue.model.name, share) if share(queue.model) else 0.0


def load_weights(queue: FamilyQueue, endpoints: Sequence[EndpointState]) -> list[float]:
    """The gear's load weights x slots; slots alone where it names none or only endpoints that are down."""
    planned = queue.family.gear.load.get(queue.model.name)
    if planned is not None:
        weights = [planned.get(endpoint.name, 0.0) * endpoint.slots_frac for endpoint in endpoints]
        live = (endpoint.hosts(queue.model) for endpoint in endpoints)
        if any(w > 0.0 for w, up in zip(weights, live, strict=True) if up):
            return weights
    return [endpoint.slots_frac for endpoint in endpoints]


def with_room(queue: FamilyQueue, endpoints: Sequence[EndpointState]) -> list[bool]:
    """Which endpoints a batch of the queue may leave for now."""
    free = [endpoint.has_room(queue.occupied) for endpoint in endpoints]
    if True not in free:
        return free  # as a rule: every row asks that comes while the slots are busy
    return [w > 0.0 and room for w, room in zip(load_weights(queue, endpoints), free, strict=True)]
