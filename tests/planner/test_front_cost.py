from __future__ import annotations

import numpy as np
import pytest

from planner.front_cost import Counted, solve


def counted(requests: int, batches: int, rows: int, costs: tuple[float, float, float], noise: float = 0.0) -> Counted:
    cpu_s = (requests * costs[0] + batches * costs[1] + rows * costs[2]) * (1.0 + noise)
    return Counted(requests, batches, rows, cpu_s)


PHASES = ((3000, 200, 3000), (150, 150, 4800), (750, 700, 750))


def test_costs_are_found_again() -> None:
    costs = (2.5e-4, 4e-4, 1e-5)
    found = solve([counted(*phase, costs) for phase in PHASES])
    assert (found.request_s, found.batch_s, found.row_s) == pytest.approx(costs)


def test_noise_makes_no_cost_negative_and_the_whole_comes_out_right() -> None:
    costs = (2.5e-4, 4e-4, 0.0)
    rng = np.random.default_rng(0)
    for _ in range(20):
        phases = [counted(*phase, costs, rng.normal(0, 0.1)) for phase in PHASES]
        found = solve(phases)
        assert min(found.request_s, found.batch_s, found.row_s) >= 0.0
        for phase in phases:
            total_s = phase.requests * found.request_s + phase.batches * found.batch_s + phase.rows * found.row_s
            assert total_s == pytest.approx(phase.cpu_s, rel=0.35)
