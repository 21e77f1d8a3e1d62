"""Whether models answer as they were recorded is looked at where they come to stand, and voids the certificate."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from cascadeserve.local_triton.working_copy import prepare_working_copy
from orchestrator.probe_rows import AGAIN_AFTER_S, say_what_is_not_probed
from orchestrator.wire.tensors import InferRequest, Tensor
from tests.fakes.certified import certified_document
from tests.fakes.tiny import plan, rows, write_repository, write_version
from tests.orchestrator.conftest import Rig, cluster, make_rig

if TYPE_CHECKING:
    from pathlib import Path

    from orchestrator.backend import BatchAnswer, ModelVersion
    from tests.fakes.fake_backend import FakeTriton

pytestmark = pytest.mark.looptime


async def certified(rig: Rig) -> bool:
    """Whether the answer to a request says so."""
    request = InferRequest("family", inputs=[Tensor("x", "FP32", rows([1], [0.9]))], parameters={"timeout": 60_000_000})
    return bool((await rig.orchestrator.data_plane.infer(request)).parameters["certified"])


async def look(rig: Rig) -> None:
    for probe_rows in rig.orchestrator.probe_rows.values():
        await probe_rows.look()


def asked(fake: FakeTriton) -> list[tuple[str, int]]:
    """Models and rows of the batches since this was last called."""
    found = [(call.model, call.rows) for call in fake.calls]
    fake.calls.clear()
    return found


def void(rig: Rig) -> set[str]:
    """Where the alarm is raised."""
    lines = rig.orchestrator.metrics.render()[0].decode().splitlines()
    return {line for line in lines if line.startswith("cascadeserve_certificate_void{") and line.endswith(" 1.0")}


def swap(monkeypatch: pytest.MonkeyPatch, fake: FakeTriton, name: str, change: float = 0.02) -> None:
    """Have a model be another one, which is a little more certain."""
    infer = fake.infer

    async def changed(model: ModelVersion, *args: Any, **options: Any) -> BatchAnswer:
        answer = await infer(model, *args, **options)
        return replace(answer, certainty=answer.certainty + change) if model.name == name else answer

    monkeypatch.setattr(fake, "infer", changed)


async def test_models_are_asked_once_where_they_stand_and_it_is_no_demand() -> None:
    rig = await make_rig(certified_document(("a", "b")), names=("a", "b"))
    await look(rig)
    await look(rig)
    for fake in rig.fakes.values():
        assert sorted(asked(fake)) == [("large", 3), ("small", 3)]
        assert fake.max_in_flight == 1, "one at a time"
    for endpoint in rig.orchestrator.dispatcher.endpoints:
        assert (endpoint.in_flight, endpoint.answers, endpoint.work_s) == (0, 0, 0.0)
    rig.orchestrator.gear_loop.tick(asyncio.get_running_loop().time())
    assert rig.orchestrator.gear_loop.demands_per_s() == {"family": 0.0}
    assert await certified(rig)
    assert not void(rig)


async def test_another_model_voids_the_certificate_until_the_right_one_is_back(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rig = await make_rig(certified_document(("a", "b")), names=("a", "b"))
    fake = rig.fakes["b"]
    with monkeypatch.context() as patch:
        swap(patch, fake, "large")
        await look(rig)
        assert not await certified(rig), "requests are answered, but not certified"
        assert void(rig) == {'cascadeserve_certificate_void{endpoint="b",family="family",model="large"} 1.0'}
        (alarm,) = [each.getMessage() for each in caplog.records if each.levelno == logging.ERROR]
        assert alarm == (
            "endpoint b: large:1 answers 3 of 3 probe rows otherwise than when it was recorded (row 0: label 101, "
            "certainty 0.9200, recorded were 101 and 0.9000); the certificate of family is void, its answers are not "
            "certified"
        )
    rig.orchestrator.dispatcher.endpoint_is_down(rig.orchestrator.dispatcher.endpoints[1])
    await look(rig)
    assert not await certified(rig), "nobody knows yet what comes back"
    asked(fake)
    await rig.probe()
    await look(rig)
    assert sorted(asked(fake)) == [("large", 3), ("small", 3)]
    assert await certified(rig)
    assert not void(rig)


async def test_rounding_voids_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = await make_rig(certified_document())
    swap(monkeypatch, rig.fakes["a"], "small", 0.004)
    await look(rig)
    assert await certified(rig)


async def test_a_model_that_is_gone_voids_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = await make_rig(certified_document(("a", "b")), names=("a", "b"))
    with monkeypatch.context() as patch:
        swap(patch, rig.fakes["b"], "large")
        await look(rig)
    assert void(rig)
    del rig.fakes["b"].instances["large"]
    await rig.probe()
    await look(rig)
    assert await certified(rig)
    assert not void(rig)
    rig.fakes["b"].instances["large"] = 1
    await rig.probe()
    asked(rig.fakes["b"])
    await look(rig)
    assert asked(rig.fakes["b"]) == [("large", 3)], "it came anew"


async def test_a_model_that_was_loaded_anew_is_asked_again(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    repository = prepare_working_copy(write_repository(tmp_path / "source"), cluster(("a",)), tmp_path / "state")
    rig = await make_rig(certified_document(), repository=repository, counts_on_load={"large": 2})
    fake = rig.fakes["a"]
    await look(rig)
    asked(fake)
    task = asyncio.create_task(rig.orchestrator.reconciler.run())
    rig.orchestrator.reconciler.aim_at(rig.orchestrator.reconciler.plan.layout("broad"))
    await asyncio.sleep(1.0)
    await look(rig)
    assert fake.loads == ["large"]
    assert asked(fake) == [("large", 3)]
    rig.orchestrator.dispatcher.model_is_dead(rig.orchestrator.dispatcher.endpoints[0], "small")
    await asyncio.sleep(1.5)
    await look(rig)
    assert fake.loads == ["large", "small"]
    assert asked(fake) == [("small", 3)]
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_what_the_former_model_answered_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    rig = await make_rig(certified_document(), busy_s={"small": 1.0})
    (endpoint,) = rig.orchestrator.dispatcher.endpoints
    with monkeypatch.context() as patch:
        swap(patch, rig.fakes["a"], "small")
        looking = asyncio.create_task(look(rig))
        await asyncio.sleep(0.5)
    endpoint.loads["small"] += 1
    await looking
    assert not void(rig)
    asked(rig.fakes["a"])
    await look(rig)
    assert asked(rig.fakes["a"]) == [("small", 3)]


async def test_no_answer_is_no_other_answer_and_is_asked_for_again(caplog: pytest.LogCaptureFixture) -> None:
    rig = await make_rig(certified_document())
    fake = rig.fakes["a"]
    fake.reject = "out of memory"
    await look(rig)
    await look(rig)
    warnings = [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]
    assert warnings == [
        f"endpoint a: {model}:1 did not answer the probe rows: out of memory" for model in ("small", "large")
    ]
    fake.reject = ""
    assert await certified(rig)
    await asyncio.sleep(AGAIN_AFTER_S)
    asked(fake)
    await look(rig)
    assert sorted(asked(fake)) == [("large", 3), ("small", 3)]


async def test_rows_come_in_batches_that_the_model_takes() -> None:
    document = certified_document()
    model = document["families"]["family"]["models"]["small"]
    model |= {"max_batch": 2, "busy_s": [[1, 0.001], [2, 0.002]]}
    document["families"]["family"]["gears"][1]["triggers"] = {}
    rig = await make_rig(document)
    await look(rig)
    assert asked(rig.fakes["a"]) == [("small", 2), ("small", 1), ("large", 3)]
    assert not void(rig)


async def test_another_plan_is_held_against_its_own_probe_rows(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    prepare_working_copy(write_repository(source), cluster(("a",)), tmp_path / "state")
    write_version(source, "small", 2)
    repository = prepare_working_copy(source, cluster(("a",)), tmp_path / "state")
    rig = await make_rig(certified_document(), repository=repository)
    rig.fakes["a"].repository = repository
    await look(rig)
    rig.document["name"] = "next"
    rig.document["families"]["family"]["models"]["small"]["version"] = 2
    task = asyncio.create_task(rig.orchestrator.reconciler.run())
    await rig.orchestrator.plan_change.change()
    assert await certified(rig)
    await look(rig)
    assert not await certified(rig), "version 2 answers otherwise than version 1 was recorded"
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


@pytest.mark.parametrize("kind", ["probes", "no probes", "no certificate"])
async def test_that_nothing_is_looked_at_is_said(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    document = certified_document()
    if kind == "no probes":
        del document["families"]["family"]["certificate"]["probes"]
    elif kind == "no certificate":
        document["families"]["family"]["certificate"] = None
    with caplog.at_level(logging.INFO):
        say_what_is_not_probed(plan(document))
    assert ("family: the certificate has no probe rows" in caplog.text) is (kind == "no probes")
    if kind == "no probes":
        rig = await make_rig(document)
        await look(rig)
        assert not asked(rig.fakes["a"])
        assert await certified(rig)
