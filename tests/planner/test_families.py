from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from cascadeserve.cluster import CpuDevice, Endpoint
from cascadeserve.errors import UsageError
from planner.families import FamiliesPlanner
from planner.infeasible import Infeasible
from planner.records import CalibrationRecords
from planner.records_files import write_records
from tests.fakes.planned import FormulaPredictor, calibration, cluster
from tests.fakes.two_families import FAMILIES, both_inputs, both_profile, other_records

if TYPE_CHECKING:
    from pathlib import Path

    from cascadeserve.gear_plan import GearPlan
    from planner.inputs import Inputs

EVEN = {"max_rate_per_s": 60.0}


@pytest.fixture(autouse=True)
def _formula(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planner.planning.SimulatedGears", FormulaPredictor.of)


def plan(tiny: dict[str, Any] | None = None, other: dict[str, Any] | None = None, **shared: Any) -> GearPlan:
    return FamiliesPlanner(both_inputs(tiny or EVEN, other or EVEN, **shared)).plan({})


def shares(made: GearPlan) -> dict[str, float]:
    return {name: family.guaranteed_share for name, family in made.families.items()}


def limited(memory_bytes: int, rate_per_s: float) -> list[Inputs]:
    """One endpoint with so much memory, of which each model takes 100 bytes."""
    endpoints = tuple(msgspec.structs.replace(each, memory_bytes=memory_bytes) for each in cluster().endpoints)
    whole = both_profile()
    models = {
        name: msgspec.structs.replace(model, memory_bytes=100, load_s=0.1) for name, model in whole.models.items()
    }
    profiles = {"cpu": msgspec.structs.replace(whole, models=models)}
    limit = msgspec.structs.replace(cluster(), endpoints=endpoints)
    rate = {"max_rate_per_s": rate_per_s}
    return [replace(each, profiles=profiles, cluster=limit) for each in both_inputs(rate, rate)]


def test_two_families_share_the_time_and_one_layout() -> None:
    made = plan()
    assert list(made.families) == list(FAMILIES)
    assert sum(shares(made).values()) == pytest.approx(1.0)
    assert all(0.4 < share < 0.6 for share in shares(made).values())
    (layout,) = made.layouts
    assert layout.instances["a"].keys() == {"small", "large", "little", "big"}
    assert made.name == "tiny-other"
    for family in made.families.values():
        assert family.max_rate_per_s(layout.name) == 60.0
        assert all(gear.layout == layout.name for gear in family.gears)


def test_the_same_inputs_give_the_same_plan() -> None:
    assert msgspec.json.encode(plan()) == msgspec.json.encode(plan())


def test_the_family_with_more_to_do_has_more_time() -> None:
    found = shares(plan({"max_rate_per_s": 20.0}, {"max_rate_per_s": 100.0}))
    assert found["other"] > found["tiny"]
    assert sum(found.values()) == pytest.approx(1.0)


def test_a_heavier_family_is_more_accurate() -> None:
    loose = {"max_rate_per_s": 200.0, "max_epsilon": 0.2}
    even, heavy = plan(loose, loose), plan(loose | {"weight": 10.0}, loose)
    assert heavy.families["tiny"].guaranteed_share > even.families["tiny"].guaranteed_share


def test_each_family_is_certified_on_its_own_rows(tmp_path: Path) -> None:
    files = {name: tmp_path / f"{name}.npz" for name in FAMILIES}
    write_records(files["tiny"], calibration())
    write_records(files["other"], other_records(CalibrationRecords, seed=3))
    made = FamiliesPlanner(both_inputs(EVEN, EVEN)).plan(files)
    certificates = [family.certificate for family in made.families.values()]
    assert len({each.records_digest for each in certificates if each}) == 2
    assert made.made_from is not None
    assert {"calibration.tiny", "calibration.other"} <= made.made_from.digests.keys()


def test_where_the_simulator_finds_less_than_the_fluid_figures_a_family_gets_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def slower(*args: Any, **options: Any) -> FormulaPredictor:
        found = FormulaPredictor.of(*args, **options)
        if args[1] == "other":
            # calls of the second family cost what no profile says
            found.call_s = 0.015
        return found

    before = shares(plan())
    monkeypatch.setattr("planner.planning.SimulatedGears", slower)
    after = shares(plan())
    assert after["other"] > before["other"]
    assert sum(after.values()) == pytest.approx(1.0)


def test_a_rate_that_there_is_no_time_for_is_refused_with_the_family_and_what_it_lacks() -> None:
    with pytest.raises(Infeasible, match="family 'other' asks for 5000 rows/s, but even with all of the device time"):
        plan(EVEN, {"max_rate_per_s": 5000.0})
    with pytest.raises(Infeasible, match=r"\(tiny \d+%, other \d+%\): with what the others need, 'other' lacks \d+%"):
        plan({"max_rate_per_s": 150.0}, {"max_rate_per_s": 150.0})


def test_what_cannot_be_planned_together_is_refused() -> None:
    with pytest.raises(UsageError, match="family 'other' names no rate"):
        plan(EVEN, {"dispersion": 1.0})
    with pytest.raises(UsageError, match="family 'tiny' is to have the least latency, which is for one family"):
        plan({"slo_s": None, "below_reference": 0.01, "max_rate_per_s": 10.0}, EVEN)
    first, second = both_inputs(EVEN, EVEN)
    same = replace(second, search=replace(first.search, family="other"))
    with pytest.raises(UsageError, match="model 'small' is in the search records of 'tiny' and 'other'"):
        FamiliesPlanner([first, same])


def test_where_memory_binds_each_family_has_its_part_of_it() -> None:
    made = FamiliesPlanner(limited(400, 60.0)).plan({})
    assert sum(made.layouts[0].instances["a"].values()) == 4
    made = FamiliesPlanner(limited(200, 20.0)).plan({})
    held = made.layouts[0].instances["a"]
    assert sum(held.values()) == 2
    assert len(held.keys() & {"small", "large"}) == 1
    with pytest.raises(UsageError, match="'a'"):
        FamiliesPlanner(limited(150, 20.0)).plan({})


def test_batches_are_no_longer_than_a_quarter_of_what_another_family_promises() -> None:
    made = plan({"max_rate_per_s": 60.0, "slo_s": 1.0}, {"max_rate_per_s": 10.0, "slo_s": 0.1})
    large, big = made.families["tiny"].models["large"], made.families["other"].models["big"]
    assert large.max_batch == 2
    assert large.batch_busy_s(large.max_batch) <= 0.025
    assert big.max_batch == 16


def test_endpoints_of_several_kinds() -> None:
    second = Endpoint(
        name="b", grpc="127.0.0.1:9001", http="127.0.0.1:9000", metrics="127.0.0.1:9002", device=CpuDevice(cores=(1,)),
        device_kind="fast",
    )  # fmt: skip
    both = msgspec.structs.replace(cluster(), endpoints=(*cluster().endpoints, second))
    fast = both_profile(device_kind="fast")
    inputs = [
        replace(each, cluster=both, profiles=dict(each.profiles) | {"fast": fast}) for each in both_inputs(EVEN, EVEN)
    ]
    made = FamiliesPlanner(inputs).plan({})
    assert made.layouts[0].instances.keys() == {"a", "b"}
