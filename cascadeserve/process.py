"""Child processes that never outlive us: tied to this process by the kernel, stopped in order, reaped."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


async def spawn(
    command: Sequence[str],
    *,
    cores: Sequence[int] = (),
    environment: dict[str, str] | None = None,
    log: IO[bytes] | None = None,
    stdin: int = asyncio.subprocess.DEVNULL,
) -> asyncio.subprocess.Process:
    """Start a program (absolute path first) that gets SIGTERM when this process dies, pinned to `cores` if any.

    It has a process group of its own, so that Ctrl-C reaches only us and we stop it in order. Its output goes to `log`,
    or to our stderr; `stdin` is a file descriptor. Call it from the main thread: the kernel ties the child to the
    thread that made it.
    """
    return await asyncio.create_subprocess_exec(
        sys.executable,
        "-I",  # its folder must not come before the standard library
        str(Path(__file__).with_name("child.py")),
        str(os.getpid()),
        ",".join(map(str, cores)),
        *command,
        env=environment,
        stdin=stdin,
        stdout=log if log is not None else sys.stderr,
        stderr=asyncio.subprocess.STDOUT if log is not None else None,
        start_new_session=True,
    )


async def stop(process: asyncio.subprocess.Process, *, kill_after_s: float) -> int:
    """Ask the process to end, kill what is left of its group after `kill_after_s`, reap it; returns its status."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGTERM)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), kill_after_s)
    # Children of it (Triton's Python stubs) outlive it when it is killed.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    return await process.wait()
