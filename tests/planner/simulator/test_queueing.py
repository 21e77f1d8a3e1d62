"""The simulator against queueing theory: what is known exactly must come out."""

from __future__ import annotations

from math import factorial

import numpy as np
import pytest

from cascadeserve.replay.arrivals import poisson
from planner.simulator import Load, Simulation, Simulator, draw_load
from tests.fakes.plans import make_plan, make_profile, make_records

# the first run compiles the simulator
pytestmark = pytest.mark.timeout(240)

SERVICE_S = 0.01
ONE_BY_ONE = {"min_batch": 1, "max_batch": 1, "max_wait_s": 0.0}


def single_server(times_s: np.ndarray, duration_s: float) -> Simulation:
    """One model that takes SERVICE_S per row, one row at a time."""
    busy_s = {"model": [[1, SERVICE_S]]}
    simulator = Simulator(
        make_plan(busy_s, [("model", None)], slo_s=1e3),
        "family",
        make_records({"model": [0.5]}),
        {"a": make_profile(busy_s)},
    )
    return simulator.run(draw_load(times_s, duration_s, 1, np.random.default_rng(0)))


@pytest.mark.parametrize("utilisation", [0.3, 0.6, 0.9])
def test_every_wait_at_one_server_is_the_one_of_lindleys_recursion(utilisation: float) -> None:
    times_s = poisson(utilisation / SERVICE_S, 200.0, np.random.default_rng(1))
    expected_s = np.empty(len(times_s))
    free_s = 0.0
    for index, time_s in enumerate(times_s):
        free_s = max(free_s, time_s) + SERVICE_S
        expected_s[index] = free_s - time_s
    np.testing.assert_allclose(single_server(times_s, 200.0).latency_s, expected_s, atol=1e-9)


@pytest.mark.parametrize("utilisation", [0.3, 0.6, 0.8])
def test_the_mean_wait_is_that_of_m_d_1(utilisation: float) -> None:
    """Pollaczek-Khinchine: utilisation x service / (2 (1 - utilisation))."""
    duration_s = 20_000.0
    simulation = single_server(poisson(utilisation / SERVICE_S, duration_s, np.random.default_rng(2)), duration_s)
    wait_s = float(np.mean(simulation.latency_s)) - SERVICE_S
    assert wait_s == pytest.approx(utilisation * SERVICE_S / 2 / (1 - utilisation), rel=0.03)
    assert simulation.busy_s["a"] == pytest.approx(len(simulation.latency_s) * SERVICE_S)


def erlang_c(servers: int, offered: float) -> float:
    """Probability of waiting in M/M/c."""
    last = offered**servers / factorial(servers) * servers / (servers - offered)
    return last / (sum(offered**k / factorial(k) for k in range(servers)) + last)


@pytest.mark.parametrize("servers", [1, 2, 4])
def test_the_mean_wait_is_that_of_m_m_c(servers: int) -> None:
    """Nearly exponential work is a cascade of short stages, at each of which a row leaves with the same probability.

    It is geometric, so the wait is that of M/M/c times (1 + its squared coefficient of variation) / 2.
    """
    stages, stage_s, leaves = 40, 0.001, 0.15
    mean_s = stage_s / leaves
    names = [f"m{index}" for index in range(stages)]
    busy_s = {name: [[1, stage_s]] for name in names}
    chain = [(name, 1.0 - leaves) for name in names[:-1]] + [(names[-1], None)]
    rng = np.random.default_rng(3)
    plan = make_plan(
        busy_s,
        chain,
        reach=[(1 - leaves) ** k for k in range(stages)],
        slo_s=1e3,
        instances={"a": dict.fromkeys(names, servers)},
    )
    certainty = {name: rng.random(50_000).tolist() for name in names}
    simulator = Simulator(plan, "family", make_records(certainty), {"a": make_profile(busy_s, slots=servers)})
    utilisation, duration_s = 0.7, 2_000.0
    times_s = poisson(utilisation * servers / mean_s, duration_s, rng)
    simulation = simulator.run(draw_load(times_s, duration_s, 50_000, rng))
    wait_s = float(np.mean(simulation.latency_s)) - simulation.busy_s["a"] / len(times_s)
    expected_s = erlang_c(servers, utilisation * servers) * mean_s / servers / (1 - utilisation)
    assert wait_s == pytest.approx(expected_s * (1 + (1 - leaves)) / 2, rel=0.1)


def test_littles_law_holds_for_what_arrivals_find() -> None:
    """Poisson arrivals see time averages, so they find rate x latency requests in the system."""
    duration_s, rate_per_s = 5_000.0, 70.0
    times_s = poisson(rate_per_s, duration_s, np.random.default_rng(4))
    simulation = single_server(times_s, duration_s)
    left = np.sort(times_s + simulation.latency_s)
    found = np.arange(len(times_s)) - np.searchsorted(left, times_s)
    assert found.mean() == pytest.approx(rate_per_s * simulation.latency_s.mean(), rel=0.03)


def cascade(front: dict[str, float] | None = None) -> Simulator:
    """Two stages with batches, sharing a device."""
    busy_s = {"small": [[1, 0.001], [64, 0.004]], "large": [[1, 0.004], [16, 0.05]]}
    triggers = {
        "small": {"min_batch": 4, "max_batch": 64, "max_wait_s": 0.005},
        "large": {"min_batch": 1, "max_batch": 8, "max_wait_s": 0.0},
    }
    plan = make_plan(busy_s, [("small", 0.3), ("large", None)], reach=[1.0, 0.3], triggers=triggers)
    rng = np.random.default_rng(5)
    records = make_records({"small": rng.random(1_000), "large": rng.random(1_000)})
    return Simulator(plan, "family", records, {"a": make_profile(busy_s, overhead_s=0.0004, front=front)})


def bursty_load(rows: tuple[int, int] = (1, 1)) -> Load:
    rng = np.random.default_rng(6)
    return draw_load(poisson(300.0, 30.0, rng), 30.0, 1_000, rng, rows)


def test_work_is_conserved() -> None:
    """What the device did is what the batches that were sent take, and every row was in one batch per stage."""
    load = bursty_load((1, 4))
    simulation = cascade().run(load)
    assert simulation.refused == 0
    rows = int(load.rows.sum())
    assert simulation.batch_rows["small"] == rows
    assert simulation.batch_rows["large"] == int((simulation.stage == 1).sum())
    least_s = simulation.batches["small"] * 0.001 + simulation.batches["large"] * 0.004
    most_s = least_s + rows * (0.003 / 63) + simulation.batch_rows["large"] * (0.046 / 15)
    assert least_s < simulation.busy_s["a"] <= most_s + 1e-9


def test_one_load_gives_one_outcome_byte_by_byte() -> None:
    first, second = (cascade().run(bursty_load((1, 8))) for _ in range(2))
    for name in ("latency_s", "gear", "stage", "right", "tick_demand_per_s"):
        assert getattr(first, name).tobytes() == getattr(second, name).tobytes()


def test_the_orchestrators_core_is_a_server_of_its_own() -> None:
    """A request waits for those before it, as in M/D/1; its answer for those that came while it was there itself."""
    busy_s = {"model": [[64, 1e-7]]}
    plan = make_plan(busy_s, [("model", None)])
    profile = make_profile(busy_s, front={"request_s": 0.001, "path_s": 0.002})
    simulator = Simulator(plan, "family", make_records({"model": [0.5]}), {"a": profile})
    rng = np.random.default_rng(7)
    simulation = simulator.run(draw_load(poisson(700.0, 500.0, rng), 500.0, 1, rng))
    taken_in_s = 0.001 + 0.7 * 0.001 / 2 / 0.3
    behind_s = 700.0 * taken_in_s * 0.001
    assert simulation.latency_s.mean() == pytest.approx(taken_in_s + behind_s + 0.002, rel=0.04)


def test_requests_of_a_batch_are_answered_one_by_one_while_the_next_batch_runs() -> None:
    """Batches of 10 ms: the next one leaves when one is back, not after its answer, which takes 2 ms."""
    busy_s = {"model": [[1, 0.01], [64, 0.01]]}
    plan = make_plan(busy_s, [("model", None)])
    profile = make_profile(busy_s, front={"answer_s": 0.002})
    simulator = Simulator(plan, "family", make_records({"model": [0.5]}), {"a": profile})
    times_s = np.array([0.0, 0.001, 0.002, 0.003])
    simulation = simulator.run(Load(times_s, np.ones(4, np.int64), np.zeros(4, np.int64), 1.0))
    # slots + 1 in flight: the second request waits in Triton, the last two in their queue
    assert times_s + simulation.latency_s == pytest.approx([0.012, 0.022, 0.032, 0.034])


def test_costs_of_the_core_add_latency() -> None:
    load = bursty_load()
    without, with_costs = (
        cascade(front).run(load) for front in (None, {"request_s": 2e-4, "batch_s": 3e-4, "row_s": 1e-5})
    )
    assert with_costs.quantile_s(0.5) > without.quantile_s(0.5) + 5e-4
