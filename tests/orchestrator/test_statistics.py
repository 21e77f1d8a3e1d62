"""Statistics as Triton's clients read them, on virtual time: what took how long is known."""

from __future__ import annotations

import asyncio

import pytest

from cascadeserve.errors import InvalidRequest
from orchestrator.wire.tensors import InferRequest, Tensor
from tests.fakes.tiny import rows
from tests.orchestrator.conftest import make_rig

pytestmark = pytest.mark.looptime

MS = 1_000_000


def request(*certainties: float) -> InferRequest:
    return InferRequest("family", [Tensor("x", "FP32", rows([1] * len(certainties), list(certainties)))])


async def test_nothing_was_asked_yet() -> None:
    rig = await make_rig()
    (family,) = await rig.orchestrator.data_plane.statistics("", "")
    assert (family.name, family.version, family.inference_count, family.success.count) == ("family", "1", 0, 0)


async def test_rows_batches_and_times() -> None:
    rig = await make_rig(busy_s={"small": 0.010, "large": 0.030})
    plane = rig.orchestrator.data_plane
    # two rows, of which one goes on to the large model
    await plane.infer(request(0.9, 0.1))
    (family,) = await plane.statistics("family", "1")
    assert (family.inference_count, family.execution_count) == (2, 2)
    assert family.last_inference_ms > 0
    assert (family.success.count, family.success.ns) == (1, pytest.approx(40 * MS))
    # on average over the rows: 10 ms and 40 ms
    assert (family.compute.count, family.compute.ns) == (1, pytest.approx(25 * MS))
    assert family.queue.ns == pytest.approx(0, abs=MS)
    assert {size: duration.count for size, duration in family.batches.items()} == {2: 1, 1: 1}
    assert family.batches[1].ns == pytest.approx(30 * MS)


async def test_what_waits_is_told_from_what_is_with_triton() -> None:
    rig = await make_rig(busy_s={"small": 0.010})
    plane = rig.orchestrator.data_plane
    # one slot, and so two batches in flight: the others wait for 10 ms
    await asyncio.gather(*(plane.infer(request(0.9)) for _ in range(4)))
    (family,) = await plane.statistics("family", "")
    assert family.queue.ns == pytest.approx(20 * MS)
    assert family.compute.ns == pytest.approx(40 * MS)
    assert family.success.ns == pytest.approx(60 * MS)


async def test_failures_are_counted_apart() -> None:
    rig = await make_rig(reject="no")
    plane = rig.orchestrator.data_plane
    with pytest.raises(Exception, match="failed, alone: no"):
        await plane.infer(request(0.9))
    with pytest.raises(InvalidRequest):
        await plane.infer(InferRequest("family", []))
    (family,) = await plane.statistics("", "")
    assert (family.fail.count, family.success.count, family.inference_count) == (2, 0, 0)


@pytest.mark.parametrize(("name", "version"), [("nope", ""), ("family", "2")])
async def test_unknown_models_have_none(name: str, version: str) -> None:
    rig = await make_rig()
    with pytest.raises(InvalidRequest, match="not available"):
        await rig.orchestrator.data_plane.statistics(name, version)


async def test_config_and_index() -> None:
    rig = await make_rig()
    plane = rig.orchestrator.data_plane
    config = plane.model_config("family", "")
    assert (config.name, config.max_batch_size, config.inputs[0].shape) == ("family", 64, (-1, 3))
    assert [(entry.name, entry.version, entry.ready) for entry in plane.repository_index()] == [("family", "1", True)]
    rig.orchestrator.dispatcher.endpoint_is_down(rig.orchestrator.dispatcher.endpoints[0])
    assert not plane.repository_index()[0].ready
