"""`cascadeserve triton`: clean start, pinning, stop, and no orphans however the parent ends."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.e2e.conftest import tiny_stack
from tests.fakes.servers import is_alive, server_pid, status_of

if TYPE_CHECKING:
    from tests.fakes.servers import Stack

pytestmark = [pytest.mark.triton, pytest.mark.timeout(120)]


@pytest.fixture
def stack(tmp_path: Path) -> Stack:
    return tiny_stack(tmp_path, ("a",))


def group_of(pid: int) -> set[int]:
    """Living processes of a process group: the server and its Python stubs."""
    members = set()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(entry.name)) == pid and is_alive(int(entry.name)):
                members.add(int(entry.name))
        except OSError:
            continue
    return members


def wait_gone(pids: set[int], timeout_s: float) -> None:
    give_up_s = time.monotonic() + timeout_s
    while any(map(is_alive, pids)):
        assert time.monotonic() < give_up_s, "orphans are left"
        time.sleep(0.1)


def run_triton(stack: Stack, state: Path) -> subprocess.CompletedProcess[str]:
    """`cascadeserve triton` on the stack's cluster, until it ends by itself."""
    arguments = ["triton", f"--cluster={stack.cluster}", f"--repository={stack.repository}", f"--state={state}"]
    return subprocess.run(
        [sys.executable, "-m", "cascadeserve", *arguments], capture_output=True, text=True, timeout=100, check=False
    )


def test_it_serves_pinned_to_its_core_and_stops_on_sigterm(stack: Stack) -> None:
    stack.start_triton("a")
    process = stack.tritons["a"]
    server = server_pid(process)
    members = group_of(server)
    assert len(members) == 3  # the server and a stub for each model
    assert {os.sched_getaffinity(pid) == {0} for pid in members} == {True}
    assert process.stop() == 0
    wait_gone(members, 1)
    assert status_of(f"{stack.triton_url('a')}/v2/health/live") == 0


def test_nothing_is_left_when_the_parent_is_killed(stack: Stack) -> None:
    stack.start_triton("a")
    process = stack.tritons["a"]
    members = group_of(server_pid(process))
    os.kill(process.pid, signal.SIGKILL)
    assert process.process is not None
    process.process.wait()
    wait_gone(members, 15)


def test_a_taken_port_ends_it_with_a_sentence(stack: Stack) -> None:
    stack.start_triton("a")
    try:
        result = run_triton(stack, stack.folder / "other")
        assert result.returncode == 1
        assert "Traceback" not in result.stderr
        assert len(result.stderr.splitlines()) == 1
        assert result.stderr.startswith("Error: endpoint 'a': its http address 127.0.0.1:")
        assert result.stderr.endswith("; end what uses it, or give another port in the cluster file\n")
    finally:
        stack.stop()


def test_up_says_once_that_the_port_of_the_orchestrator_is_taken(stack: Stack) -> None:
    arguments = ["up", f"--plan={stack.plan}", f"--cluster={stack.cluster}", f"--repository={stack.repository}"]
    arguments += [f"--state={stack.state}", f"--http-port={stack.http_port}", f"--grpc-port={stack.grpc_port}"]
    with socket.create_server(("127.0.0.1", stack.http_port)):
        result = subprocess.run(
            [sys.executable, "-m", "cascadeserve", *arguments], capture_output=True, text=True, timeout=100, check=False
        )
    assert result.returncode == 1
    (sentence,) = [line for line in result.stderr.splitlines() if line.startswith("Error: ")]
    assert str(stack.http_port) in sentence


def test_a_model_that_cannot_load_ends_it_with_a_sentence(stack: Stack) -> None:
    (stack.repository / "small" / "1" / "model.onnx").write_bytes(b"no model")
    result = run_triton(stack, stack.state)
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("Error: tritonserver of endpoint 'a' ended with status")


def test_the_repository_is_not_touched_and_no_telemetry_is_sent(stack: Stack) -> None:
    before = {path: path.stat().st_mtime_ns for path in stack.repository.rglob("*")}
    stack.start_triton("a")
    server = server_pid(stack.tritons["a"])
    environment = Path(f"/proc/{server}/environ").read_bytes().split(b"\0")
    assert b"ORT_DISABLE_TELEMETRY=1" in environment
    stack.stop()
    assert {path: path.stat().st_mtime_ns for path in stack.repository.rglob("*")} == before


def test_another_server_on_its_port_is_not_taken_for_it(stack: Stack) -> None:
    stack.start_triton("a")
    try:
        result = run_triton(stack, stack.folder / "other")
        assert "ready:" not in result.stderr
        assert result.returncode == 1
    finally:
        stack.stop()


def test_a_state_path_that_a_shell_would_interpret_is_refused(stack: Stack) -> None:
    result = run_triton(stack, stack.folder / "a b")
    assert result.returncode == 2
    assert "--state" in result.stderr.splitlines()[-1]
