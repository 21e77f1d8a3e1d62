"""Rows on their way through the cascade: a client request becomes a ticket, its rows travel as segments.

No object is made per row: a segment names rows of one ticket that stand at the same stage, and is split or joined as
the rows part ways.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from cascadeserve.errors import Unavailable

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Iterable, Sequence

    from numpy.typing import NDArray

    from cascadeserve.errors import RequestError
    from cascadeserve.gear_plan import Gear, LadderEntry
    from orchestrator.backend import BatchAnswer


class Ticket:
    """One client request of n rows: its inputs, the answers that came so far, and its future."""

    __slots__ = (
        "__weakref__", "arrived_s", "certainty", "certified", "deadline_s", "future", "gears", "inputs", "label",
        "remaining", "rows", "scores", "stage",
    )  # fmt: skip

    def __init__(
        self,
        inputs: list[NDArray[Any]],
        *,
        arrived_s: float,
        deadline_s: float,
        num_classes: int | None,
        future: asyncio.Future[Ticket],
    ) -> None:
        """`inputs[i]` has shape [n, ...]; `num_classes` None means that no scores were asked for."""
        rows = inputs[0].shape[0]
        self.inputs = inputs
        self.rows = rows
        self.remaining = rows
        self.arrived_s = arrived_s
        self.deadline_s = deadline_s
        self.future = future
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
    """Rows waiting for one model, in order of arrival; halves of failed batches go before them, each by itself."""

    segments: deque[Segment] = field(default_factory=deque)
    halves: deque[list[Segment]] = field(default_factory=deque)
    rows: int = 0

    @property
    def head(self) -> Segment | None:
        """What leaves next, once done ones were dropped there."""
        if self.halves:
            return self.halves[0][0]
        return self.segments[0] if self.segments else None

    def push(self, segment: Segment) -> None:
        """Append a segment."""
        self.segments.append(segment)
        self.rows += segment.rows

    def push_front(self, segments: Sequence[Segment]) -> None:
        """Put segments that left back at the head, in their order."""
        self.segments.extendleft(reversed(segments))
        self.rows += sum(segment.rows for segment in segments)

    def push_half(self, segments: list[Segment]) -> None:
        """Have these rows leave next, without others."""
        self.halves.appendleft(segments)
        self.rows += sum(segment.rows for segment in segments)

    def merge(self, segments: list[Segment]) -> None:
        """Take in segments of another queue, in order of arrival."""
        self.segments = deque(sorted((*self.segments, *segments), key=lambda segment: segment.since_s))
        self.rows += sum(segment.rows for segment in segments)

    def drop_done_head(self) -> None:
        """Forget rows at the head whose request was answered meanwhile (deadline, disconnect)."""
        while self.halves and self.halves[0][0].ticket.done:
            if half := still_open(self.take_half()):
                self.push_half(half)
        while self.segments and self.segments[0].ticket.done:
            self.rows -= self.segments.popleft().rows

    def drop_done(self) -> None:
        """The same for the whole queue."""
        self.segments = deque(still_open(self.segments))
        self.halves = deque(half for each in self.halves if (half := still_open(each)))
        self.rows = sum(segment.rows for each in (self.segments, *self.halves) for segment in each)

    def take(self, max_rows: int) -> list[Segment]:
        """Take up to `max_rows` rows from the head, splitting the last segment if need be."""
        taken: list[Segment] = []
        room = max_rows
        while room > 0 and self.segments:
            head = self.segments[0]
            if head.ticket.done:
                self.rows -= self.segments.popleft().rows
            elif head.rows <= room:
                self.segments.popleft()
                self.rows -= head.rows
                room -= head.rows
                taken.append(head)
            else:
                taken.append(head.split(room))
                self.rows -= room
                room = 0
        return taken

    def take_half(self) -> list[Segment]:
        """Take the half of a failed batch that is first."""
        half = self.halves.popleft()
        self.rows -= sum(segment.rows for segment in half)
        return half

    def refuse(self, why: str) -> None:
        """Take out everything and answer that it cannot be served now."""
        while self.halves:
            self.push_front(self.take_half())
        for segment in self.take(self.rows):
            segment.ticket.fail(Unavailable(why))

    def take_unbound(self) -> list[Segment]:
        """Take out every segment that no gear was bound to yet."""
        unbound = [segment for segment in self.segments if segment.entry is None]
        self.segments = deque(segment for segment in self.segments if segment.entry is not None)
        self.rows -= sum(segment.rows for segment in unbound)
        return unbound


def still_open(segments: Iterable[Segment]) -> list[Segment]:
    """Those whose request has no answer yet."""
    return [segment for segment in segments if not segment.ticket.done]


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
        segment.ticket.certified &= entry.epsilon is not None
        if gear.name not in segment.ticket.gears:
            segment.ticket.gears.append(gear.name)


def gather(segments: Sequence[Segment], position: int) -> NDArray[Any]:
    """The rows of all segments of the input at `position`, as one array; not copied where there is one segment."""
    arrays = [segment.gather(position) for segment in segments]
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)
