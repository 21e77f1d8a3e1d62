"""A limit on the time that a plan may take: what is not refined by then is left out, and said."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

T = TypeVar("T")


class TimeLimit:
    """Reached some seconds after it was made; `left_out` says what was not done because of it."""

    def __init__(self, seconds: float | None, clock: Callable[[], float] = time.monotonic) -> None:
        """None: there is no limit."""
        self._clock = clock
        self._until_s = None if seconds is None else clock() + seconds
        self.left_out: list[str] = []

    @property
    def reached(self) -> bool:
        """Whether the time is up."""
        return self._until_s is not None and self._clock() >= self._until_s

    @property
    def left_s(self) -> float:
        """Seconds that are left."""
        return math.inf if self._until_s is None else max(self._until_s - self._clock(), 0.0)

    def part(self, seconds: float) -> TimeLimit:
        """Limit of something within this one that may take so long itself."""
        return TimeLimit(min(seconds, self.left_s), self._clock)

    def leave_out(self, what: str) -> None:
        """Note something that is not done any more; once, however often it is said."""
        if what not in self.left_out:
            self.left_out.append(what)


def spread(items: Sequence[T]) -> list[T]:
    """Order items so that wherever one stops those so far lie spread: the last, the first, then middles of gaps."""
    last = len(items) - 1
    order = [last, 0] if last > 0 else list(range(len(items)))
    gaps = [(0, last)]
    for low, high in gaps:
        middle = (low + high) // 2
        if low < middle < high:
            order.append(middle)
            gaps += [(low, middle), (middle, high)]
    return [items[index] for index in order]
