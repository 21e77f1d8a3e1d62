from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import pytest

from cascadeserve.gear_plan import Gear, Layout
from planner.predict import CHECK, ROUGH, THOROUGH, WHOLE, SimulatedGears
from planner.sampling import Sample, sample
from tests.fakes.planned import goal, profile, records
from tests.fakes.tiny import plan

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cascadeserve.gear_plan import GearPlan
    from planner.predict import Effort
    from planner.profile import Profile

# the first run compiles the simulator
pytestmark = pytest.mark.timeout(240)

GEAR = Gear(name="trial", layout="all", min_rate_per_s=0.0, max_rate_per_s=None, ladder_entry="cascade", degraded=True)
BOTH = {"small": 1, "large": 1}


def on(instances: Mapping[str, dict[str, int]]) -> GearPlan:
    """The tiny plan with one layout."""
    return msgspec.structs.replace(plan(), layouts=(Layout(name="all", instances=dict(instances)),))


def sampled(made: GearPlan, devices: Mapping[str, Profile], most: int, gear: Gear = GEAR) -> Sample | None:
    return sample(made, made.families["family"], [gear], gear, devices, most)


def names(count: int, first: str = "e") -> list[str]:
    return [f"{first}{index}" for index in range(count)]


def test_endpoints_that_are_alike_stand_for_each_other() -> None:
    alike = profile()
    made = on(dict.fromkeys(names(16), BOTH))
    found = sampled(made, dict.fromkeys(names(16), alike), 4)
    assert found is not None
    assert list(found.layout.instances) == names(4)
    assert found.share == pytest.approx(0.25)


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_small_cluster_is_left_as_it_is(count: int) -> None:
    assert sampled(on(dict.fromkeys(names(count), BOTH)), dict.fromkeys(names(count), profile()), 4) is None


def test_kinds_of_devices_are_in_proportion() -> None:
    fast, slow = profile(), profile(device_kind="l4")
    devices = dict.fromkeys(names(24, "fast"), fast) | dict.fromkeys(names(8, "slow"), slow)
    made = on(dict.fromkeys(devices, BOTH))
    # four times slower
    family = made.families["family"]
    models = {
        name: msgspec.structs.replace(
            model, busy_s_on={other: tuple((n, 4 * s) for n, s in model.busy_s) for other in names(8, "slow")}
        )
        for name, model in family.models.items()
    }
    made = msgspec.structs.replace(made, families={"family": msgspec.structs.replace(family, models=models)})
    found = sampled(made, devices, 4)
    assert found is not None
    assert list(found.layout.instances) == names(6, "fast") + names(2, "slow")
    assert found.share == pytest.approx(0.25)
    odd = {name: each for name, each in devices.items() if name not in names(8, "slow")[1:]}
    found = sampled(msgspec.structs.replace(made, layouts=(on(dict.fromkeys(odd, BOTH)).layouts[0],)), odd, 4)
    assert found is not None
    assert list(found.layout.instances) == names(8, "fast"), "one slow one among 24 does not count"
    assert found.share == pytest.approx(8 / 24.25)


def test_what_only_a_few_endpoints_have_keeps_its_proportion() -> None:
    instances = {name: {"small": 1} for name in names(18)} | {name: {"large": 1} for name in names(3, "l")}
    found = sampled(on(instances), dict.fromkeys(instances, profile()), 2)
    assert found is not None
    assert list(found.layout.instances) == [*names(6), "l0"]
    assert found.share == pytest.approx(1 / 3)
    del instances["l1"], instances["l2"]
    assert sampled(on(instances), dict.fromkeys(instances, profile()), 2) is None, "the only one with this model"


def test_endpoints_with_other_weights_are_not_alike() -> None:
    made, devices = on(dict.fromkeys(names(16), BOTH)), dict.fromkeys(names(16), profile())
    weights = {name: 2.0 if name in names(4) else 1.0 for name in names(16)}
    found = sampled(made, devices, 2, msgspec.structs.replace(GEAR, load={"small": weights}))
    assert found is not None
    assert list(found.layout.instances) == ["e0", "e4", "e5", "e6"]


def test_gears_of_several_layouts_are_simulated_as_they_are() -> None:
    made = plan()
    devices = dict.fromkeys(names(16), profile())
    gears = made.families["family"].gears
    assert sample(made, made.families["family"], gears, gears[0], devices, 1) is None


def simulated(count: int) -> SimulatedGears:
    made = on(dict.fromkeys(names(count), BOTH))
    return SimulatedGears(made, "family", goal(), records(), dict.fromkeys(names(count), profile()), seed=3)


@pytest.mark.parametrize("effort", [ROUGH, THOROUGH, CHECK])
def test_a_sample_says_what_the_whole_cluster_does(effort: Effort) -> None:
    predictor, rate_per_s = simulated(16), 16 * 100.0
    of_sample, of_all = (predictor.gear(GEAR, rate_per_s, each) for each in (effort, WHOLE))
    assert of_sample.rate_per_s == of_all.rate_per_s == rate_per_s
    assert of_sample.p50_s == pytest.approx(of_all.p50_s, rel=0.1)
    assert of_sample.utilisation == pytest.approx(of_all.utilisation, rel=0.1)
    assert of_sample.keeps
    assert of_all.keeps
    assert not predictor.gear(GEAR, 10 * rate_per_s, effort).keeps


def test_gears_are_switched_at_the_rates_of_the_sample() -> None:
    lower = msgspec.structs.replace(GEAR, name="lower", max_rate_per_s=800.0, degraded=False)
    upper = msgspec.structs.replace(GEAR, name="upper", min_rate_per_s=800.0)
    predictor = simulated(16)
    assert predictor.share_in_force([lower, upper], 500.0) == 1.0
    assert predictor.share_in_force([lower, upper], 1600.0) == 1.0
    assert predictor.comes_down([lower, upper], 400.0, 2000.0)


def test_a_sample_has_room_for_all_that_may_come_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def most_only(*args: object) -> None:
        asked.append(args[-1])  # type: ignore[arg-type]

    monkeypatch.setattr("planner.predict.sample", most_only)
    for changes in ({}, {"max_rows_per_request": 64}, {"max_rows_per_request": 2, "dispersion": 50.0}):
        made, devices = on({"e0": BOTH}), {"e0": profile()}
        predictor = SimulatedGears(made, "family", goal(**changes), records(), devices, seed=3)
        predictor.gear(GEAR, 10.0, ROUGH)
    assert asked == [4, 16, 25]
