"""The machine of a local endpoint: what it is, and how much memory the server holds."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
from pathlib import Path

from planner.profile import Host

_LOOPBACK = {"127.0.0.1", "localhost", "[::1]"}
_LISTENING = "0A"
_PROC = Path("/proc")


def is_local(address: str) -> bool:
    """Whether host:port names this machine by a loopback address."""
    return address.rpartition(":")[0] in _LOOPBACK


def describe_host() -> Host:
    """Describe this machine; it is not named, since a profile is meant to be shared."""
    return Host(
        cpu_model=_cpu_model(),
        num_cores=os.cpu_count(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        os=f"{platform.system()} {platform.release()} {platform.machine()}",
        python_version=platform.python_version(),
        onnxruntime_version=_onnxruntime_version(),
    )


def _cpu_model() -> str | None:
    with contextlib.suppress(OSError):
        for line in (_PROC / "cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    return platform.processor() or None


def _onnxruntime_version() -> str | None:
    for distribution in ("onnxruntime-gpu", "onnxruntime"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(distribution)
    return None


def find_server(port: int) -> int | None:
    """Process that listens on a TCP port of this machine; None when /proc does not tell (another user's process)."""
    sockets = {f"socket:[{inode}]" for inode in _listening_inodes(port)}
    for process in _PROC.glob("[0-9]*"):
        # any of these may end, or belong to somebody else, while we look
        with contextlib.suppress(OSError):
            for descriptor in (process / "fd").iterdir():
                with contextlib.suppress(OSError):
                    if str(descriptor.readlink()) in sockets:
                        return int(process.name)
    return None


def _listening_inodes(port: int) -> set[str]:
    inodes: set[str] = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in (_PROC / "net" / table).read_text().splitlines()[1:]:
                fields = line.split()
                if fields[3] == _LISTENING and int(fields[1].rpartition(":")[2], 16) == port:
                    inodes.add(fields[9])
    return inodes


def resident_bytes(pid: int) -> int | None:
    """Resident memory of a process and all its descendants (Triton's stubs), None when it cannot be read.

    Pages that several of them share count once for each: an upper bound.
    """
    children: dict[int, list[int]] = {}
    for process in _PROC.glob("[0-9]*"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            # the name of the program stands in brackets and may hold anything
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(process.name))
    total_pages, left = 0, [pid]
    try:
        total_pages += _resident_pages(left[0])
    except OSError:
        return None
    while left:
        for child in children.get(left.pop(), []):
            with contextlib.suppress(OSError):
                total_pages += _resident_pages(child)
                left.append(child)
    return total_pages * os.sysconf("SC_PAGE_SIZE")


def _resident_pages(pid: int) -> int:
    return int((_PROC / str(pid) / "statm").read_text().split()[1])
