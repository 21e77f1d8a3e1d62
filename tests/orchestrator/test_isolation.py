from __future__ import annotations

import asyncio
import contextlib
import math
from collections import Counter
from typing import TYPE_CHECKING, Any

import looptime
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascadeserve.errors import DeadlineExceeded, InternalError, InvalidRequest, Unavailable
from orchestrator.backend import BatchNotTaken, CallRejected, ModelVersion, NotServed
from tests.fakes.tiny import ERRS, EXITS, KILLS, marked
from tests.orchestrator.conftest import Rig, make_rig

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Coroutine, Sequence

    from orchestrator.rows import Ticket
    from tests.fakes.fake_backend import FakeTriton

pytestmark = pytest.mark.looptime

SMALL = ModelVersion("small", 1)


def submit(
    rig: Rig, *marks: float, label: int = 0, certainty: float = 0.9, timeout_s: float = 20.0
) -> asyncio.Future[Ticket]:
    """A request with a row for each mark."""
    inputs = np.concatenate([marked(label, certainty, mark) for mark in marks])
    return rig.orchestrator.dispatcher.submit(rig.family, [inputs], timeout_s=timeout_s, want_scores=False)


@contextlib.asynccontextmanager
async def watched(rig: Rig, *, restart_s: float | None = None) -> AsyncIterator[None]:
    """Monitors and reconciler run; servers that are down are started again after a while."""

    async def keep_up(fake: FakeTriton) -> None:
        while True:
            await asyncio.sleep(0.05)
            if fake.down and restart_s is not None:
                await asyncio.sleep(restart_s)
                fake.down = False
                fake.dead.clear()

    loops = [monitor.run() for monitor in rig.orchestrator.monitors.values()]
    tasks = [asyncio.create_task(run) for run in (*loops, rig.orchestrator.reconciler.run())]
    tasks += [asyncio.create_task(keep_up(fake)) for fake in rig.fakes.values()]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def counter(rig: Rig, name: str) -> float:
    """A counter's sum over its labels."""
    text = rig.orchestrator.metrics.render()[0].decode()
    return sum(float(line.rpartition(" ")[2]) for line in text.splitlines() if line.startswith(f"{name}{{"))


def run_in_virtual_time(test: Coroutine[Any, Any, None]) -> None:
    """For properties, whose every example needs a loop of its own."""

    async def in_virtual_time() -> None:
        with contextlib.nullcontext() if asyncio.get_running_loop().looptime_on else looptime.enabled():  # type: ignore[attr-defined]
            await test

    with asyncio.Runner(loop_factory=looptime.new_event_loop) as runner:
        runner.run(in_virtual_time())


def check_idle(rig: Rig) -> None:
    dispatcher = rig.orchestrator.dispatcher
    assert dispatcher.open_tickets == 0
    assert not dispatcher.flights.batches
    assert not dispatcher.flights.isolation.suspects
    assert all(queue.waiting_rows() == 0 for queue in dispatcher.families.values())
    for endpoint in dispatcher.endpoints:
        assert endpoint.in_flight == 0
        assert endpoint.work_s == 0.0
        assert not endpoint.reserved


async def outcomes(futures: Sequence[asyncio.Future[Ticket]]) -> list[Any]:
    """Labels where answered, else the error."""
    results = await asyncio.gather(*futures, return_exceptions=True)
    return [result if isinstance(result, BaseException) else result.label.tolist() for result in results]


async def test_one_erroring_row_fails_alone_and_says_so() -> None:
    rig = await make_rig(busy_s={"small": 0.1})
    futures = [submit(rig, ERRS if i == 23 else 0.0, label=i) for i in range(60)]
    results = await outcomes(futures)
    error = results.pop(23)
    assert isinstance(error, InternalError)
    assert str(error) == "model 'small': row 0 of the request failed, alone: a row is marked"
    assert results == [[i] for i in range(60) if i != 23]
    assert counter(rig, "cascadeserve_poison_rows_total") == 1
    check_idle(rig)


async def test_the_row_of_a_larger_request_is_named_and_its_other_rows_are_dropped() -> None:
    rig = await make_rig(busy_s={"small": 0.1})
    beside = submit(rig, 0.0, label=7)
    running = submit(rig, 0.0)
    poison = submit(rig, 0.0, 0.0, ERRS, 0.0, 0.0, 0.0, 0.0, 0.0)
    after = submit(rig, 0.0, label=8)
    with pytest.raises(InternalError, match="row 2 of the request failed, alone"):
        await poison
    assert await outcomes([beside, running, after]) == [[7], [0], [8]]
    await asyncio.sleep(1.0)
    check_idle(rig)


async def test_what_triton_calls_a_bad_request_stays_one() -> None:
    rig = await make_rig()

    async def refuse(*_: Any, **__: Any) -> None:
        raise CallRejected("inference of ...: 400: no such word", answer="no such word", status=400)

    rig.fakes["a"].infer = refuse  # type: ignore[assignment, method-assign]
    with pytest.raises(InvalidRequest, match="failed, alone: no such word"):
        await submit(rig, 0.0)


async def test_a_half_is_not_joined_with_rows_that_wait() -> None:
    rig = await make_rig(busy_s={"small": 0.1})
    await asyncio.gather(*(submit(rig, 0.0) for _ in range(2)))
    rig.fakes["a"].calls.clear()
    futures = [submit(rig, 0.0) for _ in range(2)]  # both slots
    futures += [submit(rig, ERRS if i == 0 else 0.0) for i in range(8)]
    await asyncio.sleep(0.11)
    futures += [submit(rig, 0.0) for _ in range(30)]
    await asyncio.gather(*futures, return_exceptions=True)
    # 8 fail; then 4, 2 and 1 with it and without it; of those that came later one had a slot, the others went together
    sizes = Counter(call.rows for call in rig.fakes["a"].calls)
    assert sizes == Counter([1, 1, 8, 1, 4, 4, 2, 2, 1, 1, 29])


@settings(max_examples=30)
@given(data=st.data())
def test_every_row_but_the_erroring_ones_is_answered_in_few_calls(data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=25), label="rows of each request")
    total = sum(sizes)
    poison = data.draw(st.sets(st.integers(0, total - 1), max_size=5), label="erroring rows")
    names = data.draw(st.sampled_from([("a",), ("a", "b")]), label="endpoints")

    async def run() -> None:
        rig = await make_rig(names=names, busy_s={"small": 0.01, "large": 0.02})
        futures, bad, first = [], [], 0
        for index, size in enumerate(sizes):
            marks = [ERRS if row in poison else 0.0 for row in range(first, first + size)]
            first += size
            bad.append(any(marks))
            futures.append(submit(rig, *marks, label=index, certainty=0.9 if index % 3 else 0.1))
        results = await outcomes(futures)
        for index, (result, is_bad) in enumerate(zip(results, bad, strict=True)):
            if is_bad:
                assert isinstance(result, InternalError)
            else:
                assert result == [index + (0 if index % 3 else 100)] * sizes[index]
        await asyncio.sleep(1.0)
        check_idle(rig)
        # without any failure no more than one call each; a poison row at most two per halving
        calls = sum(len(fake.calls) for fake in rig.fakes.values())
        assert calls <= 2 * (len(sizes) + total // 64 + 1) + 2 * len(poison) * math.ceil(math.log2(64))

    run_in_virtual_time(run())


@pytest.mark.parametrize("names", [("a",), ("a", "b"), ("a", "b", "c")])
@pytest.mark.parametrize("mark", [EXITS, KILLS])
async def test_a_crashing_row_crashes_twice_at_most_and_strangers_are_answered(
    names: tuple[str, ...], mark: float
) -> None:
    rig = await make_rig(names=names, busy_s={"small": 0.02, "large": 0.02}, load_s=0.5)
    marks = [mark if i in (40, 41, 170) else 0.0 for i in range(300)]
    futures = [submit(rig, each, label=i, certainty=0.9 if i % 3 else 0.1) for i, each in enumerate(marks)]
    async with watched(rig, restart_s=1.5):
        results = await outcomes(futures)
        await asyncio.sleep(5.0)
        check_idle(rig)
        again = await outcomes([submit(rig, 0.0, label=5)])
    assert again == [[5]]
    for i, result in enumerate(results):
        if marks[i]:
            assert isinstance(result, InternalError), result
            assert "crashed it, alone" in str(result)
        else:
            assert result == [i + (0 if i % 3 else 100)]
    crashes = Counter(label for fake in rig.fakes.values() for batch in fake.crashes for label in batch if marks[label])
    assert max(crashes.values()) <= 2
    assert counter(rig, "cascadeserve_poison_rows_total") == 3


@settings(max_examples=10)
@given(
    bad=st.dictionaries(st.integers(0, 119), st.sampled_from([ERRS, EXITS, KILLS]), max_size=4),
    names=st.sampled_from([("a",), ("a", "b")]),
)
def test_any_mix_of_bad_rows_harms_nobody_else(bad: dict[int, float], names: tuple[str, ...]) -> None:
    async def run() -> None:
        rig = await make_rig(names=names, busy_s={"small": 0.02, "large": 0.02}, load_s=0.3)
        futures = [submit(rig, bad.get(i, 0.0), label=i, timeout_s=60.0) for i in range(120)]
        async with watched(rig, restart_s=1.0):
            results = await outcomes(futures)
            await asyncio.sleep(5.0)
            check_idle(rig)
        for i, result in enumerate(results):
            assert isinstance(result, InternalError) if i in bad else result == [i]
        crashes = Counter(label for fake in rig.fakes.values() for batch in fake.crashes for label in batch)
        assert all(crashes[i] <= 2 for i in bad)

    run_in_virtual_time(run())


async def test_rows_of_a_killed_endpoint_are_answered_by_another() -> None:
    rig = await make_rig(names=("a", "b"), busy_s={"small": 1.0})
    futures = [submit(rig, 0.0, label=i) for i in range(200)]
    async with watched(rig):
        await asyncio.sleep(0.5)
        rig.fakes["a"].kill()
        assert await outcomes(futures) == [[i] for i in range(200)]


async def test_a_hung_endpoint_gives_its_rows_to_another_and_no_row_is_blamed(looptime: float) -> None:
    rig = await make_rig(names=("a", "b"), busy_s={"small": 0.1})
    rig.fakes["a"].hang = True
    futures = [submit(rig, 0.0, label=i) for i in range(50)]
    async with watched(rig):
        assert await outcomes(futures) == [[i] for i in range(50)]
        assert looptime < 15.0
        assert counter(rig, "cascadeserve_poison_rows_total") == 0
        assert counter(rig, "cascadeserve_suspect_rows_total") > 0
        rig.fakes["a"].hang = False
        await asyncio.sleep(1.0)
        check_idle(rig)


async def test_a_batch_that_was_not_begun_is_sent_once_more() -> None:
    rig = await make_rig(names=("a", "b"))
    fake = rig.fakes["a"]
    tries = 0

    async def refuse(*_: Any, **__: Any) -> None:
        nonlocal tries
        tries += 1
        raise BatchNotTaken("503: stopping")

    fake.infer = refuse  # type: ignore[assignment, method-assign]
    async with watched(rig):
        assert (await submit(rig, 0.0, label=3)).label.tolist() == [3]
        assert tries == 1
        assert counter(rig, "cascadeserve_retried_rows_total") == 1
        rig.fakes["b"].infer = refuse  # type: ignore[assignment, method-assign]
        with pytest.raises(Unavailable, match=r"took no batch.*try again"):
            await submit(rig, 0.0)
        assert tries == 3


async def test_a_model_that_is_not_served_is_asked_elsewhere() -> None:
    rig = await make_rig(names=("a", "b"))

    async def refuse(*_: Any, **__: Any) -> None:
        raise NotServed("404: has no available versions")

    rig.fakes["a"].infer = refuse  # type: ignore[assignment, method-assign]
    assert await outcomes([submit(rig, 0.0, label=i) for i in range(20)]) == [[i] for i in range(20)]


async def test_a_dead_process_is_replaced_and_its_endpoint_serves_the_other_models() -> None:
    rig = await make_rig(busy_s={"small": 0.01}, load_s=1.0)
    fake = rig.fakes["a"]
    async with watched(rig):
        await asyncio.sleep(0.1)
        fake.dead.add("small")
        future = submit(rig, 0.0, label=4)
        await asyncio.sleep(0.1)
        assert rig.orchestrator.dispatcher.endpoints[0].up
        assert ModelVersion("large", 1) in rig.orchestrator.dispatcher.endpoints[0].hosted
        assert SMALL not in rig.orchestrator.dispatcher.endpoints[0].hosted
        assert (await future).label.tolist() == [4]
        assert (fake.unloads, fake.loads) == (["small"], ["small"])
        assert SMALL in rig.orchestrator.dispatcher.endpoints[0].hosted


async def test_a_model_that_cannot_be_loaded_anew_is_tried_again_later() -> None:
    rig = await make_rig()
    fake = rig.fakes["a"]
    async with watched(rig):
        fake.dead.add("small")
        fake.fail_loads = "no memory"
        future = submit(rig, 0.0, label=4)
        await asyncio.sleep(5.0)
        assert not future.done()
        assert 2 <= len(fake.unloads) <= 4
        fake.fail_loads = ""
        assert (await future).label.tolist() == [4]


async def test_suspects_are_refused_at_their_deadline_if_nobody_can_try_them(looptime: float) -> None:
    rig = await make_rig(busy_s={"small": 0.1})
    future = submit(rig, 0.0, timeout_s=3.0)
    async with watched(rig):
        await asyncio.sleep(0.05)
        rig.fakes["a"].kill()
        with pytest.raises(DeadlineExceeded):
            await future
        assert looptime == pytest.approx(3.0, abs=0.1)


async def test_a_batch_that_hangs_does_not_keep_an_endpoint_idle_for_suspects() -> None:
    rig = await make_rig(names=("a", "b"), busy_s={"large": 50.0})
    async with watched(rig):
        hanging = submit(rig, 0.0, certainty=0.1, timeout_s=100.0)
        await asyncio.sleep(0.1)
        busy = next(name for name, fake in rig.fakes.items() if fake.in_flight)
        other = "b" if busy == "a" else "a"
        rig.fakes[other].busy_s["small"] = 1.0
        future = submit(rig, 0.0, label=1)
        await asyncio.sleep(0.1)
        rig.fakes[other].kill()
        assert (await future).label.tolist() == [1]
        assert (await submit(rig, 0.0, label=2)).label.tolist() == [2]
        assert not hanging.done()
        hanging.cancel()


@pytest.mark.parametrize("mark", [ERRS, EXITS, KILLS])
async def test_close_answers_whatever_waits_to_be_tried_again(mark: float) -> None:
    rig = await make_rig(names=("a", "b"), busy_s={"small": 1.0})
    futures = [submit(rig, mark if i % 7 == 0 else 0.0) for i in range(100)]
    await asyncio.sleep(1.5)
    await rig.orchestrator.close()
    results = await outcomes(futures)
    assert all(isinstance(each, list | Unavailable | InternalError) for each in results)
    check_idle(rig)


async def test_cancelled_requests_leave_no_suspects_or_halves_behind() -> None:
    rig = await make_rig(names=("a", "b"), busy_s={"small": 1.0})
    futures = [submit(rig, KILLS if i == 0 else ERRS if i == 9 else 0.0) for i in range(100)]
    async with watched(rig):
        await asyncio.sleep(2.5)
        for future in futures:
            future.cancel()
        await asyncio.sleep(10.0)
        check_idle(rig)


async def test_rows_of_a_former_plan_are_not_forgotten_while_they_wait_to_be_tried() -> None:
    rig = await make_rig(busy_s={"small": 0.1})
    dispatcher = rig.orchestrator.dispatcher
    former = rig.family
    future = submit(rig, 0.0, label=6)
    async with watched(rig):
        await asyncio.sleep(0.05)
        rig.fakes["a"].kill()
        await asyncio.sleep(0.5)
        dispatcher.take_families([])
        assert dispatcher.forget_drained() == []
        assert dispatcher.is_needed(SMALL)
        rig.fakes["a"].down = False
        assert (await future).label.tolist() == [6]
        await asyncio.sleep(2.0)
    assert former not in dispatcher._leaving
