"""Connections whose clients owe something: the rest of a request, or to read an answer. They get so much time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterable

T = TypeVar("T")


class SlowClients(Generic[T]):
    """Looked at now and then, not timed one by one: a timer per request would cost more than most requests do."""

    def __init__(self, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        # connection -> how many requests it had made when it began to owe, and when that was first seen
        self._since: dict[T, tuple[int, float]] = {}

    def overdue(self, owing: Iterable[tuple[T, int]], now_s: float) -> list[T]:
        """Which of the connections that owe now, each with its number of requests, have done so for too long."""
        since: dict[T, tuple[int, float]] = {}
        late = []
        for connection, num_requests in owing:
            seen = self._since.get(connection)
            start_s = seen[1] if seen is not None and seen[0] == num_requests else now_s
            since[connection] = (num_requests, start_s)
            if now_s - start_s >= self._timeout_s:
                late.append(connection)
        self._since = since
        return late
