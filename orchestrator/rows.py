"""Rows on their way through the cascade: a client request becomes a ticket, its rows travel as segments.

No object is made per row: a segment names rows of one ticket that stand at the same stage, and is split or joined as
the rows part ways.
"""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from cascadeserve.errors import Unavailable

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterator, Sequence

    from numpy.typing import NDArray

    from cascadeserve.errors import RequestError
    from cascadeserve.gear_plan import Gear, LadderEntry
    from orchestrator.backend import BatchAnswer


class Ticket:
    """One client request of n rows: its inputs, the answers that came so far, and its future."""

    __slots__ = (
        "__weakref__", "arrived_s", "certainty", "certified", "deadline_s", "future", "gears", "inputs", "label",
        "remaining", "rows", "scores", "stage", "work_per_row",
    )  # fmt: skip

    def __init__(
        self,
        inputs: list[NDArray[Any]],
        *,
        arrived_s: float,
        deadline_s: float,
        num_classes: int | None,
        future: asyncio.Future[Ticket],
        work_per_row: float = 1.0,
    ) -> None:
        """`inputs[i]` has shape [n, ...]; `num_classes` None means that no scores were asked for.

        `work_per_row` is how many rows of the plan's busy times one of these is.
        """
        rows = inputs[0].shape[0]
        self.inputs = inputs
        self.rows = rows
        self.remaining = rows
        self.arrived_s = arrived_s
        self.deadline_s = deadline_s
        self.future = future
        self.work_per_row = work_per_row
        # names of the gears its rows left in; several only if it was split and a shift fell between the parts
        self.gears: list[str] = []
        # whether all its rows left under cascades that the plan's certificate covers
        self.certified = True
        self.label: NDArray[np.int64] = np.empty(rows, dtype=np.int64)
        self.certainty: NDArray[np.float32] = np.empty(rows, dtype=np.float32)
        self.stage: NDArray[np.int32] = np.empty(rows, dtype=np.int32)
        self.scores: NDArray[np.float32] | None = (
            None if num_classes is None else np.empty((rows, num_classes), dtype=np.float32)
        )

    @property
    def done(self) -> bool:
        """Whether it was answered, refused or abandoned by its client."""
        return self.future.done()

    def fail(self, error: RequestError) -> bool:
        """Answer with an error, unless it was answered already; returns whether it did."""
        if self.future.done():
            return False
        self.future.set_exception(error)
        return True

    def store(
        self, indices: NDArray[np.intp] | None, answer: BatchAnswer, source: slice | NDArray[np.intp], stage: int
    ) -> None:
        """Take over a batch's answers: its rows at `source` are rows `indices` of this request (None: all of them)."""
        where = slice(None) if indices is None else indices
        self.label[where] = answer.label[source]
        self.certainty[where] = answer.certainty[source]
        self.stage[where] = stage
        if self.scores is not None and answer.scores is not None:
            self.scores[where] = answer.scores[source]

    def finish_rows(self, count: int) -> bool:
        """Count answered rows; returns whether the request is complete now."""
        self.remaining -= count
        if self.remaining > 0 or self.future.done():
            return False
        self.future.set_result(self)
        return True


@dataclass(slots=True)
class Segment:
    """Rows of one ticket at one stage. `indices` None means all its rows.

    `entry` is None until the first dispatch binds the rows to the ladder entry of the gear then in force.
    """

    ticket: Ticket
    rows: int
    since_s: float
    indices: NDArray[np.intp] | None = None
    entry: LadderEntry | None = None
    stage: int = 0

    def split(self, rows: int) -> Segment:
        """Take the first `rows` rows out into a segment of their own."""
        indices = np.arange(self.rows) if self.indices is None else self.indices
        first = Segment(self.ticket, rows, self.since_s, indices[:rows], self.entry, self.stage)
        self.indices = indices[rows:]
        self.rows -= rows
        return first

    def onward(self, rows: NDArray[np.intp], now_s: float) -> Segment:
        """Those of its rows, by their places in it, that go on to the next stage."""
        indices = self.indices
        if len(rows) < self.rows:
            indices = rows if indices is None else indices[rows]
        return Segment(self.ticket, len(rows), now_s, indices, self.entry, self.stage + 1)

    def gather(self, position: int) -> NDArray[Any]:
        """Its rows of the ticket's input at `position`: shape [rows, ...]."""
        array = self.ticket.inputs[position]
        return array if self.indices is None else array[self.indices]


@dataclass(slots=True)
class ModelQueue:
    """Rows waiting for one model, the least rank first, of equals the one that came first."""

    # (rank, number, segment), a heap
    _waiting: list[tuple[float, int, Segment]] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=itertools.count)
    # no waiting row has a higher rank
    _highest_rank_s: float = float("-inf")
    rows: int = 0
    # the same in rows of the plan's busy times
    work: float = 0.0

    @property
    def head(self) -> Segment | None:
        """What leaves next."""
        return self._waiting[0][2] if self._waiting else None

    @property
    def head_rank_s(self) -> float:
        """Its rank; only of a queue that is not empty."""
        return self._waiting[0][0]

    @property
    def segments(self) -> list[Segment]:
        """All that waits, in order."""
        return [segment for _, _, segment in sorted(self._waiting)]

    def push(self, segment: Segment, rank_s: float) -> None:
        """Add a segment."""
        heapq.heappush(self._waiting, (rank_s, next(self._numbers), segment))
        self._highest_rank_s = max(self._highest_rank_s, rank_s)
        self.rows += segment.rows
        self.work += segment.rows * segment.ticket.work_per_row

    def oldest_since_s(self) -> float:
        """Since when the row that has waited here for longest does so; only of a queue whose head is not done."""
        return min(segment.since_s for _, _, segment in self._waiting if not segment.ticket.done)

    def work_before(self, rank_s: float) -> float:
        """Work that goes before a row of this rank that comes now."""
        if rank_s >= self._highest_rank_s:
            return self.work
        return sum(segment.rows * segment.ticket.work_per_row for rank, _, segment in self._waiting if rank <= rank_s)

    def drop_done_head(self) -> None:
        """Forget rows at the head whose request was answered meanwhile (deadline, disconnect)."""
        while self._waiting and self._waiting[0][2].ticket.done:
            self._pop()

    def drop_done(self) -> None:
        """The same for the whole queue."""
        self._keep([entry for entry in self._waiting if not entry[2].ticket.done])

    def take(self, max_rows: int) -> list[Segment]:
        """Take up to `max_rows` rows from the head, splitting the last segment if need be."""
        taken: list[Segment] = []
        room = max_rows
        while room > 0 and self._waiting:
            head = self._waiting[0][2]
            if head.ticket.done:
                self._pop()
            elif head.rows <= room:
                room -= head.rows
                taken.append(self._pop())
            else:
                taken.append(head.split(room))
                self._left(taken[-1])
                room = 0
        return taken

    def refuse(self, why: str) -> None:
        """Take out everything and answer that it cannot be served now."""
        for segment in self.take(self.rows):
            segment.ticket.fail(Unavailable(why))

    def take_unbound(self) -> list[Segment]:
        """Take out every segment that no gear was bound to yet, in order."""
        unbound = [segment for segment in self.segments if segment.entry is None]
        self._keep([entry for entry in self._waiting if entry[2].entry is not None])
        return unbound

    def _pop(self) -> Segment:
        _, _, segment = heapq.heappop(self._waiting)
        self._left(segment)
        return segment

    def _left(self, segment: Segment) -> None:
        self.rows -= segment.rows
        self.work -= segment.rows * segment.ticket.work_per_row
        if not self._waiting:
            # exactly 0, whatever rounding left over
            self.work, self._highest_rank_s = 0.0, float("-inf")

    def _keep(self, entries: list[tuple[float, int, Segment]]) -> None:
        if len(entries) == len(self._waiting):
            return
        heapq.heapify(entries)
        self._waiting = entries
        self._highest_rank_s = max((rank_s for rank_s, _, _ in entries), default=float("-inf"))
        self.rows = sum(segment.rows for _, _, segment in entries)
        self.work = sum((segment.rows * segment.ticket.work_per_row for _, _, segment in entries), 0.0)


def bind(segment: Segment, gear: Gear, entry: LadderEntry) -> None:
    """Late binding: rows get their gear when they first leave, and keep it."""
    if segment.entry is None:
        segment.entry = entry
        segment.ticket.certified &= entry.epsilon is not None
        if gear.name not in segment.ticket.gears:
            segment.ticket.gears.append(gear.name)


def gather(segments: Sequence[Segment], position: int) -> NDArray[Any]:
    """The rows of all segments of the input at `position`, as one array; not copied where there is one segment."""
    arrays = [segment.gather(position) for segment in segments]
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
