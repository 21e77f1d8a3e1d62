from __future__ import annotations

import msgspec
import numpy as np
import pytest

from cascadeserve.artefacts import decode_json
from cascadeserve.errors import UsageError
from cascadeserve.gear_plan import GearPlan
from cascadeserve.replay.arrivals import poisson, steps
from planner.simulator import Simulator, draw_load
from tests.fakes import tiny
from tests.fakes.plans import make_plan, make_profile, make_records

# the first run compiles the simulator
pytestmark = pytest.mark.timeout(240)

BUSY_S = {"small": [[1, 0.001], [64, 0.002]], "large": [[1, 0.002], [64, 0.010]]}
ROWS = 2_000


def tiny_simulator(document: dict | None = None) -> Simulator:
    certainty = np.random.default_rng(0).random(ROWS)
    plan = decode_json(msgspec.json.encode(document or tiny.plan_document()), GearPlan)
    records = make_records({"small": certainty + 0.2, "large": certainty})
    return Simulator(plan, "family", records, {"a": make_profile(BUSY_S)})


def stepped(*profile: tuple[float, float], seed: int = 1):  # noqa: ANN201
    rng = np.random.default_rng(seed)
    return draw_load(steps(profile, rng), sum(seconds for seconds, _ in profile), ROWS, rng)


def test_gears_follow_a_surge_and_come_back() -> None:
    simulator = tiny_simulator()
    simulation = simulator.run(stepped((30, 60), (10, 600), (30, 60)))
    names = [simulator.family.gears[gear].name for gear in simulation.tick_gear]
    at = lambda second: names[int(second * 10)]  # noqa: E731
    assert (at(29), at(31), at(69)) == ("calm", "busy", "calm")
    assert simulation.refused == 0
    assert {simulator.family.gears[gear].name for gear in set(simulation.gear.tolist())} == {"calm", "busy"}


def test_a_layout_comes_into_force_after_it_was_wanted_and_loaded() -> None:
    simulator = tiny_simulator()
    simulation = simulator.run(stepped((5, 100), (20, 2_000), (40, 50)))
    changes = np.flatnonzero(np.diff(simulation.tick_layout))
    up_s, down_s = simulation.tick_s[changes + 1]
    # wanted for 1 s, then 1 s of loading (the profile does not say how long it takes)
    assert 7.0 < up_s < 8.5
    assert down_s > 35.0
    wide = simulation.tick_gear[(simulation.tick_s > up_s + 0.1) & (simulation.tick_s < down_s - 0.1)]
    assert {simulator.family.gears[gear].layout for gear in set(wide.tolist())} == {"broad"}


def test_a_transition_serves_with_its_gear_and_what_stands_at_each_moment() -> None:
    """The large model moves to the other endpoint: unload, then 3 s of loading, while the small one answers alone."""
    document = tiny.plan_document(("a", "b"))
    family = document["families"]["family"]
    family["ladder"].append({"name": "small", "stages": [{"model": "small"}], "reach": [1.0]})
    family["gears"].insert(
        2,
        {
            "name": "between", "layout": "narrow", "min_rate_per_s": 1000.0, "max_rate_per_s": None,
            "ladder_entry": "small", "degraded": True,
        },
    )  # fmt: skip
    document["layouts"][0]["instances"] = {"a": {"small": 1}, "b": {"large": 1}}
    document["layouts"][1]["instances"] = {"a": {"small": 1}, "b": {"small": 1, "large": 2}}
    moves = [("large", 1, 0), ("small", 0, 1), ("large", 0, 2)]
    document["transitions"] = [
        {
            "from_layout": "narrow", "to_layout": "broad", "gears": {"family": "between"}, "duration_s": 4.0,
            "steps": [{"endpoint": "b", "model": m, "present": p, "wanted": w} for m, p, w in moves],
        }
    ]  # fmt: skip
    certainty = np.random.default_rng(0).random(ROWS)
    plan = decode_json(msgspec.json.encode(document), GearPlan)
    profile = make_profile(BUSY_S)
    loads = {"small": 1.0, "large": 3.0}
    models = {name: msgspec.structs.replace(each, load_s=loads[name]) for name, each in profile.models.items()}
    devices = dict.fromkeys("ab", msgspec.structs.replace(profile, models=models))
    simulator = Simulator(plan, "family", make_records({"small": certainty + 0.2, "large": certainty}), devices)
    simulation = simulator.run(stepped((5, 100), (15, 1_500)), logged_batches=200_000)
    (place,) = np.flatnonzero(np.diff(simulation.tick_layout))
    # wanted for 1 s, 4 SLOs for what came before, 1 s and 3 s of loading
    assert 11.0 < simulation.tick_s[place + 1] < 12.5
    names = np.array([gear.name for gear in simulator.family.gears])[simulation.tick_gear]
    meanwhile = (simulation.tick_s > 7.0) & (simulation.tick_s < simulation.tick_s[place])
    assert set(names[meanwhile]) == {"between"}
    assert set(names[simulation.tick_s > simulation.tick_s[place + 1] + 0.2]) == {"wide"}
    log, small = simulation.log, list(simulator.family.models).index("small")
    first_on_b = log.left_s[(log.endpoint == 1) & (log.model == small)].min()
    # the first load is over 3 s before the second
    assert first_on_b == pytest.approx(simulation.tick_s[place + 1] - 3.0, abs=0.2)
    assert simulation.refused == 0


def test_a_held_gear_is_never_left() -> None:
    simulator = tiny_simulator()
    simulation = simulator.run(stepped((5, 2_000)), hold_gear="wide")
    assert {simulator.family.gears[gear].name for gear in set(simulation.tick_gear.tolist())} == {"wide"}


def test_overload_is_refused_and_the_rest_is_answered_in_time() -> None:
    busy_s = {"model": [[1, 0.01]]}
    plan = make_plan(busy_s, [("model", None)], slo_s=0.05)
    simulator = Simulator(plan, "family", make_records({"model": [0.5]}), {"a": make_profile(busy_s)})
    rng = np.random.default_rng(2)
    simulation = simulator.run(draw_load(poisson(200.0, 20.0, rng), 20.0, 1, rng), timeout_s=0.2)
    answered = ~np.isnan(simulation.latency_s)
    assert 0.45 < answered.mean() < 0.55
    assert simulation.latency_s[answered].max() <= 0.2 + 1e-9
    assert simulation.quantile_s(0.95) == np.inf
    assert simulation.in_system_at_end >= 3


def test_accuracy_is_that_of_the_stage_that_answered() -> None:
    certainty = np.array([0.9, 0.9, 0.1, 0.1])
    plan = make_plan(BUSY_S, [("small", 0.5), ("large", None)], reach=[1.0, 0.5])
    records = make_records({"small": certainty, "large": certainty}, truth=[0, 1, 0, 0])
    simulator = Simulator(plan, "family", records, {"a": make_profile(BUSY_S)})
    rng = np.random.default_rng(3)
    simulation = simulator.run(draw_load(poisson(100.0, 60.0, rng), 60.0, 4, rng))
    assert simulation.accuracy == pytest.approx(0.75, abs=0.03)
    assert (simulation.stage == 1).mean() == pytest.approx(0.5, abs=0.03)


def test_rows_of_two_endpoints_are_shared_by_their_weights() -> None:
    plan = make_plan(BUSY_S, [("large", None)], instances={"a": {"large": 1}, "b": {"large": 1}})
    document = msgspec.json.decode(msgspec.json.encode(plan))
    document["families"]["family"]["gears"][0]["load"] = {"large": {"a": 1.0, "b": 3.0}}
    weighted = decode_json(msgspec.json.encode(document), GearPlan)
    rng = np.random.default_rng(4)
    load = draw_load(poisson(300.0, 20.0, rng), 20.0, 1, rng)
    records, profile = make_records({"large": [0.5]}), make_profile(BUSY_S)
    even, uneven = (
        Simulator(each, "family", records, {"a": profile, "b": profile}).run(load).busy_s for each in (plan, weighted)
    )
    assert even["a"] == pytest.approx(even["b"], rel=0.1)
    assert uneven["b"] > 1.5 * uneven["a"]


def test_what_does_not_fit_is_refused_in_one_sentence() -> None:
    plan, records = make_plan(BUSY_S, [("small", 0.5), ("large", None)]), make_records({"small": [0.5]})
    with pytest.raises(UsageError, match="records hold only small"):
        Simulator(plan, "family", records, {"a": make_profile(BUSY_S)})
    both = make_records({"small": [0.5], "large": [0.5]})
    with pytest.raises(UsageError, match="profile has no model large"):
        Simulator(plan, "family", both, {"a": make_profile({"small": [[1, 0.1]]})})
    with pytest.raises(UsageError, match="endpoints a"):
        Simulator(plan, "family", both, {"b": make_profile(BUSY_S)})
    with pytest.raises(UsageError, match="no request"):
        draw_load(np.array([]), 1.0, 1, np.random.default_rng(0))
    with pytest.raises(UsageError, match="must rise"):
        draw_load(np.array([1.0, 0.5]), 1.0, 1, np.random.default_rng(0))


@pytest.mark.parametrize("times", [2, 10])
def test_under_overload_the_door_keeps_what_is_let_in_in_time(times: int) -> None:
    """As tests/orchestrator/test_entry.py has it of the orchestrator: 40 rows a second are answered inside the SLO."""
    busy_s, slo_s = {"model": [[1, 0.1], [4, 0.1]]}, 0.5
    simulator = Simulator(
        make_plan(busy_s, [("model", None)], slo_s=slo_s),
        "family",
        make_records({"model": [0.5]}),
        {"a": make_profile(busy_s)},
    )
    rng = np.random.default_rng(3)
    simulation = simulator.run(draw_load(steps([(30.0, times * 40.0)], rng), 30.0, 1, rng))
    answered_s = simulation.latency_s[~np.isnan(simulation.latency_s)]
    in_time = np.count_nonzero(answered_s <= slo_s)
    assert in_time > 0.85 * 40 * 30
    assert len(answered_s) - in_time < 0.1 * len(answered_s)
    # what is refused counts as load
    assert simulation.tick_demand_per_s[simulation.tick_s < 30.0][-1] > 0.9 * times * 40.0


@pytest.mark.parametrize("times", [1.1, 1.3, 1.75])
def test_slight_overload_without_timeouts_is_not_served_late(times: float) -> None:
    """134 rows a second are answered in batches of 8; a queue of two of them drains every now and then."""
    busy_s, slo_s = {"model": [[1, 0.0107], [8, 0.0597]]}, 0.2
    plan = make_plan(busy_s, [("model", None)], slo_s=slo_s)
    simulator = Simulator(plan, "family", make_records({"model": [0.5]}), {"a": make_profile(busy_s)})
    rng = np.random.default_rng(3)
    simulation = simulator.run(draw_load(poisson(times * 134.0, 60.0, rng), 60.0, 1, rng))
    answered_s = simulation.latency_s[~np.isnan(simulation.latency_s)]
    assert np.count_nonzero(answered_s <= slo_s) > 0.85 * 134 * 60
    assert np.quantile(answered_s, 0.95) <= slo_s
