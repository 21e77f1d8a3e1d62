from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import pytest

from benchmarks import overload
from benchmarks.overload import Level, plan_document, read_level, summarise
from benchmarks.process_facts import cpu_s, find_process, peak_memory_bytes
from cascadeserve.artefacts import decode_json
from cascadeserve.errors import CascadeServeError
from cascadeserve.gear_plan import GearPlan
from cascadeserve.process import spawn, stop
from cascadeserve.report import Ledger, ServingReport

if TYPE_CHECKING:
    from pathlib import Path


def level(load: float, goodput_per_s: float, *, void: bool = False, memory_bytes: int = 100) -> Level:
    return Level(
        load=load, offered_per_s=load * 120.0, goodput_per_s=goodput_per_s, p95_s=0.1, refusal_p50_s=None, refused=0,
        failed=0, lost=0, generator_lag_p99_s=0.0, void=void, orchestrator_cpu_s=1e-4, peak_memory_bytes=memory_bytes,
    )  # fmt: skip


def test_the_plan_is_one() -> None:
    plan = decode_json(msgspec.json.encode(plan_document()), GearPlan)
    assert plan.families["digits"].max_rate_per_s("one") == overload.CAPACITY_PER_S


def test_goodput_is_compared_by_medians() -> None:
    levels = [level(1.0, 110.0), level(10.0, 80.0), level(1.0, 90.0), level(10.0, 95.0, memory_bytes=150)]
    levels += [level(1.3, 85.0), level(1.0, 100.0), level(10.0, 90.0, memory_bytes=170)]
    found = summarise(levels)
    assert found["goodput_kept"] == pytest.approx(0.9)
    assert found["least_goodput_kept"] == pytest.approx(0.85)
    assert found["memory_growth_bytes"] == 70
    assert found["worst_p95_of_slo"] == pytest.approx(0.5)


def test_a_late_generator_says_nothing() -> None:
    found = summarise([level(1.0, 110.0), level(10.0, 100.0, void=True)])
    assert (found["goodput_kept"], found["worst_p95_of_slo"], found["memory_growth_bytes"]) == (None, None, None)


def test_refusals_are_timed_from_when_they_were_sent() -> None:
    ledger = Ledger(sent=4, answered_correct=2, answered_wrong=0, refused=2, failed=0, lost=0, duplicated=0)
    report = ServingReport(
        schema_version=1, source="replay", duration_s=2.0, offered_rate_per_s=2.0, answered_rate_per_s=1.0, p50_s=0.1,
        p95_s=0.1, p99_s=0.1, slo_s=0.2, goodput=0.25, accuracy=None, rows_sent=4, stages=[], gears=[], ledger=ledger,
        generator_lag_p99_s=0.001, errors={},
    )  # fmt: skip
    records = {
        "outcome": np.array([1, 2, 2, 1]),
        "outcome_names": np.array(["unsent", "answered", "refused", "failed", "lost"]),
        "sent_s": np.array([0.0, 0.1, 0.2, 0.3]),
        "done_s": np.array([1.0, 0.11, 0.23, 1.0]),
    }
    found = read_level(2.0, report, records, used_s=0.004, memory_bytes=7)
    assert found.refusal_p50_s == pytest.approx(0.02)
    assert found.goodput_per_s == pytest.approx(0.5)
    assert found.orchestrator_cpu_s == pytest.approx(0.001)


async def test_a_process_is_found_by_its_arguments(tmp_path: Path) -> None:
    mark = str(tmp_path)
    with (tmp_path / "log").open("wb") as log:
        process = await spawn([sys.executable, "-c", "import time; time.sleep(60)", "wait", mark], log=log)
        try:
            assert find_process("wait", mark) == process.pid
            assert peak_memory_bytes(process.pid) > 0
            assert cpu_s(process.pid) >= 0.0
        finally:
            await stop(process, kill_after_s=5.0)
    with pytest.raises(CascadeServeError, match="0 processes"):
        find_process("wait", mark)


def test_own_memory_is_in_bytes() -> None:
    assert peak_memory_bytes(os.getpid()) > 10 << 20
