from __future__ import annotations

import numpy as np
import pytest

from planner.front_cost import Counted, solve, time_per_answer_s


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


def test_answers_of_one_batch_show_what_an_answer_takes() -> None:
    batches = [start_s + 3e-4 * np.arange(16) for start_s in (0.1, 0.13, 0.2)]
    disturbed = 0.3 + 9e-4 * np.arange(16)
    too_few = 0.4 + 2e-3 * np.arange(3)
    unanswered = np.full(2, np.nan)
    done_s = np.concatenate([*batches, disturbed, too_few, unanswered])
    np.random.default_rng(0).shuffle(done_s)
    assert time_per_answer_s(done_s) == pytest.approx(3e-4)


def test_lone_answers_show_nothing() -> None:
    assert time_per_answer_s(0.01 * np.arange(50)) == 0.0
