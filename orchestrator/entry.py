"""The door: a request is let in or refused before its body is read.

What waits is looked at fifty times a second, so that a request costs a comparison. How late the loop is for that look
tells how long requests have been waiting unread in their sockets: that counts as waited time, for nobody else sees it.

An important request would overtake most of what waits, but that it is one stands in its parameters. So one whose first
bytes speak of a priority is not refused here: whoever reads it refuses it if it is not important, and if it is, the
dispatcher knows what goes before it.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from cascadeserve.errors import Overloaded
from cascadeserve.policy.admission import DEADLINE_SLOS, LAST_WEIGHT, LOOK_S, NOT_STANDING, admits

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


class Ahead(NamedTuple):
    """What is ahead of a request of a family, in seconds."""

    slo_s: float
    # what its own batches take when its turn has come
    own_s: float
    # how much may wait in a surge
    surge_slos: float
    # what waits takes that long, and each row that is let in adds to it
    wait_s: float
    row_s: float


@dataclass(slots=True)
class _Queue:
    """What is ahead of the requests of a family, kept up to date between looks."""

    ahead: Ahead
    # as at the last look, and what was let in since
    wait_s: float
    # rows of a request, a moving mean: how many one has is in its body
    rows: float = 1.0
    standing_since_s: float = NOT_STANDING
    # the longest wait with which a request was let in, as of the last one
    limit_s: float = 0.0


def may_be_important(beginning: bytes) -> bool:
    """Whether the first bytes of a request, as JSON or as protobuf, may give it a priority."""
    return b"priority" in beginning


class Entry:
    """Lets requests of any family in; one per process that takes requests."""

    def __init__(self, *, on_refusal: Callable[[str, float], None], on_lag: Callable[[float], None]) -> None:
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
        """Look forever; `look` calls `show`, unless another does."""
        while True:
            look()
            self._due_s = self._loop.time() + LOOK_S
            await asyncio.sleep(LOOK_S)
            self._lag_s = max(self._loop.time() - self._due_s, 0.0)
            self._on_lag(self._lag_s)

    def lag_s(self) -> float:
        """How long a request that is read now may have waited to be read."""
        return max(self._lag_s, self._loop.time() - self._due_s)

    def show(self, queues: Mapping[str, Ahead]) -> None:
        """What is ahead now, by family; requests of others are let in."""
        for gone in self._queues.keys() - queues.keys():
            del self._queues[gone]
        for family, ahead in queues.items():
            queue = self._queues.get(family)
            if queue is None:
                self._queues[family] = _Queue(ahead, ahead.wait_s)
            else:
                queue.ahead, queue.wait_s = ahead, ahead.wait_s

    def admit(self, family: str, beginning: bytes = b"") -> bool:
        """Let a request in or raise Overloaded; a family of which nothing is known is let in.

        `beginning` is what there is of its body. False: to be let in only if it turns out to be important.
        """
        queue = self._queues.get(family)
        if queue is None:
            return True
        ahead = queue.ahead
        let_in, queue.limit_s, queue.standing_since_s = admits(
            self.lag_s() + queue.wait_s,
            ahead.own_s,
            ahead.slo_s,
            ahead.surge_slos,
            self._loop.time(),
            queue.standing_since_s,
        )
        if let_in:
            queue.wait_s += queue.rows * ahead.row_s
            return True
        if may_be_important(beginning):
            return False
        self._on_refusal(family, queue.rows)
        raise self.refusal(family)

    def default_deadline_s(self, family: str) -> float:
        """How long an answer is waited for where its request does not say; infinite where nothing is known."""
        queue = self._queues.get(family)
        return math.inf if queue is None else DEADLINE_SLOS * queue.ahead.slo_s

    def unread(self, family: str) -> None:
        """Count a request that was let in, and refused before anyone knew how many rows it has."""
        queue = self._queues.get(family)
        self._on_refusal(family, 1.0 if queue is None else queue.rows)

    def refusal(self, family: str) -> Overloaded:
        """What to raise for a request that is not let in."""
        retry_after_s = 0.0
        if (queue := self._queues.get(family)) is not None:
            retry_after_s = max(self.lag_s() + queue.wait_s - queue.limit_s, queue.ahead.slo_s)
        return Overloaded(
            f"so much work waits for '{family}' that the answer would come too late; try again later",
            retry_after_s=retry_after_s,
        )

    def took(self, family: str, rows: float) -> None:
        """Learn how many rows a request had that was let in; those of more work than the plan's count as more."""
        queue = self._queues.get(family)
        if queue is not None:
            queue.rows += LAST_WEIGHT * (rows - queue.rows)
