from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from cascadeserve.errors import InvalidArtefact, UsageError
from cascadeserve.replay import arrivals
from planner.trace_facts import dispersion_index, trace_facts

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

RNG = np.random.default_rng


def written(path: Path, times_s: NDArray[np.float64]) -> Path:
    path.write_text("time_s\n" + "\n".join(f"{time:.6f}" for time in times_s) + "\n")
    return path


def test_the_estimate_has_no_bias_for_poisson_arrivals_even_of_a_moving_rate() -> None:
    rng = RNG(1)
    # few windows, so that a bias of one over their number would show; the rate moves from pair to pair
    means = np.repeat(rng.uniform(1.0, 200.0, 10), 2)
    found = [dispersion_index(rng.poisson(means).astype(float))[0] for _ in range(4_000)]
    assert np.mean(found) == pytest.approx(1.0, abs=4.0 * np.std(found) / np.sqrt(len(found)))


def test_the_standard_error_is_how_far_estimates_lie_apart() -> None:
    rng = RNG(2)
    index, error = np.transpose([dispersion_index(3.0 * rng.poisson(40.0, 200)) for _ in range(2_000)])
    assert np.mean(index) == pytest.approx(3.0, rel=0.02)
    assert np.mean(error) == pytest.approx(np.std(index), rel=0.1)


@pytest.mark.parametrize("dispersion", [1.0, 4.0, 9.0])
def test_the_dispersion_of_a_renewal_process_is_found(dispersion: float, tmp_path: Path) -> None:
    times_s = arrivals.gamma(60.0, np.sqrt(dispersion), 1_500.0, RNG(3))
    facts = trace_facts(written(tmp_path / "trace.csv", times_s), column=None, mean_rows=1.0, seed=0)
    assert facts.window_s == 1.0
    assert facts.measured == pytest.approx(dispersion, abs=4.0 * facts.standard_error + 0.06 * dispersion)


def test_the_rise_and_fall_of_the_load_is_no_burstiness(tmp_path: Path) -> None:
    slow = arrivals.steps([(200.0, 20.0), (200.0, 200.0), (200.0, 50.0)], RNG(4))
    facts = trace_facts(written(tmp_path / "trace.csv", slow), column=None, mean_rows=1.0, seed=0)
    assert facts.measured == pytest.approx(1.0, abs=0.3)
    counts = np.bincount(slow.astype(int))
    assert np.var(counts) / np.mean(counts) > 30.0


def test_windows_are_as_long_as_it_takes_to_see_a_change(tmp_path: Path) -> None:
    times_s = arrivals.poisson(0.6, 4_000.0, RNG(5))
    facts = trace_facts(written(tmp_path / "trace.csv", times_s), column=None, mean_rows=2.0, seed=0)
    assert facts.window_s == 16.0
    assert facts.pairs == 124
    assert sum(share for _, share in facts.prior) == pytest.approx(1.0)
    mean = sum(rate * share for rate, share in facts.prior)
    assert mean == pytest.approx(1.2, rel=0.1), "in rows, of which a request has two"


def test_what_is_more_even_than_poisson_is_planned_as_poisson(tmp_path: Path) -> None:
    facts = trace_facts(written(tmp_path / "trace.csv", np.arange(0, 100, 0.05)), column=None, mean_rows=1.0, seed=0)
    assert facts.measured < 0.1
    assert facts.dispersion == 1.0


def test_counts_by_the_minute_have_windows_of_minutes(tmp_path: Path) -> None:
    counts = RNG(6).poisson(600.0, 200)
    (tmp_path / "trace.csv").write_text(
        "minute,count\n" + "".join(f"{minute},{count}\n" for minute, count in enumerate(counts))
    )
    facts = trace_facts(tmp_path / "trace.csv", column=None, mean_rows=1.0, seed=0)
    assert facts.window_s == 60.0
    assert facts.requests == counts.sum()
    assert facts.measured == pytest.approx(1.0, abs=4.0 * facts.standard_error)


def test_both_are_said_as_a_goal_has_them(tmp_path: Path) -> None:
    times_s = arrivals.poisson(50.0, 100.0, RNG(7))
    facts = trace_facts(written(tmp_path / "trace.csv", times_s), column="time_s", mean_rows=1.0, seed=0)
    measured, goal = facts.sentences()
    assert "from 49 pairs of windows of 1 s, if the rate changes little from one to the next" in measured
    assert goal.startswith(f"In a goal: dispersion = {facts.dispersion:.3g}, rate_prior = [[")


def test_too_short_a_trace_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "trace.csv", np.arange(0, 20, 0.05))
    with pytest.raises(UsageError, match=r"trace\.csv holds 9 pairs of windows of 1 s, too few"):
        trace_facts(path, column=None, mean_rows=1.0, seed=0)


def test_an_unknown_column_is_refused(tmp_path: Path) -> None:
    path = written(tmp_path / "trace.csv", np.arange(0, 100, 0.05))
    with pytest.raises(InvalidArtefact, match="has no column `when`"):
        trace_facts(path, column="when", mean_rows=1.0, seed=0)
