"""What the kernel says about a process of this machine."""

from __future__ import annotations

import os
import re
from pathlib import Path

from cascadeserve.errors import CascadeServeError

_PROCESSES = Path("/proc")
_KIB = 1024


def find_process(*arguments: str) -> int:
    """Id of the one process whose command line holds all of these arguments.

    Raises:
        CascadeServeError: there is none, or more than one.

    """
    wanted = {each.encode() for each in arguments}
    found = [int(path.name) for path in _PROCESSES.glob("[0-9]*") if wanted <= _command_line(path)]
    if len(found) != 1:
        raise CascadeServeError(f"{len(found)} processes have the arguments {' '.join(arguments)}; there must be one")
    return found[0]


def find_orchestrator(url: str) -> int:
    """Id of the orchestrator that listens at `http://host:port`."""
    return find_process("serve", f"--http-port={url.rpartition(':')[2]}")


def peak_memory_bytes(pid: int) -> int:
    """Most memory that a process has had in use at a time since it was started."""
    text = (_PROCESSES / str(pid) / "status").read_text()
    match = re.search(r"^VmHWM:\s+(\d+) kB$", text, re.MULTILINE)
    if match is None:
        raise CascadeServeError(f"process {pid} has ended")
    return int(match[1]) * _KIB


def cpu_s(pid: int) -> float:
    """Processor time that a process, all of its threads, has taken so far."""
    # the name of the program comes before, in brackets, and may hold anything
    fields = (_PROCESSES / str(pid) / "stat").read_text().rpartition(")")[2].split()
    user, system = fields[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def _command_line(process: Path) -> set[bytes]:
    try:
        return set((process / "cmdline").read_bytes().split(b"\0"))
    except OSError:  # it has just ended
        return set()
