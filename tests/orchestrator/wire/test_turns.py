from __future__ import annotations

import asyncio
import math
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from cascadeserve.errors import Overloaded
from orchestrator.wire.endpoints import routes
from orchestrator.wire.exchange import Answer, Call
from orchestrator.wire.turns import Turns
from tests.orchestrator.wire.bodies import binary, head, tensor
from tests.orchestrator.wire.echo_plane import EchoPlane


async def test_between_two_pieces_whatever_else_is_ready_runs() -> None:
    turns, done = Turns("too much; send less"), []

    async def small(name: str) -> None:
        for _ in range(3):
            await asyncio.sleep(0)
            done.append(name)

    dear = [asyncio.create_task(turns.run(lambda number=number: done.append(number))) for number in range(3)]
    await asyncio.gather(*dear, small("small"))
    assert [each for each in done if each != "small"] == [0, 1, 2]
    assert all(done[done.index(number) + 1] == "small" for number in range(2))


async def test_the_result_and_how_long_it_waited() -> None:
    turns = Turns("too much; send less")
    first, second = await asyncio.gather(turns.run(lambda: "first"), turns.run(lambda: "second"))
    assert first[0] == "first"
    assert second[0] == "second"
    assert 0.0 <= first[1] <= second[1]


async def test_work_that_raises_or_is_cancelled_lets_the_next_one_go() -> None:
    turns = Turns("too much; send less")

    def fail() -> None:
        raise ValueError("bad")

    failing = asyncio.create_task(turns.run(fail))
    cancelled = asyncio.create_task(turns.run(lambda: None))
    last = asyncio.create_task(turns.run(lambda: "last"))
    await asyncio.sleep(0)
    cancelled.cancel()
    assert (await last)[0] == "last"
    with pytest.raises(ValueError, match="bad"):
        await failing
    with pytest.raises(asyncio.CancelledError):
        await cancelled


async def test_a_thread_ends_what_nobody_waits_for_before_the_next_piece() -> None:
    turns, done = Turns("too much; send less"), []
    may_end = threading.Event()
    with ThreadPoolExecutor(2) as threads:

        def slow() -> None:
            may_end.wait(10)
            done.append("slow")

        cancelled = asyncio.create_task(turns.run_in(threads, slow))
        last = asyncio.create_task(turns.run_in(threads, lambda: done.append("last")))
        await asyncio.sleep(0.02)
        cancelled.cancel()
        await asyncio.sleep(0.02)
        assert done == []
        may_end.set()
        _, waited_s = await last
    assert done == ["slow", "last"]
    assert waited_s > 0.03
    with pytest.raises(asyncio.CancelledError):
        await cancelled


@pytest.mark.looptime
async def test_what_waits_for_too_long_lets_nothing_more_in() -> None:
    turns = Turns("too much; send less")
    await turns._lock.acquire()
    waiting = asyncio.create_task(turns.run(lambda: None))
    await asyncio.sleep(0.2)
    later = asyncio.create_task(turns.run(lambda: None))
    await asyncio.sleep(0.1)
    for deadline_s in (None, 0.0, 0.59):
        with pytest.raises(Overloaded, match="send less"):
            await turns.run(lambda: None, deadline_s)
    # worth waiting for twice as long and more
    longer = asyncio.create_task(turns.run(lambda: None, 0.61))
    await asyncio.sleep(1.8)
    with pytest.raises(Overloaded, match="send less"):
        await turns.run(lambda: None, math.inf)
    turns._lock.release()
    await asyncio.gather(waiting, later, longer)
    assert (await turns.run(lambda: "again"))[0] == "again"


async def test_a_request_for_which_there_is_no_turn_is_refused_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.wire.turns._LEAST_S", -1.0)
    plane = EchoPlane()
    infer = routes(plane, None)[0].handler
    call = Call("echo", "1", None, head(tensor([1] * 10_000)), None, admitted=True)
    answers = await asyncio.gather(*(infer(call) for _ in range(3)), return_exceptions=True)
    assert [isinstance(answer, Overloaded) for answer in answers] == [False, False, True]
    assert (plane.not_read, len(plane.requests)) == ([("echo", "1")], 2)


async def test_how_long_it_may_wait_is_asked_of_the_data_plane(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.wire.turns._LEAST_S", -1.0)
    plane = EchoPlane()
    plane.deadline_s = 10.0
    infer = routes(plane, None)[0].handler
    call = Call("echo", "1", None, head(tensor([1] * 10_000)), None, admitted=True)
    answers = await asyncio.gather(*(infer(call) for _ in range(3)))
    assert [answer.status for answer in answers] == [200] * 3


async def test_many_texts_are_cut_by_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.wire.turns._LEAST_S", -1.0)

    async def refused(item: dict[str, Any], buffer: bytes, **beside: Any) -> int:
        json_part = head(item, **beside).replace(b"BYTES", b"BYT\\u0045S")
        call = Call("echo", "1", str(len(json_part)), json_part + buffer, None, admitted=True)
        infer = routes(EchoPlane(), None)[0].handler
        answers = await asyncio.gather(*(infer(call) for _ in range(3)), return_exceptions=True)
        assert all(isinstance(answer, Answer | Overloaded) for answer in answers)
        return sum(isinstance(answer, Overloaded) for answer in answers)

    many = bytes(4 * 5000)
    assert await refused(binary(len(many), "BYTES", [5000]), many) == 1
    assert await refused(binary(len(many), "BYTES", [5000]), many, unknown="a" * 3000) == 1
    # one long text, few, or other data
    long = len(many).to_bytes(4, "little") + many
    assert await refused(binary(len(long), "BYTES", [1]), long) == 0
    assert await refused(binary(400, "BYTES", [100]), many[:400]) == 0
    assert await refused(binary(len(many), "FP32", [5000]), many) == 0
