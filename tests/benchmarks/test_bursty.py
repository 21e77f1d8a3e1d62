from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from benchmarks.bursty import compare, goal_text, highest_rate_per_s, read_run, summarise
from cascadeserve.report import Ledger, ServingReport
from planner.goal import read_goal

if TYPE_CHECKING:
    from pathlib import Path

LEDGER = Ledger(sent=4, answered_correct=2, answered_wrong=1, refused=1, failed=0, lost=0, duplicated=0)
REPORT = ServingReport(
    schema_version=1, source="replay", duration_s=2.0, offered_rate_per_s=2.0, answered_rate_per_s=1.5, p50_s=0.1,
    p95_s=0.3, p99_s=0.3, slo_s=0.2, goodput=0.5, accuracy=2 / 3, rows_sent=4, stages=[], gears=[], ledger=LEDGER,
    generator_lag_p99_s=0.001, errors={},
)  # fmt: skip


def test_the_busiest_second() -> None:
    # one second in ten has five times as many as the others
    times_s = np.concatenate([np.full(10 if second != 3 else 50, second + 0.5) for second in range(10)])
    assert highest_rate_per_s(times_s, 10.0, 1.0) == 50.0
    assert highest_rate_per_s(times_s, 10.0, 0.25) == 200.0


def test_the_goal_is_one(tmp_path: Path) -> None:
    path = tmp_path / "goal.toml"
    path.write_text(goal_text(844.2, np.sort(np.random.default_rng(0).random(5_000)) * 20.0, 8.0))
    goal = read_goal(path).families["digits"]
    assert (goal.max_rate_per_s, goal.dispersion) == (844, 8.0)
    assert goal.rate_prior is not None
    assert sum(share for _, share in goal.rate_prior) == pytest.approx(1.0, abs=0.01)


def test_late_wrong_and_refused_answers_do_not_count() -> None:
    records = {
        "outcome": np.array([1, 1, 1, 2]),
        "outcome_names": np.array(["unsent", "answered", "refused", "failed", "lost"]),
        "scheduled_s": np.zeros(4),
        "done_s": np.array([0.1, 0.3, 0.1, 0.01]),
        "row_index": np.array([0, 1, 2, 0]),
        "label": np.array([7, 8, 1, 7]),
    }
    found = read_run(REPORT, records, np.array([7, 8, 9]), 0.2)
    assert found["right_in_time"] == pytest.approx(0.25)


def test_medians_of_the_runs_that_say_something() -> None:
    runs: list[dict[str, Any]] = [
        {"goodput": share, "accuracy": share, "right_in_time": share, "void": False} for share in (0.5, 0.9, 0.8)
    ]
    assert summarise(runs)["goodput"] == 0.8
    runs[0]["void"] = True
    assert summarise(runs)["goodput"] == pytest.approx(0.85)
    assert summarise(runs[:1])["goodput"] is None


def test_gears_of_cascades_are_told_from_their_worst_trace() -> None:
    def runs(*shares: float) -> list[dict[str, Any]]:
        return [{"goodput": at, "accuracy": at, "right_in_time": at, "void": at == 0.0} for at in shares]

    first = {"cascade": runs(0.75, 0.875), "switching": runs(0.5, 0.5), "static-cascade": runs(0.0, 0.875)}
    second = {"cascade": runs(1.0, 1.0), "switching": runs(0.25, 0.25), "static-cascade": runs(0.5, 0.5)}
    found = compare([first, second])
    assert found["goodput"] == 0.8125
    # of the first repeat of the first trace nothing is known
    assert found["accuracy_above"] == {"switching": 0.3125, "static-cascade": 0.0}
    nothing = first | {"static-cascade": runs(0.0, 0.0)}
    assert compare([nothing, second])["right_in_time_above"] == {"switching": 0.3125, "static-cascade": None}
