"""What single requests ask for: another way through the cascade, another place in the queue, an answer in time."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest

from cascadeserve.errors import DeadlineExceeded, InvalidRequest, Unavailable
from orchestrator.backend import ModelVersion
from orchestrator.request_options import RequestOptions
from orchestrator.rows import Ticket
from orchestrator.wire.tensors import InferRequest, InferResponse, RequestedOutput, Tensor
from tests.fakes.tiny import plan_document, rows
from tests.orchestrator.conftest import Rig, make_rig

pytestmark = pytest.mark.looptime


def certified_document() -> dict[str, Any]:
    document = plan_document()
    document["families"]["family"]["ladder"][1]["epsilon"] = 0.004
    return document


async def ask(rig: Rig, labels: list[int], certainties: list[float], **parameters: Any) -> InferResponse:
    request = InferRequest(
        model_name="family",
        inputs=[Tensor("x", "FP32", rows(labels, certainties))],
        parameters=parameters,
        outputs=[RequestedOutput("label"), RequestedOutput("stage")],
    )
    return await rig.orchestrator.data_plane.infer(request)


def flat(response: InferResponse) -> tuple[list[int], list[int], Any]:
    label, stage = (output.array.ravel().tolist() for output in response.outputs)
    return label, stage, response.parameters["certified"]


def cut_rows(rig: Rig) -> float:
    registry = rig.orchestrator.metrics.registry
    return registry.get_sample_value("cascadeserve_rows_cut_short_total", {"family": "family"}) or 0.0


# -- overrides --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parameters", "label", "stage", "certified"),
    [
        ({}, [1, 2, 103], [0, 0, 1], True),
        # against itself the reference model loses nothing
        ({"cascade_reference": True}, [101, 102, 103], [0, 0, 0], True),
        ({"cascade_max_stage": 0}, [1, 2, 3], [0, 0, 0], False),
        ({"cascade_max_stage": 1}, [1, 2, 103], [0, 0, 1], True),
        ({"cascade_min_certainty": 0.8}, [1, 102, 103], [0, 1, 1], False),
        # no more than the cascade asks for
        ({"cascade_min_certainty": 0.3}, [1, 2, 103], [0, 0, 1], True),
        ({"cascade_min_certainty": 0.8, "cascade_max_stage": 0}, [1, 2, 3], [0, 0, 0], False),
    ],
)
async def test_a_request_may_go_another_way(
    parameters: dict[str, Any], label: list[int], stage: list[int], certified: bool
) -> None:
    rig = await make_rig(certified_document())
    response = await ask(rig, [1, 2, 3], [0.9, 0.6, 0.1], **parameters)
    assert flat(response) == (label, stage, certified)
    assert response.parameters["gear"] == "calm"
    assert cut_rows(rig) == 0


async def test_others_in_the_same_batch_go_their_own_way() -> None:
    rig = await make_rig(certified_document(), busy_s={"small": 0.1})
    first = [asyncio.create_task(ask(rig, [9], [0.9])) for _ in range(2)]
    await asyncio.sleep(0.05)
    answers = [
        asyncio.create_task(ask(rig, [1, 2], [0.9, 0.6], **parameters))
        for parameters in ({}, {"cascade_max_stage": 0}, {"cascade_min_certainty": 0.7})
    ]
    assert [flat(await answer) for answer in answers] == [
        ([1, 2], [0, 0], True),
        ([1, 2], [0, 0], False),
        ([1, 102], [0, 1], False),
    ]
    await asyncio.gather(*first)
    assert [call.rows for call in rig.fakes["a"].calls if call.model == "small"] == [1, 1, 6]


async def test_the_reference_model_is_asked_whatever_gear_is_in_force_when_the_row_leaves() -> None:
    rig = await make_rig(certified_document(), busy_s={"small": 0.1, "large": 0.1})
    waiting = [asyncio.create_task(ask(rig, [9], [0.9])) for _ in range(2)]
    await asyncio.sleep(0.05)
    reference = asyncio.create_task(ask(rig, [1], [0.9], cascade_reference=True))
    await asyncio.sleep(0)
    rig.gear("busy")
    assert flat(await reference) == ([101], [0], True)
    await asyncio.gather(*waiting)


async def test_where_the_reference_model_does_not_stand_it_cannot_be_asked_alone() -> None:
    document = plan_document()
    family = document["families"]["family"]
    family["ladder"].append({"name": "small", "stages": [{"model": "small"}], "reach": [1.0]})
    family["gears"][0]["ladder_entry"] = "small"
    rig = await make_rig(document, instances={"small": 1})
    assert flat(await ask(rig, [1], [0.1]))[0] == [1]
    with pytest.raises(Unavailable, match="no endpoint serves model 'large'"):
        await ask(rig, [1], [0.1], cascade_reference=True)


async def test_the_work_of_rows_reaches_their_ticket() -> None:
    rig = await make_rig(busy_s={"small": 1.0})
    answer = asyncio.create_task(ask(rig, [1, 2], [0.9, 0.9], work="3,5"))
    await asyncio.sleep(0.5)
    (batch,) = rig.orchestrator.dispatcher.flights.batches
    assert batch.segments[0].ticket.work_per_row == 4.0
    await answer


# -- priority ---------------------------------------------------------------------------------------------------


async def in_order(rig: Rig, priorities: list[int], *, apart_s: float = 0.0) -> list[int]:
    """Send rows while all slots are taken, of labels 0, 1, ...; the labels as they are answered, one per batch."""
    answered: list[int] = []

    async def one(label: int, priority: int) -> None:
        response = await ask(rig, [label], [0.9], priority=priority, timeout=3_600_000_000)
        answered.append(int(response.outputs[0].array[0, 0]))

    filling = [asyncio.create_task(ask(rig, [9], [0.9], timeout=3_600_000_000)) for _ in range(2)]
    await asyncio.sleep(0.01)
    tasks = []
    for label, priority in enumerate(priorities):
        tasks.append(asyncio.create_task(one(label, priority)))
        await asyncio.sleep(apart_s)
    await asyncio.gather(*filling, *tasks)
    return answered


def one_by_one() -> dict[str, Any]:
    document = plan_document()
    document["families"]["family"]["gears"][0]["triggers"] = {
        "small": {"min_batch": 1, "max_batch": 1, "max_wait_s": 0.0}
    }
    return document


async def test_important_rows_go_first_and_others_in_order_of_arrival() -> None:
    rig = await make_rig(one_by_one(), busy_s={"small": 0.1})
    assert await in_order(rig, [0, 3, 2, 1, 0, 1, 7]) == [3, 5, 0, 2, 4, 1, 6]


async def test_what_has_waited_long_enough_is_not_overtaken() -> None:
    rig = await make_rig(one_by_one(), busy_s={"small": 2.0})
    rig.fakes["a"].serial = True
    # one level is worth one SLO of 0.5 s
    assert await in_order(rig, [0, 0, 0, 0, 1], apart_s=0.2) == [0, 1, 4, 2, 3]


async def test_an_important_row_does_not_wait_for_a_full_batch(looptime: float) -> None:
    rig = await make_rig()
    rig.gear("busy")
    waiting = asyncio.create_task(ask(rig, [1], [0.9]))
    await asyncio.sleep(0.001)
    await ask(rig, [2], [0.9], priority=1)
    await waiting
    assert looptime < 0.005
    assert [call.rows for call in rig.fakes["a"].calls] == [2]


# -- in time ----------------------------------------------------------------------------------------------------


def slow_large() -> dict[str, Any]:
    document = certified_document()
    document["families"]["family"]["models"]["large"]["busy_s"] = [[1, 0.4], [64, 0.4]]
    return document


async def test_a_row_that_the_next_stage_cannot_answer_in_time_keeps_its_answer(looptime: float) -> None:
    rig = await make_rig(slow_large(), busy_s={"small": 0.1, "large": 0.4})
    response = await ask(rig, [1, 2], [0.9, 0.1], timeout=450_000)
    assert flat(response) == ([1, 2], [0, 0], False)
    assert looptime == pytest.approx(0.1, abs=0.01)
    assert cut_rows(rig) == 1
    assert [call.model for call in rig.fakes["a"].calls] == ["small"]


async def test_a_row_that_can_be_in_time_goes_on() -> None:
    rig = await make_rig(slow_large(), busy_s={"small": 0.1, "large": 0.4})
    assert flat(await ask(rig, [1, 2], [0.9, 0.1], timeout=550_000)) == ([1, 102], [0, 1], True)
    assert cut_rows(rig) == 0


async def test_of_many_rows_only_those_go_on_that_can_be_in_time() -> None:
    document = slow_large()
    document["families"]["family"]["gears"][0]["triggers"] = {
        "large": {"min_batch": 1, "max_batch": 1, "max_wait_s": 0.0}
    }
    rig = await make_rig(document, busy_s={"small": 0.0, "large": 0.2})
    label, stage, certified = flat(await ask(rig, [1, 2, 3, 4, 5], [0.1] * 5, timeout=1_300_000))
    # each row waits for those before it: 0.4 s each
    assert (label, stage, certified) == ([101, 102, 103, 4, 5], [1, 1, 1, 0, 0], False)
    assert cut_rows(rig) == 2


async def test_what_waits_for_its_next_stage_until_it_is_too_late_keeps_its_answer(looptime: float) -> None:
    """By the plan it would have been in time, but the batches before it take longer."""
    rig = await make_rig(certified_document(), busy_s={"large": 1.0})
    dispatcher = rig.orchestrator.dispatcher
    dispatcher.limit_in_flight(dispatcher.endpoints[0], ModelVersion("large", 1), 1)
    hog = asyncio.create_task(ask(rig, [9], [0.1], timeout=5_000_000))
    await asyncio.sleep(0.01)
    response = await ask(rig, [1], [0.1], timeout=300_000)
    assert flat(response) == ([1], [0], False)
    assert looptime == pytest.approx(0.31, abs=0.01)
    assert cut_rows(rig) == 1
    assert flat(await hog)[0] == [109]
    assert dispatcher.open_tickets == 0


async def test_a_row_in_flight_at_its_deadline_keeps_its_answer_and_a_later_one_is_ignored() -> None:
    rig = await make_rig(certified_document(), busy_s={"large": 1.0})
    response = await ask(rig, [1, 2], [0.1, 0.9], timeout=300_000)
    assert flat(response) == ([1, 2], [0, 0], False)
    await asyncio.sleep(2.0)
    np.testing.assert_array_equal(response.outputs[0].array, [[1], [2]])
    assert rig.orchestrator.dispatcher.endpoints[0].in_flight == 0


async def test_a_request_with_a_row_that_has_no_answer_is_refused_at_its_deadline() -> None:
    document = one_by_one()
    rig = await make_rig(document, busy_s={"small": 0.2, "large": 1.0})
    rig.orchestrator.dispatcher.endpoints[0].slots = 1
    with pytest.raises(DeadlineExceeded):
        await ask(rig, [1, 2, 3, 4], [0.1] * 4, timeout=300_000)
    assert cut_rows(rig) == 0


@pytest.mark.parametrize(("others", "one"), [({}, {"priority": 1}), ({}, {"work": 0.1}), ({}, {"timeout": 60_000_000})])
async def test_what_goes_on_before_others_is_not_kept_back_for_them(
    others: dict[str, Any], one: dict[str, Any]
) -> None:
    document = certified_document()
    document["families"]["family"]["models"]["large"] |= {"max_batch": 1, "busy_s": [[1, 0.4]]}
    rig = await make_rig(document, busy_s={"small": 0.001, "large": 0.4})
    rig.fakes["a"].serial = True
    waiting = [asyncio.create_task(ask(rig, [i], [0.1], **{"timeout": 60_000_000} | others)) for i in range(10)]
    await asyncio.sleep(0.1)
    assert flat(await ask(rig, [50], [0.1], **{"timeout": 2_500_000} | one)) == ([150], [1], True)
    await asyncio.gather(*waiting)


async def test_the_reference_alone_ranks_by_its_own_work() -> None:
    rig = await make_rig(busy_s={"small": 0.001, "large": 0.002})
    queues, future = rig.family.queues, asyncio.get_running_loop().create_future()

    def rank_s(model: str, options: RequestOptions) -> float:
        inputs = [rows([1], [0.9])]
        ticket = Ticket(inputs, arrived_s=0.0, deadline_s=60.0, num_classes=None, future=future, options=options)
        return queues[model].rank_s(ticket)

    assert rank_s("large", RequestOptions(reference=True)) > rank_s("small", RequestOptions())


async def test_clients_that_are_not_trusted_may_claim_no_work() -> None:
    rig = await make_rig(max_work=1.0)
    with pytest.raises(InvalidRequest, match="no row may claim more than 1; start the server with a higher --max-work"):
        await ask(rig, [1, 2], [0.9, 0.9], work="1,8")
    assert flat(await ask(rig, [1, 2], [0.9, 0.9], work="1,0.5"))[0] == [1, 2]
