from __future__ import annotations

import json
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from cascadeserve.replay.arrivals import poisson, steps
from planner.chrome_trace import MOST, covered_s, write_trace
from planner.simulator import Simulator, draw_load
from tests.fakes import tiny
from tests.fakes.plans import make_profile, make_records

if TYPE_CHECKING:
    from pathlib import Path

    from planner.simulator import Simulation

# the first run compiles the simulator
pytestmark = pytest.mark.timeout(240)

BUSY_S = {"small": [[1, 0.001], [64, 0.002]], "large": [[1, 0.002], [64, 0.010]]}
ENDPOINTS = ("a", "b")
ROWS = 500
WAY_S = 0.0004


def simulate(
    *profile: tuple[float, float],
    timeout_s: float | None = None,
    logged_batches: int = MOST,
    rows: int = 1,
    transitions: tuple[dict[str, Any], ...] = (),
) -> Simulation:
    """The tiny plan on two endpoints; a batch spends 0.2 ms on its way there and as much back."""
    certainty = np.random.default_rng(0).random(ROWS)
    records = make_records({"small": certainty + 0.2, "large": certainty})
    plan = tiny.plan(tiny.plan_document(ENDPOINTS) | {"transitions": transitions})
    made = make_profile(BUSY_S, overhead_s=WAY_S)
    simulator = Simulator(plan, "family", records, dict.fromkeys(ENDPOINTS, made))
    rng = np.random.default_rng(1)
    load = draw_load(steps(profile, rng), sum(seconds for seconds, _ in profile), ROWS, rng, (rows, rows))
    return simulator.run(load, timeout_s=timeout_s, logged_batches=logged_batches)


def written(folder: Path, simulation: Simulation) -> dict[str, Any]:
    write_trace(folder / "trace.json", simulation, tiny.plan(tiny.plan_document(ENDPOINTS)), "family")
    document: dict[str, Any] = json.loads((folder / "trace.json").read_bytes())
    return document


def of_kind(document: dict[str, Any], kind: str) -> list[dict[str, Any]]:
    return [event for event in document["traceEvents"] if event.get("cat") == kind]


def test_every_event_is_what_the_format_asks_for(tmp_path: Path) -> None:
    document = written(tmp_path, simulate((3, 80), (2, 400), (2, 80)))
    assert document["displayTimeUnit"] == "ms"
    needed = {"X": {"ts", "dur", "cat"}, "C": {"ts"}, "M": set(), "i": {"ts", "s", "cat"}}
    for event in document["traceEvents"]:
        assert {"name", "ph", "pid", "tid", "args"} | needed[event["ph"]] == set(event)
        assert event.get("ts", 0.0) >= 0.0
        assert event.get("dur", 0.0) >= 0.0
    named = [event for event in document["traceEvents"] if event["name"] == "process_name"]
    assert [event["args"]["name"] for event in named] == ["orchestrator", "endpoint a", "endpoint b"]
    tracks = {(event["pid"], event["tid"]) for event in document["traceEvents"] if event["name"] == "thread_name"}
    assert {(event["pid"], event["tid"]) for event in document["traceEvents"] if event["ph"] in "Xi"} <= tracks


def test_events_stand_by_time_and_slices_of_a_track_nest(tmp_path: Path) -> None:
    document = written(tmp_path, simulate((3, 80), (2, 400), (2, 80)))
    timed = [event["ts"] for event in document["traceEvents"] if "ts" in event]
    assert timed == sorted(timed)
    open_until: dict[tuple[int, int], list[float]] = defaultdict(list)
    for event in document["traceEvents"]:
        if event["ph"] != "X":
            continue
        stack = open_until[event["pid"], event["tid"]]
        while stack and stack[-1] <= event["ts"] + 1e-6:
            stack.pop()
        end = event["ts"] + event["dur"]
        assert all(end <= outer + 1e-6 for outer in stack)
        stack.append(end)


def test_the_trace_agrees_with_the_run(tmp_path: Path) -> None:
    simulation = simulate((2, 80), (2, 400), (6, 80))
    document = written(tmp_path, simulation)
    assert document["otherData"]["complete"] is True
    batches, runs = of_kind(document, "batch"), of_kind(document, "device")
    assert len(batches) == len(runs) == sum(simulation.batches.values())
    for model in BUSY_S:
        mine = [event for event in batches if event["name"] == model]
        assert len(mine) == simulation.batches[model]
        assert sum(event["args"]["rows"] for event in mine) == simulation.batch_rows[model]
    assert {event["args"]["gear"] for event in batches} == {"calm", "busy"}
    for index, endpoint in enumerate(ENDPOINTS):
        there = [event for event in runs if event["pid"] == 2 + index]
        assert sum(event["args"]["device_s"] for event in there) == pytest.approx(simulation.busy_s[endpoint])
        # shared slots are slower, never faster
        assert all(event["dur"] >= 1e6 * event["args"]["device_s"] - 1e-2 for event in there)
    ways = {event["args"]["number"]: event for event in batches}
    for run in runs:
        batch = ways[run["args"]["number"]]
        assert run["ts"] >= batch["ts"]
        assert run["ts"] + run["dur"] <= batch["ts"] + batch["dur"] + 1e-6
    demand = [event["args"]["rows/s"] for event in document["traceEvents"] if event["ph"] == "C"]
    assert demand == pytest.approx(simulation.tick_demand_per_s.tolist())
    assert [event["name"] for event in of_kind(document, "gear")] == ["calm", "busy", "calm"]


def test_refused_requests_are_instants(tmp_path: Path) -> None:
    simulation = simulate((2, 9000), timeout_s=0.05, rows=64)
    document = written(tmp_path, simulation)
    refused = of_kind(document, "request")
    assert len(refused) == simulation.refused > 0
    assert {event["s"] for event in refused} == {"t"}
    assert all(0.0 <= event["args"]["after_s"] <= 0.05 + 1e-9 for event in refused)
    assert {event["args"]["rows"] for event in refused} == {64}


def test_a_full_log_ends_the_trace_and_says_so(tmp_path: Path) -> None:
    whole = simulate((3, 80))
    simulation = simulate((3, 80), logged_batches=20)
    assert len(simulation.log.left_s) == 20
    np.testing.assert_array_equal(simulation.log.left_s, whole.log.left_s[:20])
    np.testing.assert_array_equal(simulation.log.back_s, whole.log.back_s[:20])
    document = written(tmp_path, simulation)
    until_s = covered_s(simulation)
    assert until_s == simulation.log.left_s[-1] < 3.0
    assert document["otherData"]["complete"] is False
    assert document["otherData"]["covers_s"] == pytest.approx(until_s)
    assert len(of_kind(document, "batch")) == 20
    assert max(event["ts"] for event in document["traceEvents"] if event["ph"] == "C") <= 1e6 * until_s
    assert covered_s(whole) is None
    assert covered_s(whole, most=10) == pytest.approx(whole.tick_s[9])


def test_nothing_is_noted_unless_asked_for() -> None:
    simulation = simulate((2, 9000), timeout_s=0.05, logged_batches=0)
    assert all(len(column) == 0 for column in simulation.log)
    assert len(simulation.refused_s) == 0
    asked = simulate((2, 9000), timeout_s=0.05)
    np.testing.assert_array_equal(simulation.latency_s, asked.latency_s)
    assert simulation.busy_s == asked.busy_s


def test_a_run_without_an_answer_is_a_trace_too(tmp_path: Path) -> None:
    document = written(tmp_path, simulate((1, 50), timeout_s=1e-5))
    assert of_kind(document, "batch") == []
    assert of_kind(document, "request")


def test_an_unanswered_batch_lasts_to_the_end(tmp_path: Path) -> None:
    """What is in flight when the last request expires was never handled."""
    certainty = np.zeros(4)
    records = make_records({"small": certainty, "large": certainty})
    slow = {"small": [[1, 5.0], [64, 5.0]], "large": BUSY_S["large"]}
    simulator = Simulator(tiny.plan(), "family", records, {"a": make_profile(slow)})
    rng = np.random.default_rng(1)
    simulation = simulator.run(draw_load(poisson(20.0, 0.5, rng), 0.5, 4, rng), timeout_s=1.0, logged_batches=MOST)
    write_trace(tmp_path / "trace.json", simulation, tiny.plan(), "family")
    document = json.loads((tmp_path / "trace.json").read_bytes())
    open_ones = [event for event in of_kind(document, "batch") if event["args"].get("answered") is False]
    assert open_ones
    assert {round(event["ts"] + event["dur"], 3) for event in open_ones} == {
        round(1e6 * document["otherData"]["covers_s"], 3)
    }


def test_a_transition_lies_in_the_layout_that_is_left(tmp_path: Path) -> None:
    steps_up = [{"endpoint": name, "model": "large", "present": 1, "wanted": 2} for name in ENDPOINTS]
    up = {
        "from_layout": "narrow", "to_layout": "broad", "gears": {"family": "busy"}, "steps": steps_up,
        "duration_s": 2.0,
    }  # fmt: skip
    document = written(tmp_path, simulate((2, 80), (10, 2000), transitions=(up,)))
    narrow, broad = of_kind(document, "layout")
    (changing,) = of_kind(document, "transition")
    assert changing["tid"] == narrow["tid"]
    # both end with the same tick
    end_us = changing["ts"] + changing["dur"]
    assert end_us == pytest.approx(narrow["ts"] + narrow["dur"]) == pytest.approx(broad["ts"])
    # until nothing waits for other gears, and for two loads of a second
    assert 4e6 < changing["dur"] < 5e6
