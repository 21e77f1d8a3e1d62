from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import policy
from benchmarks.policy import CASES, FOLLOW_ARRIVALS, hold, measure, steady, surges
from benchmarks.policy_plan import DEGRADED, GEARS, Case, ends_per_s, make_simulator
from planner.simulator import Load, Simulation
from planner.simulator.state import empty_log

if TYPE_CHECKING:
    from pathlib import Path

# the first run compiles the simulator
pytestmark = pytest.mark.timeout(240)

QUICK = Case(top_per_s=400.0)


def made(gears: list[int], times_s: list[float]) -> Simulation:
    """A run of which only arrivals and gears are told, one gear per tick of 0.1 s."""
    none = np.zeros(len(times_s))
    load = Load(np.array(times_s), np.ones(len(times_s), np.int64), none.astype(np.int64), len(gears) / 10)
    return Simulation(
        load=load,
        latency_s=none,
        gear=none.astype(np.int16),
        stage=none.astype(np.int8),
        right=none.astype(np.bool_),
        cut=none.astype(np.bool_),
        tick_s=0.1 * np.arange(1, len(gears) + 1),
        tick_gear=np.array(gears, np.int16),
        tick_layout=np.zeros(len(gears), np.int16),
        tick_changing=np.zeros(len(gears), np.bool_),
        tick_demand_per_s=np.zeros(len(gears)),
        busy_s={},
        batches={},
        batch_rows={},
        in_system_at_end=0,
        refused_s=none,
        log=empty_log(0),
    )


def test_a_surge_is_watched_from_its_start_to_after_its_end() -> None:
    # from 1.05 s to 2.05 s; up in two steps, down in two, and once more long after
    gears = [0] * 10 + [1, 1] + [2] * 12 + [1] * 2 + [0] * 94 + [1] * 5
    seen = policy._watch(made(gears, [0.5, 1.06, 1.2, 1.34, 1.36]), 1.05, 2.05, 0, 2)
    assert seen.arrivals == 3
    assert seen.followed_s == pytest.approx(0.25)
    assert seen.switches == 4
    assert seen.back_s == pytest.approx(0.65)


def test_what_never_happens_takes_forever() -> None:
    seen = policy._watch(made([0] * 20 + [1] * 200, [0.5]), 1.05, 2.05, 0, 2)
    assert seen.followed_s == np.inf
    assert seen.back_s == np.inf


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_ranges_double_and_work_halves(case: Case) -> None:
    family = make_simulator(case).family
    assert [gear.name for gear in family.gears] == list(GEARS)
    ends = ends_per_s(case)
    assert np.allclose(np.diff(ends)[1:], ends[1:-1])
    planned = family.gears_of("all")[:DEGRADED]
    assert [gear.max_rate_per_s for gear in planned] == pytest.approx(ends[1:])
    for gear in planned:
        entry = family.entry(gear.ladder_entry)
        work_s = sum(
            share * family.models[stage.model].batch_busy_s(1)
            for stage, share in zip(entry.stages, entry.reach, strict=True)
        )
        # a gear's device is equally busy at the end of each range
        assert work_s * gear.upper_rate_per_s == pytest.approx(case.load_frac)
    assert family.dispersion == case.cv**2


def test_arrivals_are_as_bursty_as_the_plan_says() -> None:
    case = replace(CASES["gamma"], top_per_s=500.0)
    counts = np.histogram(hold(case, 500.0, 2000.0, np.random.default_rng(1)), np.arange(0.0, 2001.0, 2.0))[0]
    assert counts.mean() == pytest.approx(1000.0, rel=0.02)
    assert counts.var() / counts.mean() == pytest.approx(case.cv**2, rel=0.2)


def test_a_load_in_the_middle_of_the_lowest_gear_stays_there() -> None:
    found = steady(make_simulator(QUICK), QUICK, 0, 0.5, seeds=(0,), duration_s=100.0)
    assert (found.rate_per_s, found.in_gear, found.switches_per_min) == (25.0, 1.0, 0.0)
    assert found.p95_of_slo < 1.0


def test_surges_and_overloads_are_followed_and_left_again() -> None:
    simulator = make_simulator(QUICK)
    surge, overload = (
        surges(simulator, QUICK, 1, 0.75, seeds=(0,), count=2, overload=overload) for overload in (False, True)
    )
    assert (surge.gear, surge.to_gear, surge.to_rate_per_s) == ("accurate", "overload", 700.0)
    assert (surge.surges, surge.counted, surge.followed, surge.latched) == (2, 2, 2, 0)
    assert surge.followed_within_s is not None
    assert surge.followed_within_s <= policy.FOLLOW_WITHIN_S
    assert overload.to_rate_per_s == 1200.0
    assert overload.latched == 0


def test_few_arrivals_do_not_count() -> None:
    case = replace(QUICK, top_per_s=20.0)
    found = surges(make_simulator(case), case, 0, 0.6, seeds=(0,), count=1, overload=False)
    assert found.to_rate_per_s * policy.FOLLOW_WITHIN_S < FOLLOW_ARRIVALS
    assert (found.surges, found.counted, found.followed, found.followed_within_s) == (1, 0, 0, None)


def test_the_worst_stands_first() -> None:
    found = measure(QUICK, seeds=(0,), steady_s=60.0, count=1)
    assert len(found.steady) == len(found.surges) == len(found.overloads) == 3 * DEGRADED
    assert found.in_gear == min(line.in_gear for line in found.steady)
    assert found.switches_per_crossed == max(line.switches_per_crossed for line in found.surges)
    assert found.latched == sum(line.latched for line in found.surges + found.overloads)


def test_the_result_is_written(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "policy.json"
    options = ["--case=poisson-slow", "--seeds=1", "--steady-s=10", "--surges=1", f"--result={path}"]
    assert CliRunner().invoke(policy.main, options).exit_code == 0
    document = json.loads(path.read_bytes())
    assert document["worst_in_gear"] == document["cases"]["poisson-slow"]["in_gear"]
    assert document["steady_s"] == 10.0
