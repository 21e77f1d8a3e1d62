from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

from cascadeserve.cluster import CpuDevice, read_cluster
from cascadeserve.local_stack import TRITON_CORE, LocalStack, run_first

if TYPE_CHECKING:
    from pathlib import Path

    import pytest


def test_with_a_plan_the_orchestrator_runs_too_and_is_asked(tmp_path: Path) -> None:
    stack = LocalStack(tmp_path / "state", repository=tmp_path / "models", plan=tmp_path / "plan.json")
    ((command, _),) = stack._commands()
    assert command[:4] == [sys.executable, "-m", "cascadeserve", "up"]
    assert f"--plan={tmp_path / 'plan.json'}" in command
    assert stack.url != stack.triton_url


def test_without_a_plan_there_is_triton_alone(tmp_path: Path) -> None:
    stack = LocalStack(tmp_path / "state", repository=tmp_path / "models", models=["large"], config_name="baseline")
    ((command, _),) = stack._commands()
    assert command[3] == "triton"
    assert command[-2:] == ["--model=large", "--config-name=baseline"]
    assert stack.url == stack.triton_url


def test_triton_has_a_core_of_its_own(tmp_path: Path) -> None:
    stack = LocalStack(tmp_path / "state", repository=tmp_path / "models")
    device = read_cluster(stack.cluster).endpoint("triton0").device
    assert isinstance(device, CpuDevice)
    assert device.cores == (TRITON_CORE,)


def test_each_of_several_cores_has_a_triton(tmp_path: Path) -> None:
    stack = LocalStack(tmp_path / "state", repository=tmp_path / "models", cores=[0, 1])
    assert [endpoint.name for endpoint in read_cluster(stack.cluster).endpoints] == ["triton0", "triton1"]
    commands, urls = zip(*stack._commands(), strict=True)
    assert ["--endpoint=triton0" in commands[0], "--endpoint=triton1" in commands[1]] == [True, True]
    assert (urls[0], len(set(urls))) == (stack.url, 2)


def test_a_process_may_be_let_run_first() -> None:
    with subprocess.Popen(["sleep", "10"]) as process:
        try:
            allowed = run_first(process.pid)
            assert (os.sched_getscheduler(process.pid) == os.SCHED_FIFO) == allowed
        finally:
            process.kill()


def test_where_that_is_not_allowed_things_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    assert run_first(os.getpid()) is False
