from __future__ import annotations

import pytest

from cascadeserve.demo.timeline import choose_steps
from tests.cascadeserve.demo import made_up


def test_the_bins_hold_what_happened_in_them() -> None:
    timeline = made_up.timeline()
    bins = timeline.bins
    assert len(bins.offered_rate_per_s) == len(bins.p95_s) == len(bins.accuracy) == 12
    assert bins.offered_rate_per_s[:6] == (200.0,) * 6
    assert bins.offered_rate_per_s[6:] == (1000.0,) * 6
    assert sum(bins.offered_rate_per_s) * bins.bin_s == timeline.report.ledger.sent
    assert all(0.9 <= (share or 0.0) <= 1.0 for share in bins.accuracy)
    assert all((p50 or 0.0) < (p95 or 0.0) for p50, p95 in zip(bins.p50_s, bins.p95_s, strict=True))


def test_models_are_told_by_gear_and_stage() -> None:
    shares = made_up.timeline().rows_by_model
    assert shares["small"] == pytest.approx(4800 / 7200)
    assert shares["large"] == pytest.approx(2400 / 7200)


def test_the_load_crosses_what_one_model_manages_and_stays_below_the_cascades_limit() -> None:
    steps = choose_steps(400.0, 1600.0)
    rates = [rate_per_s for _, rate_per_s in steps]
    assert min(rates) < 400
    assert 1300 <= max(rates) < 1600
    assert 25 <= sum(duration_s for duration_s, _ in steps) <= 35
