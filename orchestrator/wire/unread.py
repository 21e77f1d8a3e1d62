"""What was written to a connection and has not reached its client."""

from __future__ import annotations

import contextlib
import fcntl
import struct
import termios
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    import asyncio


def transport_below(transport: asyncio.Transport) -> asyncio.Transport | None:
    """With TLS the transport of the socket, to which all that is written goes on at once.

    asyncio does not speak of it, and that of TLS says that nothing waits, whatever does.
    """
    below = getattr(getattr(transport, "_ssl_protocol", None), "_transport", None)
    return cast("asyncio.Transport | None", below)


def unread_bytes(transport: asyncio.Transport) -> int:
    """What waits here and in the kernel, which takes megabytes at a time from a client that reads slowly."""
    below = transport_below(transport)
    waiting = transport.get_write_buffer_size() + (0 if below is None else below.get_write_buffer_size())
    sock = transport.get_extra_info("socket")
    # not on each system, and not of a connection that is closed
    with contextlib.suppress(OSError, ValueError):
        if sock is not None:
            waiting += struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)))[0]
    return waiting
