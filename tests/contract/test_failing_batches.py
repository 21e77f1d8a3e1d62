"""How a Backend says that a batch failed: the fake and a real Triton alike."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import numpy as np
import pytest

from cascadeserve.gear_plan import TensorSpec
from orchestrator.backend import CallRejected, ConnectionLost, ModelVersion, NoConnection, NotServed, StubDead
from orchestrator.triton import TritonBackend
from tests.fakes.fake_backend import FakeTriton
from tests.fakes.servers import Stack
from tests.fakes.tiny import ERRS, EXITS, KILLS, mark_model, marked, rows, write_repository

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from orchestrator.backend import Backend, BatchAnswer

SMALL = ModelVersion("small", 1)
SPECS = (TensorSpec(name="x", datatype="FP32", shape=(3,)),)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("failing")
    (folder / "repository").mkdir()
    repository = write_repository(folder / "repository")
    mark_model(repository, "small")
    stack = Stack(folder, repository, folder / "no-plan.json", ("a",))
    try:
        stack.start_triton("a")
        yield stack
    finally:
        stack.stop()


@pytest.fixture(params=["fake", pytest.param("triton", marks=[pytest.mark.triton])])
async def backend(request: pytest.FixtureRequest) -> AsyncIterator[Backend]:
    if request.param == "fake":
        yield FakeTriton()
        return
    http, grpc, _ = request.getfixturevalue("stack").ports["a"]
    backend = TritonBackend(f"127.0.0.1:{grpc}", f"127.0.0.1:{http}")
    yield backend
    await backend.close()


async def send(backend: Backend, mark: float, *, model: ModelVersion = SMALL) -> BatchAnswer:
    batch = np.concatenate([rows([1], [0.9]), marked(2, 0.9, mark)])
    return await backend.infer(model, SPECS, [batch], want_scores=False, timeout_s=10)


async def test_an_error_of_the_model_comes_with_its_sentence_and_harms_no_other_batch(backend: Backend) -> None:
    with pytest.raises(CallRejected) as caught:
        await send(backend, ERRS)
    assert type(caught.value) is CallRejected
    assert "a row is marked" in caught.value.answer
    assert caught.value.status == 500
    assert (await send(backend, 0.0)).label.tolist() == [1, 2]


async def test_a_version_that_is_not_served_is_told_apart(backend: Backend) -> None:
    with pytest.raises(NotServed):
        await send(backend, 0.0, model=ModelVersion("small", 7))


async def test_a_dead_process_fails_every_batch_until_the_model_is_unloaded_and_loaded(backend: Backend) -> None:
    for mark in (EXITS, 0.0):
        with pytest.raises(StubDead) as caught:
            await send(backend, mark)
        assert caught.value.model == "small"
    assert await backend.is_live(timeout_s=5)
    assert (await backend.instance_counts(timeout_s=5))[SMALL] == 1
    await backend.load("small", timeout_s=30)
    with pytest.raises(StubDead):
        await send(backend, 0.0)
    await backend.unload("small", timeout_s=30)
    await backend.load("small", timeout_s=30)
    assert (await send(backend, 0.0)).label.tolist() == [1, 2]


async def test_a_crash_breaks_every_batch_under_way_and_then_none_is_taken(backend: Backend) -> None:
    """The last one: the server is gone."""
    results = await asyncio.gather(send(backend, KILLS), send(backend, KILLS), return_exceptions=True)
    assert [type(result) for result in results] == [ConnectionLost] * 2
    # while the process ends its sockets still take connections, and break them
    results = [ConnectionLost("")]
    async with asyncio.timeout(5):
        while isinstance(results[0], ConnectionLost):
            results = await asyncio.gather(send(backend, 0.0), return_exceptions=True)
    assert type(results[0]) is NoConnection
    assert not await backend.is_live(timeout_s=5)
