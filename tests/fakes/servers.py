"""Real processes for tests: `cascadeserve triton`, `serve` and whole clusters of them, on free ports."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cascadeserve.local_stack import free_ports

if TYPE_CHECKING:
    from collections.abc import Iterator

START_TIMEOUT_S = 60.0


@dataclass
class Process:
    """A `cascadeserve` subprocess with its log."""

    arguments: list[str]
    log: Path
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cascadeserve", *self.arguments], stdout=log, stderr=log
            )

    @property
    def pid(self) -> int:
        """Process id."""
        assert self.process is not None
        return self.process.pid

    def stop(self, *, timeout_s: float = 40.0) -> int:
        """SIGTERM, wait, return the exit status."""
        assert self.process is not None
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise

    def text(self) -> str:
        """Its log so far."""
        return self.log.read_text(errors="replace")


def wait_until_ready(url: str, process: Process | None = None, *, timeout_s: float = START_TIMEOUT_S) -> None:
    """Wait for `GET url` to answer 200."""
    give_up_s = time.monotonic() + timeout_s
    while time.monotonic() < give_up_s:
        if process is not None and process.process is not None and process.process.poll() is not None:
            raise AssertionError(f"ended with {process.process.returncode}:\n{process.text()}")
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2) as response:
            if response.status == 200:
                return
        time.sleep(0.05)
    raise AssertionError(f"{url} was not ready in {timeout_s} s:\n{process.text() if process else ''}")


def status_of(url: str) -> int:
    """HTTP status of a GET, 0 if nobody listens."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:
            return int(response.status)
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    except OSError:
        return 0


@dataclass
class Stack:
    """Tritons of a cluster and an orchestrator in front, each a process of its own."""

    folder: Path
    repository: Path
    plan: Path
    endpoints: tuple[str, ...]
    ports: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    tritons: dict[str, Process] = field(default_factory=dict)
    orchestrator: Process | None = None

    def __post_init__(self) -> None:
        numbers = free_ports(3 * len(self.endpoints) + 2)
        self.http_port, self.grpc_port = numbers[-2:]
        for index, name in enumerate(self.endpoints):
            self.ports[name] = (numbers[3 * index], numbers[3 * index + 1], numbers[3 * index + 2])
        lines = ["schema_version = 1"]
        for name, (http, grpc, metrics) in self.ports.items():
            lines += [
                "[[endpoints]]",
                f'name = "{name}"',
                f'http = "127.0.0.1:{http}"',
                f'grpc = "127.0.0.1:{grpc}"',
                f'metrics = "127.0.0.1:{metrics}"',
                f'device = {{ kind = "cpu", cores = [{min(os.sched_getaffinity(0))}] }}',
            ]
        self.cluster = self.folder / "cluster.toml"
        self.cluster.write_text("\n".join(lines) + "\n")
        self.state = self.folder / "state"

    @property
    def url(self) -> str:
        """The orchestrator's HTTP address."""
        return f"http://127.0.0.1:{self.http_port}"

    @property
    def grpc_address(self) -> str:
        """The orchestrator's gRPC address."""
        return f"127.0.0.1:{self.grpc_port}"

    def triton_url(self, name: str) -> str:
        """HTTP address of an endpoint."""
        return f"http://127.0.0.1:{self.ports[name][0]}"

    def start_triton(self, name: str) -> None:
        """Start the server of an endpoint and wait for it."""
        arguments = ["triton", f"--cluster={self.cluster}", f"--endpoint={name}", f"--repository={self.repository}"]
        process = Process([*arguments, f"--state={self.state}"], self.folder / f"{name}.log")
        process.start()
        self.tritons[name] = process
        wait_until_ready(f"{self.triton_url(name)}/v2/health/ready", process)

    def start_orchestrator(self, *options: str) -> None:
        """Start `serve` and wait until it is ready."""
        arguments = ["serve", f"--plan={self.plan}", f"--cluster={self.cluster}"]
        arguments += [f"--repository={self.state / 'model_repository'}"]
        arguments += [f"--http-port={self.http_port}", f"--grpc-port={self.grpc_port}", *options]
        self.orchestrator = Process(arguments, self.folder / "orchestrator.log")
        self.orchestrator.start()
        wait_until_ready(f"{self.url}/v2/health/ready", self.orchestrator)

    def start(self, *options: str) -> None:
        """Start everything."""
        for name in self.endpoints:
            self.start_triton(name)
        self.start_orchestrator(*options)

    def stop(self) -> None:
        """Stop everything, the orchestrator first."""
        processes = [self.orchestrator, *self.tritons.values()]
        for process in processes:
            if process is not None:
                process.stop()


@contextlib.contextmanager
def running(stack: Stack, *options: str) -> Iterator[Stack]:
    """A stack that is stopped in the end."""
    try:
        stack.start(*options)
        yield stack
    finally:
        stack.stop()


def server_pid(process: Process) -> int:
    """Pid of the tritonserver that a `cascadeserve triton` process runs."""
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            command = (entry / "cmdline").read_bytes().split(b"\0")
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == process.pid and command[0].endswith(b"tritonserver"):
                return int(entry.name)
    raise AssertionError("no tritonserver among the children")


def is_alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, ValueError):
        return False
    return state != "Z"
