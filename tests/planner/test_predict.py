from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from cascadeserve.gear_plan import Gear
from planner.predict import ROUGH, WHOLE, SimulatedGears
from tests.fakes.planned import goal, profile, records
from tests.fakes.tiny import plan

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cascadeserve.gear_plan import GearPlan
    from planner.profile import Profile
    from planner.simulator import Load

GEAR = Gear(name="trial", layout="broad", min_rate_per_s=0.0, max_rate_per_s=100.0, ladder_entry="reference")
NEXT = Gear(name="next", layout="broad", min_rate_per_s=100.0, max_rate_per_s=None, ladder_entry="cascade")


class Recorder:
    """In place of the simulator: keeps the loads, and answers as it is told."""

    def __init__(self, **outcome: Any) -> None:
        self.loads: list[Load] = []
        self.gears: Sequence[Gear] = ()
        self.devices: Mapping[str, Profile] = {}
        self.outcome: dict[str, Any] = {
            "latency_s": 0.1,
            "refused": 0,
            "cut": [False, False],
            "in_system_at_end": 0,
            "gear_at": lambda _: 0,
        } | outcome

    def __call__(self, plan: GearPlan, gears: Sequence[Gear], devices: Mapping[str, Profile]) -> Recorder:
        assert all(gear.layout in {layout.name for layout in plan.layouts} for gear in gears)
        self.gears, self.devices = gears, devices
        return self

    def run(self, load: Load, **_: Any) -> Any:
        self.loads.append(load)
        tick_s = np.arange(0.1, load.duration_s + 1.0, 0.1)
        return SimpleNamespace(
            quantiles_s=lambda shares: [share * self.outcome["latency_s"] for share in shares],
            refused=self.outcome["refused"],
            cut=np.array(self.outcome["cut"]),
            in_system_at_end=self.outcome["in_system_at_end"],
            busy_s={"a": 0.25 * load.duration_s, "b": load.duration_s},
            tick_s=tick_s,
            tick_gear=np.array([self.outcome["gear_at"](at_s) for at_s in tick_s]),
        )


def predictor(monkeypatch: pytest.MonkeyPatch, recorder: Recorder, **changes: Any) -> SimulatedGears:
    found = SimulatedGears(
        plan(), "family", goal(**changes), records(), {"a": profile(), "b": profile(slots=2)}, seed=3
    )
    monkeypatch.setattr(found, "_simulator", recorder)
    return found


def test_loads_of_two_rates_differ_in_nothing_but_their_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    found = predictor(monkeypatch, recorder)
    for rate_per_s in (10.0, 20.0):
        found.gear(GEAR, rate_per_s, ROUGH)
    slow, fast = recorder.loads
    assert slow.duration_s == 300.0
    np.testing.assert_allclose(slow.times_s, 2.0 * fast.times_s)
    np.testing.assert_array_equal(slow.row_index, fast.row_index)
    assert len(slow.times_s) == pytest.approx(3000, abs=200)


def test_rates_count_rows_and_arrivals_have_the_dispersion_of_the_goal(monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder()
    found = predictor(monkeypatch, recorder, min_rows_per_request=3, max_rows_per_request=5, dispersion=9.0)
    found.gear(GEAR, 40.0, ROUGH)
    load = recorder.loads[0]
    assert load.rows.sum() / load.duration_s == pytest.approx(40.0, rel=0.2)
    gaps_s = np.diff(load.times_s)
    assert gaps_s.std() / gaps_s.mean() == pytest.approx(3.0, rel=0.2)


@pytest.mark.parametrize(
    ("outcome", "keeps"),
    [
        ({}, True),
        ({"latency_s": 0.6}, False),  # the tiny plan's SLO is 0.5 s
        ({"refused": 1}, False),
        ({"cut": [False, True]}, False),
        ({"in_system_at_end": 15}, False),
    ],
)
def test_a_rate_is_kept_if_latency_refusals_and_queue_allow(
    outcome: dict[str, Any], keeps: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = predictor(monkeypatch, Recorder(**outcome)).gear(GEAR, 10.0, ROUGH)
    assert found.keeps == keeps
    assert found.utilisation == 0.5, "that of the busiest endpoint, over its slots"


def test_the_share_in_force_leaves_out_start_and_end(monkeypatch: pytest.MonkeyPatch) -> None:
    found = predictor(monkeypatch, Recorder(gear_at=lambda at_s: 1 if at_s < 20.0 or at_s > 600.0 else 0))
    assert found.share_in_force((GEAR, NEXT), 50.0) == 1.0
    assert found.share_in_force((GEAR, NEXT), 150.0) == 0.0


def test_a_gear_comes_down_or_latches(monkeypatch: pytest.MonkeyPatch) -> None:
    back = Recorder(gear_at=lambda at_s: 0 if at_s > 8.0 else 1)
    assert predictor(monkeypatch, back).comes_down((GEAR, NEXT), 50.0, 400.0)
    # calm, surge, calm
    counts = np.histogram(back.loads[0].times_s, [0.0, 2.0, 4.0, 15.0])[0]
    np.testing.assert_allclose(counts, [100, 800, 550], rtol=0.3)
    assert not predictor(monkeypatch, Recorder(gear_at=lambda _: 1)).comes_down((GEAR, NEXT), 50.0, 400.0)
    assert predictor(monkeypatch, Recorder(gear_at=lambda _: 1)).comes_down((GEAR, NEXT), 150.0, 400.0)


@pytest.mark.parametrize(
    ("endpoints", "most_rows_each", "requests"), [(2, 1, 200_000), (8, 1, 400_000), (8, 31, 200_000)]
)
def test_a_load_is_limited_in_requests(
    endpoints: int, most_rows_each: int, requests: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    recorder = Recorder()
    devices = {"a": profile(), "b": profile()} | {f"e{index}": profile() for index in range(endpoints - 2)}
    asked = goal(max_rows_per_request=most_rows_each)
    found = SimulatedGears(plan(), "family", asked, records(), devices, seed=3)
    monkeypatch.setattr(found, "_simulator", recorder)
    found.gear(GEAR, 1e6 * asked.mean_rows, WHOLE)
    assert len(recorder.loads[0].times_s) == pytest.approx(requests, rel=0.01)
