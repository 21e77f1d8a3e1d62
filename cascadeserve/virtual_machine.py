"""What a virtual machine does to measurements: cores kept awake, and time that the host took.

A virtual core that idles is given away by its host, and comes back late when others want it too: on a busy host a timer
of 5 ms was seen to fire 5 ms late once in a hundred times, and 0.1 ms late while an idle loop of lowest priority held
the core. What is measured then is the server and not its neighbours.

Where it may be asked for, the kernel itself idles awake while a device file is held open (PM QoS, as `idle=poll` does
for good). Else a process of lowest priority spins on every core; but what wants the core may wait for it now and then,
for a slice of 4 ms (Linux 6.18). On real hardware nothing is started: there an idle core wakes within microseconds, and
a busy one would take its sibling's time and its turbo.
"""

from __future__ import annotations

import contextlib
import os
import struct
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cascadeserve.process import spawn, stop

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

_LOWEST = "19"
_IDLE_DRIVER = Path("/sys/devices/system/cpu/cpuidle/current_driver")
_WAKING_LATENCY = Path("/dev/cpu_dma_latency")
_STEAL = 8  # in the line of all cores


def is_virtual() -> bool:
    """Whether a hypervisor says that it is there (the CPU flag of that name; x86 only, elsewhere False)."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return any(line.startswith("flags") and "hypervisor" in line.split() for line in lines)
    return False


def stolen_s() -> float | None:
    """Seconds since boot in which the host had other work for a core that wanted to run (proc(5), `steal`).

    Of all cores together; None where the system does not say.
    """
    with contextlib.suppress(OSError, ValueError, IndexError):
        first, _, _ = Path("/proc/stat").read_text().partition("\n")
        return int(first.split()[_STEAL]) / os.sysconf("SC_CLK_TCK")
    return None


@contextlib.asynccontextmanager
async def cores_kept_awake() -> AsyncIterator[bool]:
    """Hold every core that this process may use, if they are virtual ones; yields whether they are held."""
    cores = sorted(os.sched_getaffinity(0)) if is_virtual() else []
    async with contextlib.AsyncExitStack() as spinning:
        idles_awake = bool(cores) and spinning.enter_context(_kernel_idles_awake())
        for core in [] if idles_awake else cores:
            process = await spawn([sys.executable, "-m", "cascadeserve.virtual_machine"], cores=[core])
            spinning.push_async_callback(stop, process, kill_after_s=1.0)
        yield bool(cores)


@contextlib.contextmanager
def _kernel_idles_awake() -> Iterator[bool]:
    """Ask the kernel for it (its Documentation/power/pm_qos_interface.rst); yields whether it does so."""
    with contextlib.ExitStack() as held:
        heeded = False
        with contextlib.suppress(OSError):
            if _IDLE_DRIVER.read_text().strip() not in ("", "none"):
                # microseconds that waking up may take
                held.enter_context(_WAKING_LATENCY.open("wb", buffering=0)).write(struct.pack("i", 0))
                heeded = True
        yield heeded


def _spin() -> None:
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    # Linux may share a core between sessions first and by priority only within one; this is a session of its own
    with contextlib.suppress(OSError):
        Path("/proc/self/autogroup").write_text(_LOWEST)
    while True:
        pass


if __name__ == "__main__":
    _spin()
