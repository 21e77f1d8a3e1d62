from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from cascadeserve.demo.judging import (
    add_ledgers,
    answered_rows,
    judge,
    known_labels,
    median_range,
    pair_accuracies,
)
from cascadeserve.replay.client import Outcome, Reply
from cascadeserve.replay.ledger import Records
from cascadeserve.replay.rows import RequestRows
from cascadeserve.replay.summary import summarise
from cascadeserve.report import Ledger

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from cascadeserve.demo.judging import Probe

SLO_S = 0.02
DURATION_S = 6.0
RATE = 200.0


def run(
    folder: Path,
    latency_s: NDArray[np.float64],
    *,
    lag_s: float = 0.0,
    failed: int = 0,
    outcome: Outcome = Outcome.LOST,
) -> Probe:
    """Judge a run whose requests take these times; the last `failed` ones end otherwise."""
    count = len(latency_s)
    scheduled_s = np.arange(count) * DURATION_S / count
    rows = RequestRows(np.arange(count + 1), np.arange(count))
    records = Records(scheduled_s, rows)
    for index in range(count):
        kind = outcome if index >= count - failed else Outcome.ANSWERED
        records.store(index, scheduled_s[index] + lag_s, Reply(kind, scheduled_s[index] + latency_s[index]))
    report = summarise(records, labels=None, duration_s=DURATION_S, slo_s=SLO_S)
    records.write(folder / "run.npz")
    with np.load(folder / "run.npz") as arrays:
        stored = {name: arrays[name] for name in arrays.files}
    return judge(report, stored, kind="probe", rate_per_s=RATE, slo_s=SLO_S)


def calm(count: int = 1200) -> NDArray[np.float64]:
    return np.full(count, 0.01)


def test_a_calm_run_is_sustained(tmp_path: Path) -> None:
    probe = run(tmp_path, calm())
    assert (probe.verdict, probe.reason) == ("sustained", "")
    assert probe.p95_s == pytest.approx(0.01)
    assert probe.last_third_p95_s == pytest.approx(0.01)
    assert probe.ledger.sent == 1200


def test_a_stall_that_less_than_a_twentieth_feels_does_no_harm(tmp_path: Path) -> None:
    latency_s = calm()
    latency_s[100:150] = 0.5
    assert run(tmp_path, latency_s).verdict == "sustained"
    latency_s[100:170] = 0.5
    assert run(tmp_path, latency_s).verdict == "overloaded"


def test_a_queue_that_grows_shows_in_the_last_third(tmp_path: Path) -> None:
    latency_s = calm()
    latency_s[1150:] = 0.03
    probe = run(tmp_path, latency_s)
    assert probe.p95_s is not None
    assert probe.p95_s < SLO_S
    assert probe.verdict == "overloaded"
    assert "last third" in probe.reason


def test_a_queue_that_begins_at_the_end_shows_in_what_is_open(tmp_path: Path) -> None:
    latency_s = calm()
    latency_s[-15:] = 1.0
    probe = run(tmp_path, latency_s)
    assert probe.in_flight_at_end == 15
    assert "15 requests in flight" in probe.reason


@pytest.mark.parametrize("outcome", [Outcome.LOST, Outcome.REFUSED, Outcome.FAILED])
def test_one_request_without_answer_is_enough(tmp_path: Path, outcome: Outcome) -> None:
    probe = run(tmp_path, calm(), failed=1, outcome=outcome)
    assert probe.verdict == "overloaded"
    assert probe.reason == "1 requests were not answered"


def test_a_late_generator_makes_the_run_void_whatever_else_happened(tmp_path: Path) -> None:
    assert run(tmp_path, calm(), lag_s=0.0011).verdict == "void"
    assert run(tmp_path, calm(), lag_s=0.0011, failed=3).verdict == "void"
    assert run(tmp_path, calm(), lag_s=0.0009).verdict == "sustained"


def test_nothing_answered_is_no_rate(tmp_path: Path) -> None:
    probe = run(tmp_path, calm(20), failed=20)
    assert probe.verdict == "overloaded"
    assert (probe.p95_s, probe.last_third_p95_s) == (None, None)


def records(row_index: list[int], labels: list[int], answered: list[bool] | None = None) -> dict[str, NDArray[Any]]:
    ok = [True] * len(row_index) if answered is None else answered
    return {
        "outcome": np.array([1 if each else 2 for each in ok], dtype=np.int8),
        "outcome_names": np.array(["unsent", "answered", "refused"]),
        "row_offset": np.arange(len(row_index) + 1),
        "row_index": np.array(row_index, dtype=np.int64),
        "label": np.array(labels, dtype=np.int64),
    }


def test_only_answered_rows_speak() -> None:
    index, label = answered_rows(records([4, 2, 0], [7, -1, 5], [True, False, True]))
    assert (index.tolist(), label.tolist()) == ([4, 0], [7, 5])


def test_requests_of_several_rows() -> None:
    run_records = records([0, 1, 2, 3], [1, 1, 2, 2])
    run_records |= {"row_offset": np.array([0, 3, 4]), "outcome": np.array([2, 1], dtype=np.int8)}
    assert answered_rows(run_records)[0].tolist() == [3]


def test_what_a_model_answered_is_gathered_over_runs() -> None:
    runs = [records([0, 1], [3, 4]), records([1, 3], [4, 9], [True, False])]
    assert known_labels(runs, 5).tolist() == [3, 4, -1, -1, -1]
    assert known_labels([], 2).tolist() == [-1, -1]


def test_accuracies_are_compared_on_the_same_answers_only() -> None:
    truth = np.array([0, 1, 2, 3, 4])
    reference = np.array([0, 1, 9, -1, -1])
    cascade = [records([0, 1, 2], [0, 9, 2]), records([3, 2, 0], [3, 2, 9])]
    paired = pair_accuracies(cascade, reference, truth)
    assert paired is not None
    # rows 0, 1, 2, 2, 0: row 3 is right, but the reference was never asked
    assert paired.answers == 5
    assert paired.cascade_accuracy == pytest.approx(3 / 5)
    assert paired.reference_accuracy == pytest.approx(3 / 5)
    assert paired.drop == pytest.approx(0.0)


def test_nothing_in_common_is_no_accuracy() -> None:
    assert pair_accuracies([records([1], [1])], np.array([0, -1]), np.array([0, 1])) is None
    assert pair_accuracies([], np.array([0]), np.array([0])) is None


def test_the_interval_of_a_median_lies_within_the_values_and_covers_it() -> None:
    low, high = median_range([3.4, 3.9, 3.6, 3.5, 4.4])
    assert 3.4 <= low <= 3.6 <= high <= 4.4
    assert median_range([3.4, 3.9, 3.6, 3.5, 4.4]) == (low, high)
    assert median_range([2.0] * 5) == (2.0, 2.0)


def test_the_interval_covers_the_true_median_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    covered = 0
    for seed in range(60):
        low, high = median_range(rng.normal(3.6, 0.2, 15).tolist(), seed=seed)
        covered += low <= 3.6 <= high
    assert covered >= 50


def test_ledgers_add_up() -> None:
    one = Ledger(sent=5, answered_correct=3, answered_wrong=1, refused=1, failed=0, lost=0, duplicated=0)
    two = Ledger(sent=2, answered_correct=0, answered_wrong=0, refused=0, failed=1, lost=1, duplicated=1)
    total = Ledger(sent=7, answered_correct=3, answered_wrong=1, refused=1, failed=1, lost=1, duplicated=1)
    assert add_ledgers([one, two]) == total
    assert add_ledgers([]).sent == 0
