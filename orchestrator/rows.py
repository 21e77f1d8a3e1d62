"""Rows on their way through the cascade: a client request becomes a ticket, its rows travel as segments.

No object is made per row: a segment names rows of one ticket that stand at the same stage, and is split or joined as
the rows part ways.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from cascadeserve.errors import DeadlineExceeded, Unavailable
from orchestrator.request_options import NO_OPTIONS

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterable, Iterator, Sequence

    from numpy.typing import NDArray

    from cascadeserve.errors import RequestError
    from cascadeserve.gear_plan import Gear, LadderEntry
    from orchestrator.backend import BatchAnswer
    from orchestrator.request_options import RequestOptions


_NO_LABEL: NDArray[np.int64] = np.empty(0, dtype=np.int64)
_NO_CERTAINTY: NDArray[np.float32] = np.empty(0, dtype=np.float32)


class Ticket:
    """One client request of n rows: its inputs, the answers that came so far, and its future."""

    __slots__ = (
        "__weakref__", "_stage", "arrived_s", "certainty", "certified", "computed_row_s", "cut_rows", "deadline_s",
        "future", "gears", "handicap_s", "inputs", "label", "options", "remaining", "rows", "scores", "unheard",
        "waited_row_s", "work_per_row",
    )  # fmt: skip

    def __init__(
        self,
        inputs: list[NDArray[Any]],
        *,
        arrived_s: float,
        deadline_s: float,
        num_classes: int | None,
        future: asyncio.Future[Ticket],
        options: RequestOptions = NO_OPTIONS,
        handicap_s: float = 0.0,
    ) -> None:
        """`inputs[i]` has shape [n, ...]; `num_classes` None means that no scores were asked for.

        Its rows rank in each queue as if it had come `handicap_s` later than it did. `options.work_per_row` is how many
        rows of the plan's busy times one of them is.
        """
        rows = inputs[0].shape[0]
        self.inputs = inputs
        self.rows = rows
        self.options = options
        self.work_per_row = options.work_per_row
        self.handicap_s = handicap_s
        self.remaining = rows
        # rows that no stage has answered yet; and rows answered by a stage that was not certain of them
        self.unheard = rows
        self.cut_rows = 0
        self.arrived_s = arrived_s
        self.deadline_s = deadline_s
        self.future = future
        # names of the gears its rows left in; several only if it was split and a shift fell between the parts
        self.gears: list[str] = []
        # whether all its rows went through cascades that the plan's certificate covers, to their end
        self.certified = True
        # seconds in queues and with Triton, summed over its rows and their stages
        self.waited_row_s = 0.0
        self.computed_row_s = 0.0
        # [n] each once any row is answered; one number for the stage if all rows were answered at once
        self.label: NDArray[np.int64] = _NO_LABEL
        self.certainty: NDArray[np.float32] = _NO_CERTAINTY
        self._stage: NDArray[np.int32] | int = 0
        self.scores: NDArray[np.float32] | None = (
            None if num_classes is None else np.empty((rows, num_classes), dtype=np.float32)
        )

    @property
    def stage(self) -> NDArray[np.int32]:
        """Stage that answered each row, [n]."""
        return np.full(self.rows, self._stage, dtype=np.int32)

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
        if indices is None:
            self.label, self.certainty, self._stage = answer.label[source], answer.certainty[source], stage
        else:
            stages = self._stage if isinstance(self._stage, np.ndarray) else self._take_apart()
            self.label[indices] = answer.label[source]
            self.certainty[indices] = answer.certainty[source]
            stages[indices] = stage
        if self.scores is not None and answer.scores is not None:
            self.scores[slice(None) if indices is None else indices] = answer.scores[source]

    def _take_apart(self) -> NDArray[np.int32]:
        """Keep what all rows were answered with, which may be views of a batch's answers: they will differ now."""
        if self.label is _NO_LABEL:
            self.label = np.empty(self.rows, dtype=np.int64)
            self.certainty = np.empty(self.rows, dtype=np.float32)
        else:
            self.label, self.certainty = self.label.copy(), self.certainty.copy()
        stages = self._stage = self.stage
        return stages

    def cut(self, count: int) -> None:
        """Note that rows will keep the answers they have though their stage was not certain of them."""
        self.certified = False
        self.cut_rows += count

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
    # whether it was in a batch that an endpoint did not take
    retried: bool = False

    def split(self, rows: int) -> Segment:
        """Take the first `rows` rows out into a segment of their own."""
        indices = np.arange(self.rows) if self.indices is None else self.indices
        first = Segment(self.ticket, rows, self.since_s, indices[:rows], self.entry, self.stage, self.retried)
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
    """Rows waiting for one model, the least rank first, of equals the one that came first.

    Halves of failed batches go before them, each by itself.
    """

    halves: deque[list[Segment]] = field(default_factory=deque)
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
        """What leaves next, once done ones were dropped there."""
        if self.halves:
            return self.halves[0][0]
        return self._waiting[0][2] if self._waiting else None

    @property
    def head_rank_s(self) -> float:
        """Its rank, of halves the least there is; only of a queue that is not empty."""
        return float("-inf") if self.halves else self._waiting[0][0]

    @property
    def segments(self) -> list[Segment]:
        """All that waits but for halves, in order."""
        return [segment for _, _, segment in sorted(self._waiting)]

    def push(self, segment: Segment, rank_s: float) -> None:
        """Add a segment."""
        heapq.heappush(self._waiting, (rank_s, next(self._numbers), segment))
        self._highest_rank_s = max(self._highest_rank_s, rank_s)
        self._count(segment)

    def push_half(self, segments: list[Segment]) -> None:
        """Have these rows leave next, without others."""
        self.halves.appendleft(segments)
        for segment in segments:
            self._count(segment)

    def oldest_since_s(self) -> float:
        """Since when the row that has waited here for longest does so, but for halves.

        Important rows count as having waited longer. Only of a queue whose head is not done.
        """
        return min(
            segment.since_s + min(segment.ticket.handicap_s, 0.0)
            for _, _, segment in self._waiting
            if not segment.ticket.done
        )

    def work_before(self, rank_s: float) -> float:
        """Work that goes before a row of this rank that comes now."""
        if rank_s >= self._highest_rank_s:
            return self.work
        halves = itertools.chain.from_iterable(self.halves)
        before = (segment for rank, _, segment in self._waiting if rank <= rank_s)
        return work_of(itertools.chain(halves, before))

    def drop_done_head(self) -> None:
        """Forget rows at the head whose request was answered meanwhile (deadline, disconnect)."""
        while self.halves and self.halves[0][0].ticket.done:
            if half := still_open(self.take_half()):
                self.push_half(half)
        while self._waiting and self._waiting[0][2].ticket.done:
            self._pop()

    def drop_done(self) -> None:
        """The same for the whole queue."""
        self._keep([entry for entry in self._waiting if not entry[2].ticket.done])
        for _ in range(len(self.halves)):
            if half := still_open(self.take_half()):
                self.halves.append(half)
                for segment in half:
                    self._count(segment)

    def take(self, max_rows: int) -> list[Segment]:
        """Take up to `max_rows` rows from the head, but for halves; the last segment is split if need be."""
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

    def take_half(self) -> list[Segment]:
        """Take the half of a failed batch that is first."""
        half = self.halves.popleft()
        for segment in half:
            self._left(segment)
        return half

    def refuse(self, why: str) -> None:
        """Take out everything and answer that it cannot be served now."""
        while self.halves:
            for segment in self.take_half():
                segment.ticket.fail(Unavailable(why))
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

    def _count(self, segment: Segment) -> None:
        self.rows += segment.rows
        self.work += segment.rows * segment.ticket.work_per_row

    def _left(self, segment: Segment) -> None:
        self.rows -= segment.rows
        self.work -= segment.rows * segment.ticket.work_per_row
        if not self._waiting:
            self._highest_rank_s = float("-inf")
            if not self.halves:
                self.work = 0.0  # exactly, whatever rounding left over

    def _keep(self, entries: list[tuple[float, int, Segment]]) -> None:
        if len(entries) == len(self._waiting):
            return
        heapq.heapify(entries)
        self._waiting = entries
        self._highest_rank_s = max((rank_s for rank_s, _, _ in entries), default=float("-inf"))
        waiting = [*(segment for _, _, segment in entries), *itertools.chain.from_iterable(self.halves)]
        self.rows = sum(segment.rows for segment in waiting)
        self.work = work_of(waiting)


def work_of(segments: Iterable[Segment]) -> float:
    """Rows of the plan's busy times that these are."""
    return sum((segment.rows * segment.ticket.work_per_row for segment in segments), 0.0)


def still_open(segments: Iterable[Segment]) -> list[Segment]:
    """Those whose request has no answer yet."""
    return [segment for segment in segments if not segment.ticket.done]


def give_up(segment: Segment, why: str) -> None:
    """End what would come too late: rows keep the answer that they have, or their request is refused."""
    if segment.stage:
        segment.ticket.cut(segment.rows)
        segment.ticket.finish_rows(segment.rows)
    else:
        segment.ticket.fail(DeadlineExceeded(why))


def in_two(segments: Sequence[Segment]) -> list[list[Segment]]:
    """Halves of them by rows, in order, neither empty; of a single row: itself."""
    rows = sum(segment.rows for segment in segments)
    first: list[Segment] = []
    room = rows // 2
    second = deque(segments)
    while room:
        head = second[0]
        first.append(second.popleft() if head.rows <= room else head.split(room))
        room -= first[-1].rows
    return [half for half in (first, list(second)) if half]


def bind(segment: Segment, gear: Gear, entry: LadderEntry) -> None:
    """Late binding: rows get their gear when they first leave, and keep it."""
    if segment.entry is None:
        segment.entry = entry
        segment.ticket.certified &= entry.epsilon is not None and not segment.ticket.options.changes(entry)
        if gear.name not in segment.ticket.gears:
            segment.ticket.gears.append(gear.name)


def gather(segments: Sequence[Segment], position: int) -> NDArray[Any]:
    """The rows of all segments of the input at `position`, as one array; not copied where there is one segment."""
    arrays = [segment.gather(position) for segment in segments]
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
