"""Connections whose clients owe something: the rest of a request, or to read an answer. They get so much time.

They get it for each step of what they owe: who is slow but steady gets through, and who sends a byte now and then not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable

T = TypeVar("T")

STEP_BYTES = 1 << 16


def steps(num_bytes: int) -> int:
    """How many have moved, of a number of bytes that grows or shrinks with them."""
    return num_bytes // STEP_BYTES


class SlowClients(Generic[T]):
    """Looked at now and then, not timed one by one: a timer per request would cost more than most requests do."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        # connection -> what it owed, and when that was first seen
        self._since: dict[T, tuple[object, float]] = {}

    def overdue(self, owing: Iterable[tuple[T, object]], now_s: float) -> list[T]:
        """Which of the connections that owe now have done so for too long, each with what changes if it pays."""
        since: dict[T, tuple[object, float]] = {}
        late = []
        for connection, owed in owing:
            seen = self._since.get(connection)
            start_s = seen[1] if seen is not None and seen[0] == owed else now_s
            since[connection] = (owed, start_s)
            if now_s - start_s >= self._timeout_s:
                late.append(connection)
        self._since = since
        return late
