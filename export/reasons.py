"""One line of what a library said."""

from __future__ import annotations

_IN_TORCHSCRIPT = "The following operation failed in the TorchScript interpreter."


def reason_of(error: BaseException) -> str:
    """Return the first line of a message; of TorchScript's, which begin with a traceback, the last one."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1 if lines[0].startswith(_IN_TORCHSCRIPT) else 0].strip()
