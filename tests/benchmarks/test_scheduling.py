from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from benchmarks.scheduling import BASE, DEFAULT, cell, compare, schedulings
from benchmarks.scheduling_load import MEAN_SERVICE_S, Trace, make_load, make_plan, poisson_load, read_trace, simulate

if TYPE_CHECKING:
    from pathlib import Path

# the first run compiles the simulator
pytestmark = pytest.mark.timeout(240)


def trace() -> Trace:
    rng = np.random.default_rng(0)
    return Trace(np.cumsum(rng.exponential(1.0, 2_000)), 1.0 + rng.exponential(50.0, 2_000))


def test_a_trace_is_read_with_its_tokens_as_work(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,42\n2023-11-16 18:15:48.1805900,3,4\n"
    )
    read = read_trace(path)
    assert read.times_s == pytest.approx([0.0, 1.5])
    assert read.work == pytest.approx([26.0, 1.0])


@pytest.mark.parametrize("servers", [1, 4])
def test_loads_are_the_share_of_the_capacity_that_they_say(servers: int) -> None:
    made = trace()
    assert made.work.mean() * made.row_s == pytest.approx(MEAN_SERVICE_S)
    whole, timeout_s = make_load(made, 0.8, servers)
    for load in (whole, make_load(made, 0.8, servers, seconds=4.0)[0], poisson_load(made, 0.8, servers, 900)):
        assert load.work is not None
        assert load.work.sum() * made.row_s / load.times_s[-1] / servers == pytest.approx(0.8)
    assert len(timeout_s) == len(whole.times_s)


def test_the_default_is_compared_where_both_ran() -> None:
    made = trace()
    sent, timeout_s = make_load(made, 0.9, 2)
    cells = [
        cell("made", 2, 0.9, how, sent, simulate(make_plan(made, 2, how), sent, timeout_s).latency_s)
        for how in (BASE, DEFAULT)
    ]
    (found,) = compare(cells, BASE)
    assert found.p95 == cells[1].p95_ms / cells[0].p95_ms
    assert found.goodput > 1.0
    assert DEFAULT in schedulings(1)
    assert len(schedulings(2)) == 24
