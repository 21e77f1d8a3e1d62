"""Answers that gRPC clients do not take.

gRPC would hold them, and the places of their calls, for as long as a connection lives, and offers no way to end such a
call. So the connection is shut, which ends all that its client has open.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
import socket
import stat
import urllib.parse
from pathlib import Path

# of the time that an answer has, how much goes by between two looks
_LOOK = 0.25
# Where places are wanted, an answer that was not taken for so long gives its own: any client on its feet is faster.
_ROOM_S = 1.0
# A large one takes its time over a slow line: a megabit per second.
_BYTES_PER_S = 1 << 17


class Unread:
    """The answers of a server that are on their way."""

    def __init__(self, timeout_s: float) -> None:
        """Connections that do not take an answer for so long, or a quarter more, and what its size adds, are shut."""
        self._timeout_s = timeout_s
        self._loop = asyncio.get_running_loop()
        # since when they could have been taken, and by whom; more or less the oldest first
        self._answers: dict[object, tuple[float, str]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        """How many have not been taken."""
        return len(self._answers)

    def begin(self, answer: object, num_bytes: int, peer: str) -> None:
        """Take note that an answer of so many bytes leaves to `peer`, as gRPC names it."""
        self._answers[answer] = (self._loop.time() + num_bytes / _BYTES_PER_S, peer)
        if self._timer is None:
            self._timer = self._loop.call_later(_LOOK * self._timeout_s, self._look)

    def end(self, answer: object) -> None:
        """Take note that it was taken, or that its call has ended otherwise."""
        self._answers.pop(answer, None)

    def make_room(self) -> bool:
        """Shut the connection of an old answer; False where none is old."""
        until_s = self._loop.time() - _ROOM_S
        old = next((peer for since_s, peer in self._answers.values() if since_s < until_s), None)
        if old is None:
            return False
        self._shut({old})
        return True

    def _look(self) -> None:
        self._timer = None
        until_s = self._loop.time() - self._timeout_s
        if late := {peer for since_s, peer in self._answers.values() if since_s < until_s}:
            self._shut(late)
        if self._answers:
            self._timer = self._loop.call_later(_LOOK * self._timeout_s, self._look)

    def _shut(self, peers: set[str]) -> None:
        self._answers = {each: entry for each, entry in self._answers.items() if entry[1] not in peers}
        # in a thread: it looks through all that the process has open
        self._loop.run_in_executor(None, _shut_connections, {_address(peer) for peer in peers})


def _shut_connections(addresses: set[tuple[object, int]]) -> None:
    """Shut those connections of this process that lead there."""
    for path in Path("/dev/fd").iterdir():
        # some are closed by now
        with contextlib.suppress(OSError):
            # another handle, so that nobody else can close it meanwhile
            same = os.dup(int(path.name))
            if not stat.S_ISSOCK(os.fstat(same).st_mode):
                os.close(same)
                continue
            with socket.socket(fileno=same) as connection:
                is_tcp = connection.family in (socket.AF_INET, socket.AF_INET6)
                if is_tcp and _ip(connection.getpeername()) in addresses:
                    connection.shutdown(socket.SHUT_RDWR)


def _address(peer: str) -> tuple[object, int]:
    """Read the name that gRPC gives to a peer: ipv4:1.2.3.4:5, ipv6:[::1]:5 with the brackets escaped."""
    host, _, port = urllib.parse.unquote(peer).partition(":")[2].rpartition(":")
    return _ip((host.strip("[]"), int(port)))


def _ip(address: tuple[str, int]) -> tuple[object, int]:
    ip = ipaddress.ip_address(address[0].partition("%")[0])
    return getattr(ip, "ipv4_mapped", None) or ip, address[1]
