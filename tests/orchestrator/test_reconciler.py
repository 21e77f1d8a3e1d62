from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
from typing import TYPE_CHECKING

import pytest

from cascadeserve.local_triton.working_copy import prepare_working_copy
from cascadeserve.triton_config import instance_count, parse_config
from orchestrator.backend import ModelVersion
from tests.fakes.tiny import plan_document, rows, write_repository
from tests.orchestrator.conftest import Rig, cluster, make_rig

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

pytestmark = pytest.mark.looptime

LARGE = ModelVersion("large", 1)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    source.mkdir()
    return prepare_working_copy(write_repository(source), cluster(("a",)), tmp_path / "state")


@contextlib.asynccontextmanager
async def reconciling(rig: Rig) -> AsyncIterator[None]:
    task = asyncio.create_task(rig.orchestrator.reconciler.run())
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def count_on_disk(repository: Path, model: str) -> int:
    return instance_count(parse_config((repository / model / "configs" / "a.pbtxt").read_text()))


def aim(rig: Rig, layout: str) -> None:
    rig.orchestrator.reconciler.aim_at(rig.orchestrator.reconciler.plan.layout(layout))


async def test_capacity_stands_before_the_layout_is_in_force(repository: Path) -> None:
    rig = await make_rig(repository=repository, load_s=2.0, counts_on_load={"large": 2})
    async with reconciling(rig):
        aim(rig, "broad")
        await asyncio.sleep(1.5)
        assert rig.orchestrator.reconciler.in_force.name == "narrow"
        assert count_on_disk(repository, "large") == 2
        await asyncio.sleep(1.0)
        assert rig.orchestrator.reconciler.in_force.name == "broad"
    assert rig.fakes["a"].loads == ["large"]


async def test_shrinking_holds_batches_to_the_remaining_instances_first(repository: Path) -> None:
    rig = await make_rig(repository=repository, busy_s={"small": 0.1, "large": 0.1}, load_s=5.0)
    fake = rig.fakes["a"]
    fake.instances["large"] = 2
    await rig.probe()
    dispatcher = rig.orchestrator.dispatcher
    futures = [dispatcher.submit(rig.family, [rows([i], [0.1])], timeout_s=60.0, want_scores=False) for i in range(200)]
    async with reconciling(rig):
        await asyncio.sleep(0.1)
        aim(rig, "narrow")
        await asyncio.sleep(1.0)  # the shrink 2 -> 1 is under way
        fake.max_in_flight_by_model["large"] = 0
        fake.max_in_flight = 0
        await asyncio.sleep(0.5)
        assert dispatcher.endpoints[0].hosted[LARGE] == 1
        assert fake.in_flight <= 2
        await asyncio.sleep(6.0)
        assert dispatcher.endpoints[0].hosted[LARGE] is None
    assert count_on_disk(repository, "large") == 1
    await asyncio.gather(*futures)


async def test_a_failed_load_keeps_the_old_layout_restores_the_file_and_backs_off(repository: Path) -> None:
    rig = await make_rig(repository=repository)
    rig.fakes["a"].fail_loads = "no memory"
    async with reconciling(rig):
        aim(rig, "broad")
        await asyncio.sleep(20.0)
        assert rig.orchestrator.reconciler.in_force.name == "narrow"
        assert count_on_disk(repository, "large") == 1
        text = rig.orchestrator.metrics.render()[0].decode()
        line = next(line for line in text.splitlines() if line.startswith("cascadeserve_instance_changes_total{"))
        assert 3 <= float(line.rpartition(" ")[2]) <= 6  # 1, 2, 4, 8 s apart
        rig.fakes["a"].fail_loads = ""
        rig.fakes["a"].counts_on_load = {"large": 2}
        await asyncio.sleep(20.0)
        assert rig.orchestrator.reconciler.in_force.name == "broad"


async def test_an_unwritable_repository_keeps_the_old_layout(repository: Path) -> None:
    rig = await make_rig(repository=repository)
    (repository / "large" / "configs" / "a.pbtxt").unlink()
    async with reconciling(rig):
        aim(rig, "broad")
        await asyncio.sleep(3.0)
    assert rig.orchestrator.reconciler.in_force.name == "narrow"
    assert rig.fakes["a"].loads == []


async def test_a_broken_config_file_keeps_the_old_layout(repository: Path) -> None:
    rig = await make_rig(repository=repository)
    (repository / "large" / "configs" / "a.pbtxt").write_text("not a config {")
    async with reconciling(rig):
        aim(rig, "broad")
        await asyncio.sleep(3.0)
        assert rig.orchestrator.reconciler.in_force.name == "narrow"
        text = rig.orchestrator.metrics.render()[0].decode()
        assert 'cascadeserve_instance_changes_total{endpoint="a",model="large",outcome="failed"}' in text
    assert rig.fakes["a"].loads == []


async def test_a_layout_that_stands_already_is_taken_over_at_start(repository: Path) -> None:
    rig = await make_rig(repository=repository)
    rig.fakes["a"].instances["large"] = 2
    await rig.probe()
    async with reconciling(rig):
        await asyncio.sleep(3.0)
    assert rig.orchestrator.reconciler.in_force.name == "broad"
    assert rig.fakes["a"].loads == []


async def test_missing_models_are_loaded_at_start(repository: Path) -> None:
    rig = await make_rig(repository=repository)
    del rig.fakes["a"].instances["small"]
    await rig.probe()
    assert not rig.orchestrator.data_plane.ready()
    async with reconciling(rig):
        await asyncio.sleep(0.1)
    assert rig.orchestrator.data_plane.ready()


async def test_surplus_models_are_unloaded_only_when_no_gear_in_force_uses_them(repository: Path) -> None:
    document = plan_document()
    family = document["families"]["family"]
    family["gears"] = [
        {
            "name": "only", "layout": "narrow", "min_rate_per_s": 0.0, "max_rate_per_s": 1000.0,
            "ladder_entry": "reference",
        },
    ]  # fmt: skip
    document["layouts"] = [{"name": "narrow", "instances": {"a": {"large": 1}}}]
    rig = await make_rig(document, repository=repository)
    async with reconciling(rig):
        await asyncio.sleep(0.5)
    assert rig.fakes["a"].instances == {"large": 1}
    assert rig.orchestrator.data_plane.ready()


async def test_counts_are_left_alone_without_a_repository() -> None:
    rig = await make_rig()
    async with reconciling(rig):
        aim(rig, "broad")
        await asyncio.sleep(3.0)
    assert rig.fakes["a"].loads == []
    assert rig.orchestrator.reconciler.in_force.name == "narrow"


async def test_rows_on_their_way_keep_the_model_they_may_still_need(repository: Path) -> None:
    """Rows bound to a gear that used `large` are answered by it, though the layout drops it meanwhile."""
    document = plan_document()
    family = document["families"]["family"]
    family["ladder"].append({"name": "small", "stages": [{"model": "small"}], "reach": [1.0]})
    family["gears"][2]["ladder_entry"] = family["gears"][3]["ladder_entry"] = "small"
    document["layouts"][1]["instances"] = {"a": {"small": 1}}
    rig = await make_rig(document, repository=repository, busy_s={"small": 3.0})
    future = rig.orchestrator.dispatcher.submit(rig.family, [rows([1], [0.1])], timeout_s=60.0, want_scores=False)
    async with reconciling(rig):
        await asyncio.sleep(0.5)
        aim(rig, "broad")
        rig.gear("wide")
        await asyncio.sleep(2.0)
        assert rig.fakes["a"].instances == {"small": 1, "large": 1}
        assert (await future).label.tolist() == [101]
        await asyncio.sleep(3.0)
    assert rig.fakes["a"].instances == {"small": 1}


async def test_a_model_whose_first_load_fails_is_unloaded_and_the_others_serve_on(repository: Path) -> None:
    rig = await make_rig(repository=repository)
    del rig.fakes["a"].instances["large"]
    rig.fakes["a"].fail_loads = "bad model"
    await rig.probe()
    async with reconciling(rig):
        await asyncio.sleep(5.0)
    assert rig.fakes["a"].unloads
    assert set(rig.fakes["a"].unloads) == {"large"}
    assert rig.orchestrator.dispatcher.endpoints[0].hosts(ModelVersion("small", 1))


async def test_what_a_probe_read_before_an_unload_does_not_bring_the_model_back(repository: Path) -> None:
    rig = await make_rig(repository=repository)
    endpoint = rig.orchestrator.dispatcher.endpoints[0]
    fake = rig.fakes["a"]
    stale = await fake.instance_counts(timeout_s=1)
    asked = asyncio.Event()

    async def slow_counts(*, timeout_s: float) -> dict[ModelVersion, int]:  # noqa: ARG001
        asked.set()
        await asyncio.sleep(1.0)
        return stale

    fake.instance_counts = slow_counts  # type: ignore[method-assign]
    probe = asyncio.create_task(rig.orchestrator.monitors["a"].probe())
    await asked.wait()
    endpoint.changes += 1
    endpoint.hosted.pop(LARGE)
    await probe
    assert not endpoint.hosts(LARGE)


async def test_an_ensemble_is_loaded_after_what_it_is_composed_of_and_unloaded_before(tmp_path: Path) -> None:
    source = tmp_path / "source"
    write_repository(source, ("small", "tokens", "classifier"))
    (source / "large" / "1").mkdir(parents=True)
    steps = "".join(
        f'step {{ model_name: "{name}" model_version: -1 input_map {{ key: "{a}" value: "{a}" }} '
        f'output_map {{ key: "{b}" value: "{b}" }} }} '
        for name, a, b in (("tokens", "x", "y"), ("classifier", "y", "z"))
    )
    (source / "large" / "config.pbtxt").write_text(
        f'name: "large" platform: "ensemble" ensemble_scheduling {{ {steps} }}'
    )
    document = plan_document()
    family = document["families"]["family"]
    family["models"]["large"]["composed_of"] = {"tokens": 1, "classifier": 1}
    family["ladder"].append({"name": "small", "stages": [{"model": "small"}], "reach": [1.0]})
    for gear in family["gears"][:2]:
        gear["ladder_entry"] = "small"
    document["layouts"][0]["instances"] = {"a": {"small": 1}}
    document["layouts"][1]["instances"] = {"a": {"small": 1, "tokens": 1, "classifier": 2}}
    repository = prepare_working_copy(source, cluster(("a",)), tmp_path / "state")
    rig = await make_rig(
        document, repository=repository, instances={"small": 1}, load_s=1.0, counts_on_load={"classifier": 2}
    )
    fake = rig.fakes["a"]
    async with reconciling(rig):
        aim(rig, "broad")
        await asyncio.sleep(5.0)
        assert sorted(fake.loads[:2]) == ["classifier", "tokens"]
        assert fake.loads[2:] == ["large"]
        assert rig.orchestrator.reconciler.in_force.name == "broad"
        assert count_on_disk(repository, "classifier") == 2
        assert rig.orchestrator.dispatcher.endpoints[0].hosts(LARGE)
        aim(rig, "narrow")
        await asyncio.sleep(5.0)
        assert fake.unloads[0] == "large"
        assert sorted(fake.unloads) == ["classifier", "large", "tokens"]
        assert rig.orchestrator.reconciler.in_force.name == "narrow"


FAILING = 'cascadeserve_instance_change_failing{endpoint="a",model="large"}'


@pytest.mark.parametrize("number", [errno.EROFS, errno.ENOSPC])
async def test_a_file_that_cannot_be_written_keeps_the_old_layout_with_one_alarm(
    repository: Path, number: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    rig = await make_rig(repository=repository)
    before = (repository / "large" / "configs" / "a.pbtxt").read_bytes()

    def refuse(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr("cascadeserve.endpoint_config.write_atomically", refuse)
        async with reconciling(rig):
            aim(rig, "broad")
            await asyncio.sleep(10.0)
    assert rig.orchestrator.reconciler.in_force.name == "narrow"
    assert rig.fakes["a"].loads == []
    assert (repository / "large" / "configs" / "a.pbtxt").read_bytes() == before
    alarms = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert [os.strerror(number) in record.getMessage() for record in alarms] == [True]
    assert f"{FAILING} 1.0" in rig.orchestrator.metrics.render()[0].decode()
    rig.fakes["a"].counts_on_load = {"large": 2}
    async with reconciling(rig):
        await asyncio.sleep(20.0)
    assert rig.fakes["a"].loads == ["large"]
    assert f"{FAILING} 0.0" in rig.orchestrator.metrics.render()[0].decode()


async def test_a_config_that_is_no_text_is_an_alarm_too_and_ends_with_the_wish(
    repository: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rig = await make_rig(repository=repository)
    (repository / "large" / "configs" / "a.pbtxt").write_bytes(b"\xff\xfe")
    async with reconciling(rig):
        aim(rig, "broad")
        await asyncio.sleep(5.0)
        assert len([record for record in caplog.records if record.levelno >= logging.WARNING]) == 1
        assert "UTF-8" in caplog.text
        assert f"{FAILING} 1.0" in rig.orchestrator.metrics.render()[0].decode()
        aim(rig, "narrow")
        await asyncio.sleep(2.0)
        assert f"{FAILING} 0.0" in rig.orchestrator.metrics.render()[0].decode()
    assert rig.fakes["a"].loads == []


async def test_a_count_that_triton_takes_for_another_is_a_failure_and_not_tried_without_end(repository: Path) -> None:
    rig = await make_rig(repository=repository, counts_on_load={"large": 3})
    async with reconciling(rig):
        aim(rig, "broad")
        await asyncio.sleep(10.0)
    assert 1 <= len(rig.fakes["a"].loads) <= 6
    assert f"{FAILING} 1.0" in rig.orchestrator.metrics.render()[0].decode()


async def test_a_server_that_comes_up_again_does_not_wait_for_what_failed_before(repository: Path) -> None:
    rig = await make_rig(repository=repository)
    rig.fakes["a"].fail_loads = "no memory"
    async with reconciling(rig):
        aim(rig, "broad")
        await asyncio.sleep(40.0)
        rig.fakes["a"].down = True
        await rig.probe()
        rig.fakes["a"].fail_loads = ""
        rig.fakes["a"].counts_on_load = {"large": 2}
        rig.fakes["a"].down = False
        await rig.probe()
        await asyncio.sleep(1.0)
        assert rig.orchestrator.reconciler.in_force.name == "broad"
