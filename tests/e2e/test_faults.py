"""Triton killed, orchestrator told to stop, both under load: every request gets an answer or a refusal."""

from __future__ import annotations

import os
import signal
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from tritonclient.grpc import service_pb2_grpc

from tests.e2e.conftest import tiny_stack
from tests.e2e.load import start_replay, tiny_rows
from tests.fakes.servers import running, server_pid, wait_until_ready

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.e2e.load import Replay
    from tests.fakes.servers import Stack

pytestmark = [pytest.mark.triton, pytest.mark.loaded, pytest.mark.timeout(180)]


def _over_both_transports(stack: Stack, folder: Path, *options: str) -> list[Replay]:
    """Start one load over HTTP and one over gRPC."""
    loads = []
    for transport, url in (("http", stack.url), ("grpc", f"grpc://{stack.grpc_address}")):
        own = folder / f"{transport}{options[0]}"
        own.mkdir()
        loads.append(start_replay(own, url, tiny_rows(own), *options))
    return loads


@contextmanager
def _idle_stream(address: str) -> Iterator[grpc.Call]:
    over = threading.Event()

    def requests() -> Iterator[Any]:
        over.wait()
        yield from ()

    with grpc.insecure_channel(address) as channel:
        try:
            yield service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelStreamInfer(requests())
        finally:
            over.set()


def test_triton_killed_under_load_refuses_loses_nothing_and_service_resumes(tmp_path: Path) -> None:
    with running(tiny_stack(tmp_path, ("a",))) as stack:
        loads = _over_both_transports(stack, tmp_path, "--rate=75", "--duration=15", "--slo=0.5")
        time.sleep(4)
        os.kill(server_pid(stack.tritons["a"]), signal.SIGKILL)
        process = stack.tritons["a"].process
        assert process is not None
        assert process.wait(30) == 1  # `cascadeserve triton` says that its server ended
        stack.start_triton("a")
        wait_until_ready(f"{stack.url}/v2/health/ready", stack.orchestrator, timeout_s=20)
        for report in (load.result() for load in loads):
            ledger = report["ledger"]
            assert ledger["lost"] == ledger["duplicated"] == ledger["failed"] == ledger["answered_wrong"] == 0, report
            assert ledger["refused"] > 0
            assert ledger["answered_correct"] > 0.3 * ledger["sent"]
        for load in _over_both_transports(stack, tmp_path, "--rate=50", "--duration=2", "--slo=0.5"):
            report = load.result()
            assert report["ledger"]["answered_correct"] == report["ledger"]["sent"], report["errors"]


@pytest.mark.parametrize("options", [(), ("--fronts=2",)], ids=["one process", "fronts"])
def test_sigterm_under_load_loses_nothing(tmp_path: Path, options: tuple[str, ...]) -> None:
    with running(tiny_stack(tmp_path, ("a",)), *options) as stack, _idle_stream(stack.grpc_address) as idle:
        loads = _over_both_transports(stack, tmp_path, "--rate=100", "--duration=6", "--slo=0.5")
        time.sleep(4)
        assert stack.orchestrator is not None
        stopped_s = time.monotonic()
        assert stack.orchestrator.stop() == 0
        # a second of lingering, not the ten that requests in flight may take
        assert time.monotonic() - stopped_s < 10
        assert idle.code() is grpc.StatusCode.UNAVAILABLE
        for ledger in (load.result()["ledger"] for load in loads):
            assert ledger["lost"] == ledger["duplicated"] == ledger["failed"] == ledger["answered_wrong"] == 0, ledger
            assert ledger["answered_correct"] > 150
            assert ledger["refused"] > 0  # what came after the listening sockets were closed
        # on a machine that is busy with other things some may be too late or too much, but none is cut off
        told = [text for load in loads for text in load.unanswered_before(stopped_s)]
        assert not [text for text in told if "shutting down" in text or "CANCELLED" in text]
