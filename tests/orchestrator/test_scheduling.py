"""What a plan's scheduling does in the dispatcher; tests/parity holds every combination against the simulator."""

from __future__ import annotations

import asyncio
import copy
from typing import TYPE_CHECKING, Any

import pytest

from cascadeserve.errors import DeadlineExceeded, Unavailable
from orchestrator.request_options import RequestOptions
from orchestrator.routing import work_there_s
from tests.fakes.tiny import plan_document, rows
from tests.orchestrator.conftest import Rig, make_rig

if TYPE_CHECKING:
    from orchestrator.rows import Ticket

pytestmark = pytest.mark.looptime


def submit(
    rig: Rig, label: int, *, family: str = "family", work: float = 1.0, timeout_s: float = 500.0
) -> asyncio.Future[Ticket]:
    return rig.orchestrator.dispatcher.submit(
        rig.orchestrator.dispatcher.families[family],
        [rows([label], [0.9])],
        timeout_s=timeout_s,
        want_scores=False,
        options=RequestOptions(work_per_row=work),
    )


def document(**scheduling: str) -> dict[str, Any]:
    """Batches of one row, which take a second, and an SLO that is far longer."""
    found = plan_document() | {"scheduling": scheduling}
    family = found["families"]["family"]
    family["slo_s"] = 100.0
    family["models"]["small"] |= {"max_batch": 1, "busy_s": [[1, 1.0]]}
    return found


async def order_of_answers(rig: Rig, works: list[float]) -> list[int]:
    answered: list[int] = []
    futures = []
    for label, work in enumerate(works):
        future = submit(rig, label, work=work)
        future.add_done_callback(lambda done: answered.append(done.result().label[0]))
        futures.append(future)
    await asyncio.gather(*futures)
    return answered


async def test_little_work_goes_before_much_and_without_that_order_it_does_not() -> None:
    # two leave at once
    works = [1.0, 1.0, 3.0, 1.0, 2.0]
    rig = await make_rig(document(order="least_remaining_work"), busy_s={"small": 1.0})
    assert await order_of_answers(rig, works) == [0, 1, 3, 4, 2]
    rig = await make_rig(document(order="fifo"), busy_s={"small": 1.0})
    assert await order_of_answers(rig, works) == [0, 1, 2, 3, 4]


async def test_a_request_that_cannot_be_answered_in_time_is_refused_when_it_comes() -> None:
    rig = await make_rig(document(admission="predicted_work"), busy_s={"small": 1.0})
    waiting = [submit(rig, label) for label in range(6)]
    too_late = submit(rig, 9, timeout_s=5.0)
    assert isinstance(too_late.exception(), Unavailable)
    in_time = submit(rig, 8, timeout_s=20.0)
    assert [ticket.label[0] for ticket in await asyncio.gather(*waiting, in_time)] == [0, 1, 2, 3, 4, 5, 8]


async def test_more_work_ahead_is_more_time_ahead() -> None:
    rig = await make_rig(document(admission="predicted_work", order="fifo"), busy_s={"small": 1.0})
    futures = [submit(rig, 0), submit(rig, 1), submit(rig, 2, work=10.0)]
    assert rig.orchestrator.dispatcher.queued_work_s(rig.family) >= 10.0
    late = submit(rig, 3, timeout_s=11.0)
    assert isinstance(late.exception(), Unavailable)
    await asyncio.gather(*futures)


async def hosting(found: dict[str, Any], models: dict[str, list[str]]) -> Rig:
    """Endpoints with these models only; batches take a second."""
    rig = await make_rig(found, names=tuple(models), busy_s={"small": 1.0, "third": 1.0})
    for name, hosted in models.items():
        rig.fakes[name].instances = dict.fromkeys(hosted, 1)
    await rig.probe()
    return rig


def two_families() -> dict[str, Any]:
    """A second family, of the model `third`, with endpoint b to itself."""
    found = document(admission="predicted_work", order="fifo")
    other = found["families"]["other"] = copy.deepcopy(found["families"]["family"])
    other["models"] = {"third": other["models"]["small"]}
    other |= {"reference_model": "third", "ladder": [{"name": "alone", "stages": [{"model": "third"}], "reach": [1.0]}]}
    for gear in other["gears"]:
        gear["ladder_entry"] = "alone"
        gear.pop("triggers", None)
    for layout in found["layouts"]:
        layout["instances"]["b"] = {"third": 1}
    return found


async def test_overload_of_a_family_does_not_refuse_what_other_endpoints_are_asked() -> None:
    rig = await hosting(two_families(), {"a": ["small", "large"], "b": ["third"]})
    crowd = [submit(rig, label) for label in range(100)]
    few = [submit(rig, label, family="other") for label in range(3)]
    # two in flight and one that waits, of a second each
    assert isinstance(submit(rig, 9, family="other", timeout_s=3.5).exception(), Unavailable)
    few.append(submit(rig, 3, family="other", timeout_s=4.5))
    assert [ticket.label[0] for ticket in await asyncio.gather(*few)] == [0, 1, 2, 3]
    await asyncio.gather(*crowd)


async def test_slots_of_other_endpoints_answer_nothing_sooner() -> None:
    rig = await hosting(two_families(), {"a": ["small", "large"], "b": ["third"]})
    waiting = [submit(rig, label) for label in range(6)]
    assert isinstance(submit(rig, 9, timeout_s=5.0).exception(), Unavailable)
    await asyncio.gather(*waiting)


@pytest.mark.parametrize(
    ("models", "small_s", "large_s"),
    [
        ({"a": ["small", "large"], "b": ["small", "large"]}, 1.0 + 0.3 * 0.01 / 64, 0.01 / 64),
        ({"a": ["small"], "b": ["large"]}, 1.0, 0.0),
        # which of them takes a row is open
        ({"a": ["small", "large"], "b": ["large"]}, 1.0 + 0.5 * 0.3 * 0.01 / 64, 0.5 * 0.01 / 64),
    ],
    ids=["both on both", "apart", "one on both"],
)
async def test_work_that_waits_is_counted_where_it_is_done(
    models: dict[str, list[str]], small_s: float, large_s: float
) -> None:
    rig = await hosting(document(), models)
    queues, endpoints = rig.family.queues, rig.orchestrator.dispatcher.endpoints
    small = queues["small"].model
    assert work_there_s(queues["small"], small, endpoints) == pytest.approx(small_s, rel=1e-9)
    assert work_there_s(queues["large"], small, endpoints) == pytest.approx(large_s, rel=1e-9)


async def test_rows_beyond_a_batch_are_work_ahead_for_all_slots() -> None:
    found = document(admission="predicted_work")
    found["layouts"][0]["instances"]["b"] = found["layouts"][0]["instances"]["a"]
    rig = await make_rig(found, names=("a", "b"), busy_s={"small": 1.0})

    def ask(count: int, timeout_s: float) -> asyncio.Future[Ticket]:
        return rig.orchestrator.dispatcher.submit(
            rig.family, [rows([7] * count, [0.9] * count)], timeout_s=timeout_s, want_scores=False
        )

    waiting = [ask(1, 100.0) for _ in range(5)]
    # 4 in flight, 1 waits: 10 rows in batches of one are done after 8 s by two slots; one batch of 10 would take 10
    assert isinstance(ask(10, 7.0).exception(), Unavailable)
    assert (await ask(10, 9.0)).rows == 10
    await asyncio.gather(*waiting)


async def test_rows_that_wait_further_on_are_ahead_too() -> None:
    found = document(admission="predicted_work")
    found["families"]["family"]["models"]["large"] |= {"max_batch": 1, "busy_s": [[1, 1.0]]}
    rig = await make_rig(found, busy_s={"large": 1.0})

    def ask(certainty: float, timeout_s: float) -> asyncio.Future[Ticket]:
        return rig.orchestrator.dispatcher.submit(
            rig.family, [rows([7], [certainty])], timeout_s=timeout_s, want_scores=False
        )

    waiting = [ask(0.1, 100.0) for _ in range(6)]
    await asyncio.sleep(0.1)
    assert rig.orchestrator.dispatcher.queued_rows("small") == 0
    assert rig.orchestrator.dispatcher.queued_rows("large") == 4
    assert isinstance(ask(0.9, 3.0).exception(), Unavailable)
    await asyncio.gather(*waiting)


async def test_without_admission_it_waits_until_its_deadline() -> None:
    rig = await make_rig(document(admission="none"), busy_s={"small": 1.0})
    waiting = [submit(rig, label) for label in range(6)]
    late = submit(rig, 9, timeout_s=3.5)
    await asyncio.sleep(3.4)
    assert not late.done()
    with pytest.raises(DeadlineExceeded):
        await late
    await asyncio.gather(*waiting)


async def test_round_robin_takes_turns_over_endpoints() -> None:
    rig = await make_rig(
        plan_document(("a", "b")) | {"scheduling": {"balancer": "round_robin"}}, names=("a", "b"), busy_s={"small": 0.1}
    )
    for label in range(6):
        await submit(rig, label)
    assert len(rig.fakes["a"].calls) == len(rig.fakes["b"].calls) == 3
