from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cascadeserve.process import spawn, stop

if TYPE_CHECKING:
    from collections.abc import Callable

PARENT = """
import asyncio, sys
from cascadeserve.process import spawn

async def main():
    with open(sys.argv[1], "wb") as log:
        child = await spawn(["/bin/sleep", "60"], log=log)
        print(child.pid, flush=True)
        await child.wait()

asyncio.run(main())
"""

IGNORES_SIGTERM = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up', flush=True); time.sleep(60)"
)


def runs(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def program(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text().partition("\0")[0]


def comes_true(condition: Callable[[], bool], within_s: float) -> bool:
    give_up_s = time.monotonic() + within_s
    while not condition():
        if time.monotonic() > give_up_s:
            return False
        time.sleep(0.01)
    return True


async def printed(path: Path, within_s: float = 5.0) -> str:
    """First line that a child wrote to its log."""
    give_up_s = time.monotonic() + within_s
    while b"\n" not in (data := path.read_bytes()):  # noqa: ASYNC240 - a few bytes, nothing else runs
        assert time.monotonic() < give_up_s, "the child wrote nothing"
        await asyncio.sleep(0.01)
    return data.decode().partition("\n")[0]


@pytest.mark.parametrize("when", ["at once", "while it runs"])
def test_a_child_dies_with_its_parent_even_if_that_is_killed(when: str, tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", PARENT, tmp_path / "log"], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        if when == "while it runs":
            assert comes_true(lambda: program(child) == "/bin/sleep", 5.0)
        parent.send_signal(signal.SIGKILL)
        parent.wait()
    assert comes_true(lambda: not runs(child), 2.0)


async def test_a_child_that_obeys_is_not_killed(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log:
        process = await spawn(["/bin/sleep", "60"], log=log)
        started_s = time.monotonic()
        assert await stop(process, kill_after_s=10.0) == -signal.SIGTERM
        assert time.monotonic() - started_s < 5.0


async def test_a_child_that_ignores_the_request_is_killed_after_its_time(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log:
        process = await spawn([sys.executable, "-c", IGNORES_SIGTERM], log=log)
        assert await printed(tmp_path / "log") == "up"
        started_s = time.monotonic()
        assert await stop(process, kill_after_s=0.3) == -signal.SIGKILL
        assert 0.3 <= time.monotonic() - started_s < 2.0


async def test_stopping_a_child_takes_its_own_children_along(tmp_path: Path) -> None:
    """Triton's Python stubs outlive a server that is killed."""
    with (tmp_path / "log").open("wb") as log:
        process = await spawn(["/bin/sh", "-c", "sleep 60 & echo $!; wait"], log=log)
        grandchild = int(await printed(tmp_path / "log"))
        assert runs(grandchild)
        await stop(process, kill_after_s=5.0)
    assert comes_true(lambda: not runs(grandchild), 2.0)


async def test_stopping_a_child_that_has_ended_gives_its_status(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log:
        process = await spawn(["/bin/sh", "-c", "exit 7"], log=log)
        await process.wait()
        assert await stop(process, kill_after_s=1.0) == 7


async def test_a_child_is_pinned_to_its_cores_and_to_none_by_default(tmp_path: Path) -> None:
    mine = os.sched_getaffinity(0)
    show = [sys.executable, "-c", "import os; print(sorted(os.sched_getaffinity(0)))"]
    for cores in ((max(mine),), ()):
        path = tmp_path / f"log{len(cores)}"
        with path.open("wb") as log:
            process = await spawn(show, cores=cores, log=log)
            assert await process.wait() == 0
        assert path.read_text().strip() == str(sorted(cores or mine))


async def test_a_child_gets_the_environment_given_and_no_terminal_signals(tmp_path: Path) -> None:
    with (tmp_path / "log").open("wb") as log:
        environment = {"PATH": os.environ["PATH"], "GREETING": "hello"}
        process = await spawn(["/bin/sh", "-c", "echo $GREETING; sleep 60"], environment=environment, log=log)
        assert await printed(tmp_path / "log") == "hello"
        assert os.getpgid(process.pid) == process.pid != os.getpgid(0), "Ctrl-C must reach only us"
        await stop(process, kill_after_s=5.0)
