"""TLS handshakes under way: they count as connections, and the oldest can be cut off.

asyncio would say nothing of a connection before its handshake is done, so connections are accepted bare, and taken up
again with TLS.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from asyncio import sslproto
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

# seconds for a greeting, and for a farewell
_HANDSHAKE_S = 15.0
_SHUTDOWN_S = 5.0
# asyncio has a buffer of 256 KiB for each connection, for what it receives: gigabytes where ten thousand are idle, and
# with smaller ones large bodies take longer. So each has one of the size of a record for its greeting only, and what
# follows goes through one for all: asyncio takes out what it has received before it turns to another connection.
_GREETING_BYTES = 1 << 14
_RECEIVED_BYTES = 1 << 18


class Greetings:
    """Those under way."""

    def __init__(self, tls: ssl.SSLContext, new_connection: Callable[[], asyncio.Protocol]) -> None:
        """`new_connection` makes the protocol within TLS."""
        self._tls = tls
        self._new_connection = new_connection
        # for all of the process: asyncio offers no other way
        sslproto.SSLProtocol.max_size = _GREETING_BYTES
        self._received = bytearray(_RECEIVED_BYTES)
        # oldest first
        self._under_way: dict[asyncio.Task[tuple[asyncio.Transport, Any]], socket.socket] = {}

    def __len__(self) -> int:
        """How many."""
        return len(self._under_way)

    def begin(self) -> asyncio.Protocol:
        """Make the protocol of a connection that was accepted."""
        return _Bare(self._greet)

    def cut_oldest(self) -> bool:
        """Cut off the one that began first, if there is one."""
        task = next(iter(self._under_way), None)
        if task is None:
            return False
        # whatever asyncio is at, it then sees an end; the task ends with it
        with contextlib.suppress(OSError):
            self._under_way.pop(task).shutdown(socket.SHUT_RDWR)
        return True

    def end(self) -> None:
        """Cut them all off."""
        while self.cut_oldest():
            pass

    def _greet(self, sock: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        task = loop.create_task(
            loop.connect_accepted_socket(
                self._new_connection,
                sock,
                ssl=self._tls,
                ssl_handshake_timeout=_HANDSHAKE_S,
                ssl_shutdown_timeout=_SHUTDOWN_S,
            ),
            name="greeting",
        )
        self._under_way[task] = sock
        task.add_done_callback(self._done)

    def _done(self, task: asyncio.Task[tuple[asyncio.Transport, Any]]) -> None:
        self._under_way.pop(task, None)
        # a client that does not speak TLS is nobody's fault here
        if not task.cancelled() and task.exception() is None:
            tls = getattr(task.result()[0], "_ssl_protocol", None)
            if tls is not None:
                # no other way here, either
                tls._ssl_buffer = self._received  # noqa: SLF001
                tls._ssl_buffer_view = memoryview(self._received)  # noqa: SLF001


class _Bare(asyncio.Protocol):
    """A connection that was accepted: it leaves its socket to another one."""

    def __init__(self, take: Callable[[socket.socket], None]) -> None:
        self._take = take

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # without a file to spare the client is cut off
        with contextlib.suppress(OSError):
            self._take(transport.get_extra_info("socket").dup())
        cast("asyncio.Transport", transport).abort()
