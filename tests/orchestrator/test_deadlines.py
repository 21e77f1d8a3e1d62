from __future__ import annotations

import asyncio
import gc
import weakref

import numpy as np
import pytest

from cascadeserve.errors import DeadlineExceeded
from orchestrator.deadlines import Deadlines
from orchestrator.rows import Ticket

pytestmark = pytest.mark.looptime


def ticket(deadline_s: float) -> Ticket:
    loop = asyncio.get_running_loop()
    now_s = loop.time()
    inputs = [np.zeros((1, 1))]
    return Ticket(inputs, arrived_s=now_s, deadline_s=now_s + deadline_s, num_classes=None, future=loop.create_future())


class Ended:
    """Ends tickets as they are reported, and remembers when."""

    def __init__(self) -> None:
        self.at_s: dict[int, float] = {}

    def __call__(self, late: Ticket) -> None:
        self.at_s[id(late)] = asyncio.get_running_loop().time()
        late.fail(DeadlineExceeded("late"))
        late.future.exception()


async def test_every_open_ticket_is_reported_at_its_own_deadline_in_any_order() -> None:
    ended = Ended()
    deadlines = Deadlines(ended)
    tickets = [ticket(after_s) for after_s in (0.5, 0.1, 0.3, 0.1, 0.9)]
    for each in tickets:
        deadlines.add(each)
    tickets[2].finish_rows(1)
    await asyncio.sleep(2)
    assert [ended.at_s.get(id(each)) for each in tickets] == pytest.approx([0.5, 0.1, None, 0.1, 0.9], abs=0.001)
    assert deadlines.clear_stale() == 0


async def test_an_answered_ticket_is_not_kept() -> None:
    deadlines = Deadlines(Ended())
    done = ticket(3600.0)
    deadlines.add(done)
    assert deadlines.clear_stale() == 1
    done.finish_rows(1)
    gone = weakref.ref(done)
    done.future.result()
    del done
    gc.collect()
    assert gone() is None
    assert deadlines.clear_stale() == 0
    deadlines.stop()


async def test_entries_of_answered_tickets_do_not_pile_up() -> None:
    deadlines = Deadlines(Ended())
    kept = [ticket(3600.0) for _ in range(10)]
    for each in kept:
        deadlines.add(each)
    for _ in range(5000):
        short = ticket(3600.0)
        deadlines.add(short)
        short.finish_rows(1)
    assert len(deadlines._entries) < 2000
    assert deadlines.clear_stale() == 10
    deadlines.stop()


async def test_nothing_is_reported_after_a_stop() -> None:
    ended = Ended()
    deadlines = Deadlines(ended)
    late = ticket(0.1)
    deadlines.add(late)
    deadlines.stop()
    await asyncio.sleep(1)
    assert not ended.at_s
