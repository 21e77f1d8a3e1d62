"""An event loop that wakes up on time.

asyncio waits with epoll_wait, whose timeout is in whole milliseconds, rounded up: every send would be up to 1 ms late,
which alone is 5 % of an SLO of 20 ms. select() waits with microseconds, and an epoll descriptor can itself be waited
for.
"""

from __future__ import annotations

import asyncio
import select
import selectors
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import FileDescriptorLike

# select() takes no descriptor above this; the loop's own is opened first, so this only guards odd callers.
_FD_SETSIZE = 1024


class PreciseSelector(selectors.EpollSelector):
    """epoll whose timeouts are exact to some tens of microseconds."""

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Wait for events, at most `timeout` seconds (None: for ever)."""
        if timeout is not None and timeout > 0:
            own: FileDescriptorLike = self.fileno()
            select.select([own], [], [], timeout)
            timeout = 0
        return super().select(timeout)


def new_precise_loop() -> asyncio.AbstractEventLoop:
    """Make an event loop for a load generator."""
    selector = PreciseSelector()
    if selector.fileno() >= _FD_SETSIZE:
        selector.close()
        return asyncio.new_event_loop()
    return asyncio.SelectorEventLoop(selector)
