"""Becomes the server process: `python child.py PARENT_PID CORES PROGRAM ARGUMENT...`.

Between fork and exec it asks the kernel to be told when the parent dies, however it dies, pins itself to its cores and
ignores SIGHUP; all of it outlives exec, and the pinning is inherited. Run as a file, so that nothing else is imported.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1  # prctl(2)


def main(arguments: list[str]) -> None:
    """Replace this process by the program."""
    parent_pid, cores, *command = arguments
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != int(parent_pid):  # the parent died before the kernel was asked
        sys.exit(1)
    # it asks an orchestrator for a new plan, and must not end one that has no handler yet
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    if cores:
        os.sched_setaffinity(0, {int(core) for core in cores.split(",")})
    os.execv(command[0], command)  # noqa: S606


if __name__ == "__main__":
    main(sys.argv[1:])
