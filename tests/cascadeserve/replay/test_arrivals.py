from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from cascadeserve.errors import UsageError
from cascadeserve.replay import arrivals

if TYPE_CHECKING:
    from numpy.typing import NDArray


def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def cv_of_gaps(times: NDArray[np.float64]) -> float:
    gaps = np.diff(times)
    return float(gaps.std() / gaps.mean())


def assert_increasing(times: NDArray[np.float64], duration_s: float) -> None:
    assert times.dtype == np.float64
    assert np.all(np.diff(times) >= 0)
    assert times[0] >= 0
    assert times[-1] <= duration_s


def test_poisson_has_its_rate_and_exponential_gaps() -> None:
    times = arrivals.poisson(200.0, 500.0, rng())
    assert_increasing(times, 500.0)
    assert len(times) == pytest.approx(100_000, rel=0.02)
    assert cv_of_gaps(times) == pytest.approx(1.0, abs=0.02)
    counts = np.histogram(times, bins=500, range=(0, 500))[0]
    assert counts.var() / counts.mean() == pytest.approx(1.0, abs=0.15)


def test_the_same_seed_gives_the_same_arrivals() -> None:
    assert np.array_equal(arrivals.poisson(50.0, 10.0, rng()), arrivals.poisson(50.0, 10.0, rng()))


@pytest.mark.parametrize("cv", [0.5, 1.0, 3.0])
def test_gamma_has_its_rate_and_its_cv(cv: float) -> None:
    times = arrivals.gamma(100.0, cv, 2000.0, rng())
    assert_increasing(times, 2000.0)
    assert len(times) == pytest.approx(200_000, rel=0.03)
    assert cv_of_gaps(times) == pytest.approx(cv, rel=0.03)


def test_gamma_is_stationary_from_the_start() -> None:
    generator = rng()
    # an ordinary first gap would put about (16 - 1) / 2 arrivals too many into each of these short windows
    counts = [len(arrivals.gamma(10.0, 4.0, 2.0, generator)) for _ in range(4000)]
    assert np.mean(counts) == pytest.approx(20.0, rel=0.06)


def test_bursty_has_the_asked_mean_and_is_overdispersed() -> None:
    base, burst = arrivals.split_burst_rates(100.0, 5.0, mean_base_s=4.0, mean_burst_s=1.0)
    assert burst == pytest.approx(5 * base)
    times = arrivals.bursty(base, burst, 5000.0, rng(), mean_base_s=4.0, mean_burst_s=1.0)
    assert_increasing(times, 5000.0)
    assert len(times) / 5000.0 == pytest.approx(100.0, rel=0.05)
    counts = np.histogram(times, bins=5000, range=(0, 5000))[0]
    assert counts.var() / counts.mean() > 20


def test_steps_hold_their_rates() -> None:
    times = arrivals.steps([(50.0, 100.0), (50.0, 400.0), (20.0, 0.0), (50.0, 100.0)], rng())
    assert_increasing(times, 170.0)
    counts = np.histogram(times, bins=[0, 50, 100, 120, 170])[0]
    assert counts[[0, 1, 3]] == pytest.approx([5000, 20000, 5000], rel=0.05)
    assert counts[2] == 0


def test_nonsense_is_refused() -> None:
    with pytest.raises(UsageError, match="duration_s"):
        arrivals.poisson(1.0, 0.0, rng())
    with pytest.raises(UsageError, match="cv"):
        arrivals.gamma(1.0, 0.0, 1.0, rng())
    with pytest.raises(UsageError, match="empty"):
        arrivals.steps([], rng())


def test_a_burst_without_end_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arrivals, "MOST_REQUESTS", 1000)
    with pytest.raises(UsageError, match="may have at most 1,000"):
        # nearly all gaps of such a load are 0, so that what would be enough on average is not
        arrivals.gamma(1.0, 30.0, 20_000.0, rng())
