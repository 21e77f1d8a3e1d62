"""Triton killed, orchestrator told to stop, both under load: every request gets an answer or a refusal."""

from __future__ import annotations

import os
import signal
import time
from typing import TYPE_CHECKING

import pytest

from tests.e2e.conftest import tiny_stack
from tests.e2e.load import start_replay, tiny_rows
from tests.fakes.servers import running, server_pid, wait_until_ready

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.triton, pytest.mark.timeout(180)]


@pytest.mark.parametrize("transport", ["http", "grpc"])
def test_triton_killed_under_load_refuses_loses_nothing_and_service_resumes(tmp_path: Path, transport: str) -> None:
    with running(tiny_stack(tmp_path, ("a",))) as stack:
        url = stack.url if transport == "http" else f"grpc://{stack.grpc_address}"
        load = start_replay(tmp_path, url, tiny_rows(tmp_path), "--rate=150", "--duration=15", "--slo=0.5")
        time.sleep(4)
        os.kill(server_pid(stack.tritons["a"]), signal.SIGKILL)
        process = stack.tritons["a"].process
        assert process is not None
        assert process.wait(30) == 1  # `cascadeserve triton` says that its server ended
        stack.start_triton("a")
        wait_until_ready(f"{stack.url}/v2/health/ready", stack.orchestrator, timeout_s=20)
        report = load.result()
        ledger = report["ledger"]
        assert ledger["lost"] == ledger["duplicated"] == ledger["failed"] == ledger["answered_wrong"] == 0, report
        assert ledger["refused"] > 0
        assert ledger["answered_correct"] > 0.3 * ledger["sent"]
        after = start_replay(tmp_path, url, tiny_rows(tmp_path), "--rate=100", "--duration=2", "--slo=0.5").result()
        assert after["ledger"]["answered_correct"] == after["ledger"]["sent"]


@pytest.mark.parametrize(
    ("transport", "options"), [("http", ()), ("grpc", ()), ("http", ("--fronts=2",))], ids=["http", "grpc", "fronts"]
)
def test_sigterm_under_load_loses_nothing(tmp_path: Path, transport: str, options: tuple[str, ...]) -> None:
    with running(tiny_stack(tmp_path, ("a",)), *options) as stack:
        url = stack.url if transport == "http" else f"grpc://{stack.grpc_address}"
        load = start_replay(tmp_path, url, tiny_rows(tmp_path), "--rate=200", "--duration=8", "--slo=0.5")
        time.sleep(4)
        assert stack.orchestrator is not None
        assert stack.orchestrator.stop() == 0
        ledger = load.result()["ledger"]
        assert ledger["lost"] == ledger["duplicated"] == ledger["failed"] == ledger["answered_wrong"] == 0, ledger
        assert ledger["answered_correct"] > 300
        assert ledger["refused"] > 0  # what came after the listening sockets were closed
