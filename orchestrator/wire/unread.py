"""What was written to a connection and has not reached its client."""

from __future__ import annotations

import contextlib
import fcntl
import struct
import termios
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    import asyncio


def socket_transport(transport: asyncio.Transport) -> asyncio.Transport:
    """The transport that has the socket: with TLS the one below, to which all that is written goes on at once.

    asyncio does not speak of it, and that of TLS says that nothing waits, whatever does.
    """
    below = getattr(getattr(transport, "_ssl_protocol", None), "_transport", None)
    return transport if below is None else cast("asyncio.Transport", below)


def unread_bytes(transport: asyncio.Transport) -> int:
    """What waits here and in the kernel, which takes megabytes at a time from a client that reads slowly."""
    wire = socket_transport(transport)
    waiting = wire.get_write_buffer_size()
    if wire is not transport:
        waiting += transport.get_write_buffer_size()
    # not on each system, and not of a connection that is closed
    with contextlib.suppress(OSError, ValueError):
        queued = fcntl.ioctl(wire.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
        waiting += struct.unpack("i", queued)[0]
    return waiting
