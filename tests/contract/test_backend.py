"""What every Backend must do: the fake and the real Triton pass the same suite, so that the fake cannot lie."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import numpy as np
import pytest

from cascadeserve.cluster import read_cluster
from cascadeserve.gear_plan import TensorSpec
from cascadeserve.local_triton.working_copy import prepare_working_copy
from orchestrator.backend import CallRejected, EndpointDown, ModelVersion
from orchestrator.instance_config import InstanceConfig
from orchestrator.triton import TritonBackend
from tests.fakes.fake_backend import FakeTriton
from tests.fakes.servers import Stack, free_ports
from tests.fakes.tiny import VERSION_OFFSET, rows, write_repository, write_version
from tests.orchestrator.conftest import cluster

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from pathlib import Path

    from orchestrator.backend import Backend

SMALL, LARGE = ModelVersion("small", 1), ModelVersion("large", 1)
SPECS = (TensorSpec(name="x", datatype="FP32", shape=(3,)),)


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("contract")
    repository = folder / "repository"
    repository.mkdir()
    stack = Stack(folder, write_repository(repository), folder / "no-plan.json", ("a",))
    try:
        stack.start_triton("a")
        write_version(repository, "small", 2)
        prepare_working_copy(repository, read_cluster(stack.cluster), stack.state)
        yield stack
    finally:
        stack.stop()


@pytest.fixture(params=["fake", pytest.param("triton", marks=[pytest.mark.triton])])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def repository(request: pytest.FixtureRequest, kind: str, tmp_path: Path) -> Path:
    """The working copy that is served, with a version 2 of `small` that came after the start."""
    if kind == "triton":
        stack: Stack = request.getfixturevalue("stack")
        return stack.state / "model_repository"
    source = tmp_path / "source"
    source.mkdir()
    write_version(write_repository(source), "small", 2)
    copy = prepare_working_copy(source, cluster(("a",)), tmp_path / "state")
    InstanceConfig(copy, cluster(("a",))).write("a", "small", 1, {1})
    return copy


@pytest.fixture
async def backend(request: pytest.FixtureRequest, kind: str, repository: Path) -> AsyncIterator[Backend]:
    if kind == "fake":
        yield FakeTriton(repository=repository)
        return
    stack: Stack = request.getfixturevalue("stack")
    http, grpc, _ = stack.ports["a"]
    backend = TritonBackend(f"127.0.0.1:{grpc}", f"127.0.0.1:{http}")
    InstanceConfig(repository, cluster(("a",))).write("a", "small", 1, {1})
    yield backend
    await backend.load("small", timeout_s=30)
    await backend.load("large", timeout_s=30)
    await backend.close()


@pytest.fixture(params=["fake", "triton"])
async def dead_backend(request: pytest.FixtureRequest) -> AsyncIterator[Backend]:
    backend: Backend = FakeTriton(down=True)
    if request.param == "triton":
        backend = TritonBackend(*(f"127.0.0.1:{port}" for port in free_ports(2)))
    yield backend
    await backend.close()


async def test_answers_have_one_entry_per_row(backend: Backend) -> None:
    answer = await backend.infer(LARGE, SPECS, [rows([1, 2, 3], [0.1, 0.9, 0.5])], want_scores=False, timeout_s=10)
    assert answer.label.tolist() == [101, 102, 103]
    np.testing.assert_array_equal(answer.certainty, np.array([0.1, 0.9, 0.5], np.float32))
    assert answer.scores is None


async def test_scores_come_when_asked_for(backend: Backend) -> None:
    batch = rows([4, 5], [0.25, 0.75])
    answer = await backend.infer(SMALL, SPECS, [batch], want_scores=True, timeout_s=10)
    assert answer.scores is not None
    np.testing.assert_array_equal(answer.scores, batch)


async def test_ready_with_a_count_for_every_loaded_model(backend: Backend) -> None:
    assert await backend.is_live(timeout_s=10)
    assert await backend.instance_counts(timeout_s=10) == {SMALL: 1, LARGE: 1}


async def test_unknown_model_is_rejected(backend: Backend) -> None:
    with pytest.raises(CallRejected, match="nope"):
        await backend.infer(ModelVersion("nope", 1), SPECS, [rows([1], [1.0])], want_scores=False, timeout_s=10)


async def test_wrong_input_is_rejected(backend: Backend) -> None:
    with pytest.raises(CallRejected):
        await backend.infer(SMALL, SPECS, [np.zeros((2, 5), np.float32)], want_scores=False, timeout_s=10)


async def test_cancelled_batches_harm_nothing(backend: Backend) -> None:
    batch = rows([1, 2], [0.5, 0.5])
    for steps in range(20):
        tasks = [
            asyncio.create_task(backend.infer(SMALL, SPECS, [batch], want_scores=True, timeout_s=10)) for _ in range(3)
        ]
        for _ in range(steps):
            await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    answer = await backend.infer(SMALL, SPECS, [batch], want_scores=False, timeout_s=10)
    assert answer.label.tolist() == [1, 2]
    assert await backend.is_live(timeout_s=10)


async def test_unloaded_model_has_no_count_and_is_rejected_until_loaded(backend: Backend) -> None:
    await backend.unload("small", timeout_s=10)
    assert await backend.instance_counts(timeout_s=10) == {LARGE: 1}
    with pytest.raises(CallRejected):
        await backend.infer(SMALL, SPECS, [rows([1], [1.0])], want_scores=False, timeout_s=10)
    await backend.load("small", timeout_s=30)
    assert await backend.instance_counts(timeout_s=10) == {SMALL: 1, LARGE: 1}


async def test_versions_stand_side_by_side_as_the_config_file_says(backend: Backend, repository: Path) -> None:
    second = ModelVersion("small", 2)
    config = InstanceConfig(repository, cluster(("a",)))
    batch = rows([1, 2], [0.9, 0.9])

    async def labels(model: ModelVersion) -> list[int]:
        answer = await backend.infer(model, SPECS, [batch], want_scores=False, timeout_s=10)
        return answer.label.tolist()

    with pytest.raises(CallRejected):
        await labels(second)
    config.write("a", "small", 2, {1, 2})
    await backend.load("small", timeout_s=30)
    assert await backend.instance_counts(timeout_s=10) == {SMALL: 2, second: 2, LARGE: 1}
    assert await labels(SMALL) == [1, 2]
    assert await labels(second) == [1 + VERSION_OFFSET, 2 + VERSION_OFFSET]
    config.write("a", "small", 1, {2})
    await backend.load("small", timeout_s=30)
    assert await backend.instance_counts(timeout_s=10) == {second: 1, LARGE: 1}
    assert await labels(second) == [1 + VERSION_OFFSET, 2 + VERSION_OFFSET]
    with pytest.raises(CallRejected):
        await labels(SMALL)
    config.write("a", "small", 1, {1})
    await backend.load("small", timeout_s=30)
    assert await backend.instance_counts(timeout_s=10) == {SMALL: 1, LARGE: 1}


async def test_load_of_an_unknown_model_is_rejected(backend: Backend) -> None:
    with pytest.raises(CallRejected):
        await backend.load("nope", timeout_s=10)


async def test_a_server_that_is_gone_is_down_for_every_call(dead_backend: Backend) -> None:
    assert not await dead_backend.is_live(timeout_s=1)
    with pytest.raises(EndpointDown):
        await dead_backend.infer(SMALL, SPECS, [rows([1], [1.0])], want_scores=False, timeout_s=1)
    with pytest.raises(EndpointDown):
        await dead_backend.instance_counts(timeout_s=1)
    with pytest.raises(EndpointDown):
        await dead_backend.load("small", timeout_s=1)
    with pytest.raises(EndpointDown):
        await dead_backend.unload("small", timeout_s=1)
