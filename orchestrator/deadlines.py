"""The deadlines of all requests, on one timer."""

from __future__ import annotations

import asyncio
import heapq
import itertools
import weakref
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

    from orchestrator.rows import Ticket

# How many entries of answered requests may lie about, beside as many as there are open ones.
_MAX_STALE = 1000


class Deadlines:
    """Reports each ticket that is still open at its deadline.

    An answered ticket costs nothing: its entry is thrown away when its time has come, or when such entries are many.
    """

    def __init__(self, on_deadline: Callable[[Ticket], None]) -> None:
        """`on_deadline` has to end the ticket it is given."""
        self._on_deadline = on_deadline
        self._loop = asyncio.get_running_loop()
        self._numbers = itertools.count()
        # (deadline_s, number, ticket), a heap. The references are weak, or tensors would live until their deadline;
        # an open ticket is held by the segments with its rows.
        self._entries: list[tuple[float, int, weakref.ref[Ticket]]] = []
        self._clear_at = _MAX_STALE
        self._timer: asyncio.TimerHandle | None = None
        self._timer_s = float("inf")

    def add(self, ticket: Ticket) -> None:
        """Watch a ticket until it is done."""
        if len(self._entries) >= self._clear_at:
            self.clear_stale()
        heapq.heappush(self._entries, (ticket.deadline_s, next(self._numbers), weakref.ref(ticket)))
        if ticket.deadline_s < self._timer_s:
            self._set_timer()

    def clear_stale(self) -> int:
        """Forget what is done; returns how many tickets are open."""
        self._entries = [entry for entry in self._entries if (ticket := entry[2]()) is not None and not ticket.done]
        heapq.heapify(self._entries)
        self._clear_at = 2 * len(self._entries) + _MAX_STALE
        return len(self._entries)

    def stop(self) -> None:
        """Report nothing until another ticket is added."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._timer_s = float("inf")

    def _set_timer(self) -> None:
        self.stop()
        if self._entries:
            self._timer_s = self._entries[0][0]
            self._timer = self._loop.call_at(self._timer_s, self._expire)

    def _expire(self) -> None:
        # A timer may fire a clock tick early: what it was set for is due, whatever the clock says.
        now_s = max(self._loop.time(), self._timer_s)
        while self._entries:
            deadline_s, _, reference = self._entries[0]
            ticket = reference()
            is_open = ticket is not None and not ticket.done
            if is_open and deadline_s > now_s:
                break
            heapq.heappop(self._entries)
            if ticket is not None and is_open:
                self._on_deadline(ticket)
        self._set_timer()
