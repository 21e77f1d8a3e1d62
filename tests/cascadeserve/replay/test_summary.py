from __future__ import annotations

import asyncio
import io

import numpy as np
import pytest
from rich.console import Console

from cascadeserve.replay.client import Answer, Outcome, Reply
from cascadeserve.replay.ledger import LiveCounts, Records
from cascadeserve.replay.rows import RequestRows
from cascadeserve.replay.show import watch
from cascadeserve.replay.summary import summarise


def answer(label: list[int], stage: list[int], gear: str, *, certified: bool = True) -> Answer:
    return Answer(np.array(label), np.array(stage), None, gear, certified)


def test_a_mixed_run_by_hand() -> None:
    rows = RequestRows(np.array([0, 2, 3, 4, 5]), np.array([0, 1, 2, 0, 1]))
    records = Records(np.array([0.0, 1.0, 2.0, 3.0]), rows)
    records.store(0, 0.0, Reply(Outcome.ANSWERED, 0.1, answer=answer([5, 6], [0, 1], "fast")))
    records.store(1, 1.0, Reply(Outcome.ANSWERED, 1.4, answer=answer([0], [1], "slow", certified=False)))
    records.store(2, 2.0, Reply(Outcome.REFUSED, 2.1, "503 busy"))
    records.store(3, 3.2, Reply(Outcome.ANSWERED, 5.0, answer=answer([6], [0], "slow")))
    report = summarise(records, labels=np.array([5, 6, 7]), duration_s=4.0, slo_s=0.4)
    assert (report.ledger.answered_correct, report.ledger.answered_wrong, report.ledger.refused) == (2, 1, 1)
    assert report.accuracy == pytest.approx(3 / 4)
    # of four requests, the first two are in time
    assert report.goodput == pytest.approx(0.5)
    assert report.p50_s == pytest.approx(0.4)
    assert report.offered_rate_per_s == pytest.approx(5 / 4)
    assert report.answered_rate_per_s == pytest.approx(4 / 5)
    assert [(stage.stage, stage.rows, stage.share) for stage in report.stages] == [(0, 2, 0.5), (1, 2, 0.5)]
    assert [(span.gear, span.start_s, span.end_s) for span in report.gears] == [("fast", 0.0, 1.0), ("slow", 1.0, 5.0)]
    assert report.uncertified == 1
    assert report.generator_lag_p99_s == pytest.approx(0.194)
    assert report.errors == {"503 busy": 1}


def test_error_texts_are_limited_in_number() -> None:
    records = Records(np.zeros(80), RequestRows(np.arange(81), np.zeros(80, dtype=np.int64)))
    for index in range(80):
        records.store(index, 0.0, Reply(Outcome.FAILED, 0.1, f"500 error {index}"))
    assert len(records.errors) == 51
    assert records.errors["other errors"] == 30


def test_live_quantiles_are_within_their_bins() -> None:
    live = LiveCounts()
    assert live.quantile_s(0.95) is None
    for latency_s in np.linspace(0.001, 0.1, 1000):
        live.count(Reply(Outcome.ANSWERED, 0.0), float(latency_s))
    assert live.quantile_s(0.95) == pytest.approx(0.095, rel=0.03)


async def test_progress_is_shown_on_a_terminal_only() -> None:
    live = LiveCounts()
    live.count(Reply(Outcome.ANSWERED, 0.0), 0.02)
    live.sent = 3
    for terminal in (True, False):
        output = io.StringIO()
        console = Console(file=output, force_terminal=terminal, width=200)
        watcher = asyncio.create_task(watch(live, 10, console))
        await asyncio.sleep(0.05)
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)
        assert ("sent 3/10  answered 1  refused 0" in output.getvalue()) is terminal
