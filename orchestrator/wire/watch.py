"""A look at all HTTP connections now and then: who owes something for too long, and who holds too much, is cut off."""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Protocol

from orchestrator.wire.slow_clients import SlowClients

if TYPE_CHECKING:
    from collections.abc import Iterable

    from orchestrator.wire.limits import Limits


class _Connection(Protocol):
    @property
    def num_requests(self) -> int: ...

    @property
    def owes(self) -> bool: ...

    @property
    def progress(self) -> object: ...

    @property
    def unread_bytes(self) -> int: ...

    def abort(self) -> None: ...


class _PlainConnection(_Connection, Protocol):
    @property
    def received_bytes(self) -> int: ...


class Watch:
    """What it has seen so far."""

    def __init__(self, limits: Limits) -> None:
        """Nothing yet."""
        self._limit_bytes = limits.max_received_bytes
        # those that owe the same step for too long, and those that owe the same request or answer for as long
        self._stuck: SlowClients[_Connection] = SlowClients(limits.client_timeout_s)
        self._slow: SlowClients[_Connection] = SlowClients(limits.client_timeout_s)

    def look(self, plain: Iterable[_PlainConnection], others: Iterable[_Connection], now_s: float) -> None:
        """Cut off who must be; what the others have sent of requests is counted elsewhere."""
        owing = [each for each in chain(plain, others) if each.owes]
        for connection in self._stuck.overdue([(each, each.progress) for each in owing], now_s):
            connection.abort()
        # An answer may be read slowly. It must not be a cheap way to hold all the memory that there is.
        slow = self._slow.overdue([(each, each.num_requests) for each in owing], now_s)
        self._keep_limit([(each.unread_bytes, each) for each in slow])
        self._keep_limit([(num_bytes, each) for each in plain if (num_bytes := each.received_bytes)])

    def _keep_limit(self, held: list[tuple[int, _Connection]]) -> None:
        """Cut off the largest while all together are too large."""
        held_bytes = sum(num_bytes for num_bytes, _ in held)
        if held_bytes <= self._limit_bytes:
            return
        for num_bytes, connection in sorted(held, key=lambda each: -each[0]):
            if held_bytes <= self._limit_bytes:
                break
            held_bytes -= num_bytes
            connection.abort()
