from __future__ import annotations

import asyncio
import math
import time
from typing import TYPE_CHECKING, Any

import pytest

from cascadeserve.errors import Overloaded, RequestError
from cascadeserve.policy.admission import LOOK_S
from orchestrator.entry import Ahead, Entry
from orchestrator.wire.tensors import InferRequest, Tensor
from tests.fakes.tiny import plan_document, rows
from tests.orchestrator.conftest import Rig, make_rig

if TYPE_CHECKING:
    from orchestrator.wire.tensors import InferResponse, Parameter

pytestmark = pytest.mark.looptime

SLO_S = 0.5


def door() -> tuple[Entry, list[tuple[str, int]]]:
    refused: list[tuple[str, int]] = []
    entry = Entry(on_refusal=lambda family, count: refused.append((family, count)), on_lag=lambda _: None)
    return entry, refused


def admitted(entry: Entry, times: int) -> int:
    let_in = 0
    for _ in range(times):
        try:
            entry.admit("family")
        except Overloaded:
            continue
        let_in += 1
    return let_in


async def test_a_family_of_which_nothing_is_known_is_let_in() -> None:
    entry, _ = door()
    assert admitted(entry, 1000) == 1000


async def test_how_long_answers_are_waited_for() -> None:
    entry, _ = door()
    assert entry.default_deadline_s("family") == math.inf
    entry.show({"family": Ahead(slo_s=SLO_S, own_s=0.1 * SLO_S, surge_slos=4.0, wait_s=0.0, row_s=0.125)})
    assert entry.default_deadline_s("family") == 4 * SLO_S


async def test_between_two_looks_what_is_let_in_counts() -> None:
    entry, refused = door()
    entry.show({"family": Ahead(slo_s=SLO_S, own_s=0.1 * SLO_S, surge_slos=4.0, wait_s=0.0, row_s=0.125)})
    # to the default deadline of 4 SLOs: a surge is not refused what can still be served
    assert admitted(entry, 50) == 17
    assert refused == [("family", 1)] * 33


async def test_what_could_not_be_read_is_counted_with_the_usual_rows() -> None:
    entry, refused = door()
    entry.unread("family")
    entry.show({"family": Ahead(slo_s=SLO_S, own_s=0.1 * SLO_S, surge_slos=4.0, wait_s=0.0, row_s=0.1)})
    for _ in range(1000):
        entry.took("family", 4)
    entry.unread("family")
    assert refused == [("family", 1), ("family", pytest.approx(4))]


async def test_requests_count_as_many_rows_as_they_usually_have() -> None:
    entry, refused = door()
    entry.show({"family": Ahead(slo_s=SLO_S, own_s=0.1 * SLO_S, surge_slos=4.0, wait_s=0.0, row_s=0.1)})
    for _ in range(1000):
        entry.took("family", 4)
    assert admitted(entry, 50) == 6
    assert refused[0] == ("family", pytest.approx(4))


async def test_of_a_standing_backlog_less_than_an_slo_is_let_in_until_it_is_gone() -> None:
    entry, _ = door()
    entry.show({"family": Ahead(slo_s=SLO_S, own_s=0.1 * SLO_S, surge_slos=4.0, wait_s=1.5 * SLO_S, row_s=0.0)})
    assert admitted(entry, 1) == 1
    await asyncio.sleep(0.4)
    assert admitted(entry, 1) == 0
    entry.show({"family": Ahead(slo_s=SLO_S, own_s=0.1 * SLO_S, surge_slos=4.0, wait_s=0.85 * SLO_S, row_s=0.0)})
    assert admitted(entry, 1) == 0
    entry.show({"family": Ahead(slo_s=SLO_S, own_s=0.1 * SLO_S, surge_slos=4.0, wait_s=0.75 * SLO_S, row_s=0.0)})
    assert admitted(entry, 1) == 1
    entry.show({"family": Ahead(slo_s=SLO_S, own_s=0.1 * SLO_S, surge_slos=4.0, wait_s=0.2 * SLO_S, row_s=0.0)})
    assert admitted(entry, 1) == 1
    entry.show({"family": Ahead(slo_s=SLO_S, own_s=0.1 * SLO_S, surge_slos=4.0, wait_s=1.5 * SLO_S, row_s=0.0)})
    assert admitted(entry, 1) == 1


async def test_the_client_is_told_when_to_come_again() -> None:
    entry, _ = door()
    entry.show({"family": Ahead(slo_s=SLO_S, own_s=0.1 * SLO_S, surge_slos=4.0, wait_s=10.0, row_s=0.0)})
    with pytest.raises(Overloaded, match="so much work waits for 'family'") as caught:
        entry.admit("family")
    assert caught.value.retry_after_s == pytest.approx(8.0)


async def overload(rig: Rig, rate_per_s: float, duration_s: float, *, important: int = 0) -> list[str]:
    """Requests as the transports carry them; the outcome of each.

    The last `important` of every twenty are important.
    """
    loop = asyncio.get_running_loop()
    plane = rig.orchestrator.data_plane
    outcomes: list[str] = []

    async def one(parameters: dict[str, Parameter]) -> None:
        began_s = loop.time()
        beginning, which = str(parameters).encode(), "important " * bool(parameters)
        try:
            admitted = plane.admit("family", "", beginning)
            tensor = Tensor("x", "FP32", rows([1], [0.9]))
            await plane.infer(InferRequest("family", [tensor], parameters=parameters, admitted=admitted))
        except RequestError as error:
            outcomes.append(which + type(error).__name__)
        else:
            outcomes.append(which + ("in time" if loop.time() - began_s <= SLO_S else "late"))

    tasks = []
    for number in range(round(rate_per_s * duration_s)):
        parameters: dict[str, Parameter] = {"priority": 1} if number % 20 >= 20 - important else {}
        tasks.append(asyncio.create_task(one(parameters)))
        await asyncio.sleep(1 / rate_per_s)
    await asyncio.gather(*tasks)
    return outcomes


def slow_document() -> dict[str, Any]:
    """40 rows per second, in whatever gear."""
    document = plan_document()
    family = document["families"]["family"]
    family["models"]["small"]["busy_s"] = [[1, 0.1], [64, 0.1]]
    for gear in family["gears"]:
        gear["triggers"] = {"small": {"min_batch": 1, "max_batch": 4, "max_wait_s": 0.0}}
    return document


@pytest.mark.parametrize("times", [2, 10])
async def test_under_overload_goodput_stays_and_what_is_let_in_is_in_time(times: int) -> None:
    rig = await make_rig(slow_document(), busy_s={"small": 0.1})
    rig.fakes["a"].serial = True
    looking = asyncio.create_task(rig.orchestrator.entry.run(rig.orchestrator.show_entry))
    outcomes = await overload(rig, times * 40.0, 30.0)
    looking.cancel()
    answered = outcomes.count("in time") + outcomes.count("late")
    assert outcomes.count("in time") > 0.85 * 40 * 30
    assert outcomes.count("late") < 0.1 * answered
    assert outcomes.count("DeadlineExceeded") < 0.02 * len(outcomes)
    assert outcomes.count("Overloaded") > 0.4 * len(outcomes)
    counted = rig.orchestrator.metrics.registry.get_sample_value(
        "cascadeserve_requests_total", {"family": "family", "outcome": "Overloaded"}
    )
    assert counted == outcomes.count("Overloaded")


async def test_under_overload_important_requests_are_not_refused_for_what_they_overtake() -> None:
    rig = await make_rig(slow_document(), busy_s={"small": 0.1})
    rig.fakes["a"].serial = True
    looking = asyncio.create_task(rig.orchestrator.entry.run(rig.orchestrator.show_entry))
    # five times the capacity; the important ones alone are half of it
    outcomes = await overload(rig, 200.0, 20.0, important=2)
    looking.cancel()
    important = [outcome for outcome in outcomes if outcome.startswith("important")]
    assert len(important) == 400
    # but at first, behind what was let in before the backlog stood
    assert important.count("important in time") > 0.9 * len(important)
    assert outcomes.count("in time") > 0.35 * 40 * 20
    assert outcomes.count("Overloaded") > 0.7 * 3600


async def test_of_important_requests_no_more_are_let_in_than_can_be_answered() -> None:
    rig = await make_rig(slow_document(), busy_s={"small": 0.1})
    rig.fakes["a"].serial = True
    looking = asyncio.create_task(rig.orchestrator.entry.run(rig.orchestrator.show_entry))
    outcomes = await overload(rig, 200.0, 20.0, important=20)
    looking.cancel()
    assert outcomes.count("important in time") > 0.85 * 40 * 20
    assert outcomes.count("important late") + outcomes.count("important DeadlineExceeded") < 0.05 * len(outcomes)


async def test_what_says_priority_and_is_not_important_is_refused_once_it_is_read() -> None:
    rig = await make_rig()
    plane, loop = rig.orchestrator.data_plane, rig.orchestrator.gear_loop
    ahead = Ahead(slo_s=SLO_S, own_s=0.1 * SLO_S, surge_slos=4.0, wait_s=10.0, row_s=0.0)
    rig.orchestrator.entry.show({"family": ahead})
    with pytest.raises(Overloaded):
        plane.admit("family", "", b'{"id":"a","inputs":[')
    tensor = Tensor("x", "FP32", rows([1, 2], [0.9, 0.9]))
    for parameters in ({}, {"priority": 0}, {"priority": 2}, {"priority": 5}):
        assert plane.admit("family", "", b'{"parameters":{"priority":') is False
        with pytest.raises(Overloaded, match="so much work waits for 'family'") as caught:
            await plane.infer(InferRequest("family", [tensor], parameters=parameters, admitted=False))
        assert caught.value.retry_after_s == pytest.approx(8.0)
    sample = rig.orchestrator.metrics.registry.get_sample_value
    labels = {"family": "family", "outcome": "Overloaded"}
    assert sample("cascadeserve_requests_total", labels) == 5
    assert loop._loads["family"].window._rows_before[-1] == 1 + 4 * 2
    assert await plane.infer(InferRequest("family", [tensor], parameters={"priority": 1}, admitted=False))


async def test_a_request_with_less_time_than_it_would_wait_is_refused_when_it_is_read() -> None:
    rig = await make_rig(slow_document(), busy_s={"small": 0.1})
    rig.fakes["a"].serial = True
    plane = rig.orchestrator.data_plane
    began_s = asyncio.get_running_loop().time()

    def ask(**parameters: Parameter) -> asyncio.Task[InferResponse]:
        tensor = Tensor("x", "FP32", rows([1], [0.9]))
        return asyncio.create_task(plane.infer(InferRequest("family", [tensor], parameters=parameters)))

    waiting = [ask() for _ in range(20)]
    await asyncio.sleep(0)
    short, long, important = ask(timeout=200_000), ask(timeout=1_500_000), ask(timeout=400_000, priority=1)
    with pytest.raises(Overloaded, match="what waits already takes longer than this request may") as refused:
        await short
    assert (asyncio.get_running_loop().time(), refused.value.retry_after_s > 0.0) == (began_s, True)
    await asyncio.gather(*waiting, long, important)


async def test_demand_is_what_comes_not_what_is_let_in() -> None:
    rig = await make_rig()
    ahead = Ahead(slo_s=SLO_S, own_s=0.1 * SLO_S, surge_slos=4.0, wait_s=60.0, row_s=0.0)
    rig.orchestrator.entry.show({"family": ahead})
    for _ in range(20):
        for _ in range(30):
            with pytest.raises(Overloaded):
                rig.orchestrator.data_plane.admit("family", "")
            await asyncio.sleep(0.1 / 30)
        rig.orchestrator.gear_loop.tick(asyncio.get_running_loop().time())
    assert rig.orchestrator.gear_loop.demands_per_s()["family"] == pytest.approx(300, rel=0.1)
    assert rig.family.gear.name == "busy"


@pytest.mark.looptime(False)
async def test_a_late_loop_counts_as_waited_time() -> None:
    entry, _ = door()
    running = asyncio.create_task(
        entry.run(lambda: entry.show({"family": Ahead(slo_s=0.02, own_s=0.0, surge_slos=2.0, wait_s=0.0, row_s=0.0)}))
    )
    await asyncio.sleep(5 * LOOK_S)
    assert admitted(entry, 1) == 1
    time.sleep(0.3)  # noqa: ASYNC251 - the loop is busy with something else
    assert entry.lag_s() > 0.25
    assert admitted(entry, 1) == 0
    await asyncio.sleep(5 * LOOK_S)
    assert entry.lag_s() < 0.1
    running.cancel()
