from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import numpy as np
import pytest

from cascadeserve.errors import DeadlineExceeded, InternalError, Unavailable
from tests.fakes.tiny import plan_document, rows
from tests.orchestrator.conftest import Rig, make_rig

if TYPE_CHECKING:
    from orchestrator.rows import Ticket

pytestmark = pytest.mark.looptime


def submit(rig: Rig, labels: list[int], certainties: list[float], *, timeout_s: float = 5.0) -> asyncio.Future[Ticket]:
    return rig.orchestrator.dispatcher.submit(
        rig.family, [rows(labels, certainties)], timeout_s=timeout_s, want_scores=False
    )


async def test_rows_of_one_request_part_ways_and_are_joined_in_order() -> None:
    rig = await make_rig()
    ticket = await submit(rig, [1, 2, 3, 4], [0.9, 0.1, 0.5, 0.49])
    assert ticket.label.tolist() == [1, 102, 3, 104]
    assert ticket.stage.tolist() == [0, 1, 0, 1]
    assert [(call.model, call.rows) for call in rig.fakes["a"].calls] == [("small", 4), ("large", 2)]


async def test_nan_certainty_escalates_and_is_counted() -> None:
    rig = await make_rig()
    ticket = await submit(rig, [1], [float("nan")])
    assert ticket.label.tolist() == [101]
    text = rig.orchestrator.metrics.render()[0].decode()
    assert 'cascadeserve_nan_certainty_rows_total{model="small"} 1.0' in text


async def test_a_request_larger_than_max_batch_is_split_and_joined() -> None:
    rig = await make_rig()
    ticket = await submit(rig, list(range(200)), [0.9 if i % 3 else 0.0 for i in range(200)])
    assert ticket.label.tolist() == [i if i % 3 else i + 100 for i in range(200)]
    assert max(call.rows for call in rig.fakes["a"].calls) <= 64


async def test_rows_wait_for_min_batch() -> None:
    rig = await make_rig()
    rig.gear("busy")
    first = [submit(rig, [i], [0.9]) for i in range(7)]
    await asyncio.sleep(0.009)
    assert not rig.fakes["a"].calls
    first.append(submit(rig, [7], [0.9]))
    await asyncio.gather(*first)
    assert [(call.model, call.rows) for call in rig.fakes["a"].calls] == [("small", 8)]


async def test_rows_wait_no_longer_than_max_wait(looptime: float) -> None:
    rig = await make_rig()
    rig.gear("busy")
    await submit(rig, [1], [0.9])
    assert looptime == pytest.approx(0.01, abs=0.001)


async def test_slots_plus_one_batches_are_in_flight() -> None:
    rig = await make_rig(busy_s={"small": 1.0})
    futures = [submit(rig, [i], [0.9]) for i in range(300)]
    await asyncio.gather(*futures)
    assert rig.fakes["a"].max_in_flight == 2


async def test_the_next_batch_leaves_before_the_answers_of_the_last_are_written() -> None:
    rig = await make_rig(busy_s={"small": 1.0})
    calls = rig.fakes["a"].calls
    calls_at_answer = []

    async def client(label: int) -> None:
        await submit(rig, [label], [0.9], timeout_s=50)
        calls_at_answer.append(len(calls))

    await asyncio.gather(*(client(label) for label in range(200)))
    # the first two batches leave with one row each, a third with 64 when one of them is back
    assert calls_at_answer[0] == 3
    assert len(calls) > 3


async def test_batches_go_where_least_work_is_expected() -> None:
    rig = await make_rig(names=("a", "b"), busy_s={"small": 1.0})
    futures = [submit(rig, [i], [0.9], timeout_s=50) for i in range(4)]
    await asyncio.gather(*futures)
    assert len(rig.fakes["a"].calls) == len(rig.fakes["b"].calls) == 2


async def test_load_weights_divide_the_batches() -> None:
    document = plan_document(("a", "b"))
    document["families"]["family"]["gears"][0]["load"] = {"small": {"a": 0.0, "b": 1.0}}
    rig = await make_rig(document, names=("a", "b"))
    for i in range(5):
        await submit(rig, [i], [0.9])
    assert [call.model for call in rig.fakes["a"].calls] == []
    assert len(rig.fakes["b"].calls) == 5
    rig.fakes["b"].down = True
    await rig.probe()
    assert (await submit(rig, [7], [0.9])).label.tolist() == [7]  # weight 0 is better than no answer


async def test_late_binding_rows_take_the_gear_in_force_when_they_leave() -> None:
    document = plan_document()
    document["families"]["family"]["gears"][1]["ladder_entry"] = "reference"
    rig = await make_rig(document, busy_s={"small": 1.0, "large": 1.0})
    leaving = [submit(rig, [i], [0.9]) for i in range(2)]
    await asyncio.sleep(0.1)  # both slots are taken
    waiting = submit(rig, [9], [0.9])
    rig.gear("busy")
    answers = await asyncio.gather(*leaving, waiting)
    assert [ticket.gears for ticket in answers] == [["calm"], ["calm"], ["busy"]]
    assert [ticket.label.tolist() for ticket in answers] == [[0], [1], [109]]


async def test_a_split_request_names_every_gear_its_rows_left_in() -> None:
    document = plan_document()
    document["families"]["family"]["gears"][1]["ladder_entry"] = "reference"
    rig = await make_rig(document, busy_s={"small": 1.0, "large": 1.0})
    future = submit(rig, [7] * 160, [0.9] * 160)  # 64 and 64 leave, 32 wait
    rig.gear("busy")
    ticket = await future
    assert ticket.gears == ["calm", "busy"]
    assert sorted(ticket.label.tolist()) == [7] * 128 + [107] * 32


async def test_bound_rows_keep_their_gear_through_the_cascade() -> None:
    document = plan_document()
    document["families"]["family"]["gears"][1]["ladder_entry"] = "reference"
    rig = await make_rig(document, busy_s={"small": 1.0})
    ticket = submit(rig, [1], [0.1])
    await asyncio.sleep(0.5)
    rig.gear("busy")
    answer = await ticket
    assert (answer.gears, answer.stage.tolist()) == (["calm"], [1])


async def test_a_row_is_refused_at_its_deadline_and_not_later(looptime: float) -> None:
    rig = await make_rig(busy_s={"small": 10.0})
    with pytest.raises(DeadlineExceeded):
        await submit(rig, [1], [0.9], timeout_s=0.7)
    assert looptime == pytest.approx(0.7, abs=0.01)


async def test_cancelled_requests_leave_no_rows_behind() -> None:
    rig = await make_rig(busy_s={"small": 1.0})
    running = [submit(rig, [i], [0.9]) for i in range(2)]
    await asyncio.sleep(0.1)
    abandoned = [submit(rig, [i], [0.9]) for i in range(50)]
    for future in abandoned:
        future.cancel()
    await asyncio.gather(*running)
    assert sum(call.rows for call in rig.fakes["a"].calls) == 2
    assert rig.orchestrator.dispatcher.open_tickets == 0


async def test_a_dead_endpoint_is_sent_nothing_more_and_its_rows_wait_for_their_deadline() -> None:
    rig = await make_rig(busy_s={"small": 1.0})
    future = submit(rig, [1], [0.9])
    await asyncio.sleep(0.5)
    rig.fakes["a"].down = True
    await asyncio.sleep(1.0)
    with pytest.raises(Unavailable, match="no endpoint serves"):
        await submit(rig, [1], [0.9])
    with pytest.raises(DeadlineExceeded):
        await future
    rig.fakes["a"].down = False
    await rig.probe()
    assert (await submit(rig, [1], [0.9])).label.tolist() == [1]


@pytest.mark.parametrize("comes_back", [True, False])
async def test_rows_whose_last_endpoint_died_wait_for_it_until_their_deadline(
    looptime: float, *, comes_back: bool
) -> None:
    rig = await make_rig(busy_s={"small": 0.01})
    futures = [submit(rig, [i], [0.9], timeout_s=20.0) for i in range(200)]
    rig.fakes["a"].down = True
    await asyncio.sleep(10.0)
    if comes_back:
        rig.fakes["a"].down = False
        await rig.probe()
    results = await asyncio.gather(*futures, return_exceptions=True)
    if comes_back:
        assert [result.label.tolist() for result in results if not isinstance(result, BaseException)] == [
            [i] for i in range(200)
        ]
    else:
        assert all(isinstance(result, DeadlineExceeded) for result in results)
    assert looptime <= 20.1


async def test_a_batch_answered_with_an_error_fails_only_its_own_rows() -> None:
    rig = await make_rig()
    rig.fakes["a"].reject = "out of memory"
    with pytest.raises(InternalError, match="out of memory"):
        await submit(rig, [1], [0.9])
    rig.fakes["a"].reject = ""
    assert (await submit(rig, [1], [0.9])).label.tolist() == [1]
    assert rig.orchestrator.dispatcher.endpoints[0].in_flight == 0


async def test_work_in_flight_returns_to_zero() -> None:
    rig = await make_rig(names=("a", "b"), busy_s={"small": 0.01, "large": 0.02})
    generator = np.random.default_rng(0)
    futures = [submit(rig, [i], [float(generator.random())]) for i in range(500)]
    await asyncio.gather(*futures)
    for endpoint in rig.orchestrator.dispatcher.endpoints:
        assert endpoint.in_flight == 0
        assert endpoint.work_s == pytest.approx(0.0, abs=1e-9)
    assert all(rig.orchestrator.dispatcher.queued_rows(model) == 0 for model in ("small", "large"))


async def test_every_request_gets_exactly_one_answer_while_gears_and_endpoints_change() -> None:
    rig = await make_rig(names=("a", "b"), busy_s={"small": 0.003, "large": 0.01})
    generator = np.random.default_rng(1)
    futures = []
    for i in range(600):
        size = int(generator.integers(1, 9))
        futures.append(submit(rig, [i] * size, generator.random(size).tolist(), timeout_s=1.0))
        await asyncio.sleep(float(generator.exponential(0.002)))
        if i % 37 == 0:
            rig.gear(["calm", "busy"][i % 2])
        if i % 101 == 50:
            rig.fakes["ab"[i % 2]].down ^= True
            await rig.probe()
    results = await asyncio.gather(*futures, return_exceptions=True)
    answered = 0
    for i, result in enumerate(results):
        if isinstance(result, Unavailable | DeadlineExceeded):
            continue
        if isinstance(result, InternalError):
            # an endpoint went down just when the row was tried alone
            assert "crashed it, alone" in str(result)
            continue
        assert not isinstance(result, BaseException), result
        answered += 1
        expected = np.where(result.certainty >= 0.5, i, i + 100)
        np.testing.assert_array_equal(result.label, expected)
    assert answered > 300
    assert rig.orchestrator.dispatcher.open_tickets == 0


async def test_close_refuses_what_waits_and_lets_batches_in_flight_finish() -> None:
    rig = await make_rig(busy_s={"small": 1.0})
    futures = [submit(rig, [i], [0.9]) for i in range(200)]
    await asyncio.sleep(0.1)
    await rig.orchestrator.close()
    results = await asyncio.gather(*futures, return_exceptions=True)
    assert [result.label.tolist() for result in results[:2] if not isinstance(result, BaseException)] == [[0], [1]]
    assert all(isinstance(result, Unavailable) for result in results[2:])


async def test_close_does_not_wait_for_a_batch_that_hangs(looptime: float) -> None:
    rig = await make_rig(busy_s={"small": 1000.0})
    future = submit(rig, [1], [0.9], timeout_s=2000.0)
    await asyncio.sleep(0.1)
    await rig.orchestrator.close()
    with pytest.raises(InternalError):
        await future
    assert looptime < 10


async def test_under_overload_the_rows_that_are_served_are_answered_in_time() -> None:
    """First in, first out would serve rows that expire on the way: goodput 0."""
    document = plan_document()
    document["families"]["family"]["models"]["small"]["busy_s"] = [[1, 0.1], [64, 0.1]]
    document["families"]["family"]["gears"][0]["triggers"] = {
        "small": {"min_batch": 1, "max_batch": 4, "max_wait_s": 0.0}
    }
    rig = await make_rig(document, busy_s={"small": 0.1})
    rig.orchestrator.dispatcher.endpoints[0].slots = 1
    fake = rig.fakes["a"]
    fake.serial = True  # 40 rows per second
    futures = []
    for _ in range(600):
        futures.append(submit(rig, [1], [0.9], timeout_s=0.63))
        await asyncio.sleep(1 / 80)
    results = await asyncio.gather(*futures, return_exceptions=True)
    answered = sum(not isinstance(result, BaseException) for result in results)
    executed = sum(call.rows for call in fake.calls)
    assert answered > 0.4 * len(results)
    assert answered > 0.95 * executed


async def test_a_patient_row_does_not_hold_up_those_behind_it() -> None:
    document = plan_document()
    other = document["families"]["family"] | {
        "models": {"third": document["families"]["family"]["models"]["small"]},
        "reference_model": "third",
        "ladder": [{"name": "third", "stages": [{"model": "third"}], "reach": [1.0]}],
        "gears": [
            {"name": f"other-{layout}", "layout": layout, "min_rate_per_s": 0, "max_rate_per_s": rate,
             "ladder_entry": "third"}
            for layout, rate in (("narrow", 1000), ("broad", 4000))
        ],
    }  # fmt: skip
    document["families"]["other"] = other
    for layout in document["layouts"]:
        layout["instances"]["a"]["third"] = 1
    rig = await make_rig(document, busy_s={"small": 0.05, "third": 0.05})
    rig.fakes["a"].instances["third"] = 1
    rig.fakes["a"].serial = True
    await rig.probe()
    dispatcher = rig.orchestrator.dispatcher
    hurried = []

    async def hurry() -> None:
        for _ in range(100):
            hurried.append(
                dispatcher.submit(dispatcher.families["other"], [rows([1], [0.9])], timeout_s=2.0, want_scores=False)
            )
            await asyncio.sleep(0.03)

    task = asyncio.create_task(hurry())
    await asyncio.sleep(0.2)
    patient = submit(rig, [1], [0.9], timeout_s=3600.0)
    behind = [submit(rig, [2], [0.9], timeout_s=2.9) for _ in range(10)]
    answers = await asyncio.gather(*behind)
    assert [answer.label.tolist() for answer in answers] == [[2]] * 10
    await patient
    await task
    await asyncio.gather(*hurried, return_exceptions=True)


async def test_a_late_failure_of_an_earlier_life_does_not_take_a_server_out() -> None:
    rig = await make_rig(busy_s={"small": 5.0})
    fake = rig.fakes["a"]
    future = submit(rig, [1], [0.9], timeout_s=20.0)
    await asyncio.sleep(1.0)
    for fake.down in (True, False):
        await rig.probe()
    await asyncio.sleep(1.0)
    assert rig.orchestrator.dispatcher.endpoints[0].up
    assert (await future).label.tolist() == [1]
