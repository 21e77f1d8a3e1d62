from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from cascadeserve.errors import Overloaded, RequestError
from cascadeserve.policy.admission import LOOK_S
from orchestrator.entry import Ahead, Entry
from orchestrator.wire.tensors import InferRequest, Tensor
from tests.fakes.tiny import plan_document, rows
from tests.orchestrator.conftest import Rig, make_rig

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


async def test_between_two_looks_what_is_let_in_counts() -> None:
    entry, refused = door()
    entry.show({"family": Ahead(slo_s=SLO_S, own_s=0.1 * SLO_S, surge_slos=4.0, wait_s=0.0, row_s=0.125)})
    # to the default deadline of 4 SLOs: a surge is not refused what can still be served
    assert admitted(entry, 50) == 17
    assert refused == [("family", 1)] * 33


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


async def overload(rig: Rig, rate_per_s: float, duration_s: float) -> list[str]:
    """Requests as the transports carry them; the outcome of each."""
    loop = asyncio.get_running_loop()
    plane = rig.orchestrator.data_plane
    outcomes: list[str] = []

    async def one() -> None:
        began_s = loop.time()
        try:
            plane.admit("family", "")
            await plane.infer(InferRequest("family", [Tensor("x", "FP32", rows([1], [0.9]))]))
        except RequestError as error:
            outcomes.append(type(error).__name__)
        else:
            outcomes.append("in time" if loop.time() - began_s <= SLO_S else "late")

    tasks = []
    for _ in range(round(rate_per_s * duration_s)):
        tasks.append(asyncio.create_task(one()))
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
