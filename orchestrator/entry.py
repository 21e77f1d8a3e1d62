"""The door: a request is let in or refused before its body is read.

What waits is looked at fifty times a second, so that a request costs a comparison. How late the loop is for that look
tells how long requests have been waiting unread in their sockets: that counts as waited time, for nobody else sees it.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cascadeserve.errors import Overloaded
from cascadeserve.policy.admission import NOT_STANDING, admits

if TYPE_CHECKING:
    from collections.abc import Callable

# how often it is looked at
LOOK_S = 0.02
# weight of a request in the moving mean of rows per request
_MEMORY = 0.02


@dataclass(slots=True)
class _Queue:
    """What is ahead of a request of a family."""

    slo_s: float
    # what its own batches will take
    own_s: float
    # how much may wait in a surge
    surge_slos: float
    # what waits takes that long, and each row that is let in adds to it
    wait_s: float
    row_s: float
    # rows of a request, a moving mean: how many one has is in its body
    rows: float = 1.0
    standing_since_s: float = NOT_STANDING


class Entry:
    """Lets requests of any family in; one per process that takes requests."""

    def __init__(self, *, on_refusal: Callable[[str, int], None], on_lag: Callable[[float], None]) -> None:
        """`on_refusal` is told the family of each refused request and how many rows it may have had.

        `on_lag` is told how late the loop is, in seconds, at every look.
        """
        self._on_refusal = on_refusal
        self._on_lag = on_lag
        self._loop = asyncio.get_running_loop()
        self._queues: dict[str, _Queue] = {}
        self._lag_s = 0.0
        self._due_s = float("inf")

    async def run(self, look: Callable[[], None]) -> None:
        """Look forever; `look` calls `show` for every family."""
        while True:
            look()
            self._due_s = self._loop.time() + LOOK_S
            await asyncio.sleep(LOOK_S)
            self._lag_s = max(self._loop.time() - self._due_s, 0.0)
            self._on_lag(self._lag_s)

    def lag_s(self) -> float:
        """How long a request that is read now may have waited to be read."""
        return max(self._lag_s, self._loop.time() - self._due_s)

    def show(self, family: str, *, slo_s: float, own_s: float, surge_slos: float, wait_s: float, row_s: float) -> None:
        """What is ahead of a family's requests now, in seconds: what waits, what each row more will add to that.

        `own_s` is what the batches of a request take when its turn has come; see `policy.admission.admits`.
        """
        queue = self._queues.get(family)
        if queue is None:
            self._queues[family] = _Queue(slo_s, own_s, surge_slos, wait_s, row_s)
        else:
            queue.slo_s, queue.own_s, queue.surge_slos = slo_s, own_s, surge_slos
            queue.wait_s, queue.row_s = wait_s, row_s

    def forget(self, family: str) -> None:
        """Let every request of a family in, until something is shown again."""
        self._queues.pop(family, None)

    def admit(self, family: str) -> None:
        """Let a request in or raise Overloaded; a family of which nothing is known is let in."""
        queue = self._queues.get(family)
        if queue is None:
            return
        wait_s = self.lag_s() + queue.wait_s
        let_in, limit_s, queue.standing_since_s = admits(
            wait_s, queue.own_s, queue.slo_s, queue.surge_slos, self._loop.time(), queue.standing_since_s
        )
        if let_in:
            queue.wait_s += queue.rows * queue.row_s
            return
        self._on_refusal(family, max(round(queue.rows), 1))
        raise Overloaded(
            f"so much work waits for '{family}' that the answer would come too late; try again later",
            retry_after_s=max(wait_s - limit_s, queue.slo_s),
        )

    def took(self, family: str, rows: int) -> None:
        """Learn how many rows a request had that was let in."""
        queue = self._queues.get(family)
        if queue is not None:
            queue.rows += _MEMORY * (rows - queue.rows)
