"""What holds of every plan, whatever the family, the cluster and the goal; the questions are small and random.

Nearly all ask a predictor that is a formula (`benchmarks.fluid`), so that nothing is due to chance.
"""

from __future__ import annotations

import functools
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from benchmarks.fluid import FluidPredictor
from benchmarks.small_instances import FAMILY, small_instance
from cascadeserve.artefacts import write_json
from cascadeserve.gear_plan import read_gear_plan
from planner.gears import GEAR_PRICE
from planner.infeasible import Infeasible
from planner.planning import plan_family
from planner.rank_layouts import LAYOUT_PRICE
from planner.records import CalibrationRecords, SearchRecords
from planner.records_files import write_records
from tests.fakes.planned import calibration, cluster, goal, inputs, profile
from tests.fakes.verifier import Device, Verifier

if TYPE_CHECKING:
    from cascadeserve.gear_plan import GearPlan
    from planner.inputs import Inputs

_ROWS = 600
# rates are found to this ratio
_RATES = 1.01
_ROUNDING = 1e-9

seeds = st.integers(0, 10**6)


@functools.lru_cache(maxsize=64)
def question(seed: int) -> Inputs:
    return small_instance(seed, num_rows=_ROWS)


def planned(asked: Inputs, rows: Path | None = None) -> GearPlan | None:
    try:
        return plan_family(asked, rows, predict=FluidPredictor)
    except Infeasible:
        return None


def with_goal(asked: Inputs, **changes: float | None) -> Inputs:
    return replace(asked, goal=msgspec.structs.replace(asked.goal, **changes))


def rate_per_s(plan: GearPlan) -> float:
    return plan.families[FAMILY].max_rate_per_s(plan.layouts[-1].name)


def accuracy(plan: GearPlan) -> float:
    expected = plan.families[FAMILY].expected
    assert expected is not None
    return expected.accuracy


def worth(plan: GearPlan) -> float:
    """What the planner is after: accuracy over rows, less the prices of gears and layouts."""
    gears = [gear for gear in plan.families[FAMILY].gears if not gear.degraded]
    return accuracy(plan) - GEAR_PRICE * len(gears) - LAYOUT_PRICE * (len(plan.layouts) - 1)


def verifier(plan: GearPlan, asked: Inputs, held_out: CalibrationRecords | None = None) -> Verifier:
    devices = {
        each.name: Device(
            each.slots,
            each.memory_bytes,
            {name: model.memory_bytes for name, model in asked.profiles[each.kind].models.items()},
        )
        for each in asked.cluster.endpoints
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        write_json(path, plan)
        assert read_gear_plan(path, asked.cluster) == plan
        document = json.loads(path.read_text())
    return Verifier(document, devices, asked.search, asked.prior, held_out)


@settings(max_examples=10)
@given(seeds)
def test_a_second_opinion_finds_nothing_wrong_with_a_plan(seed: int) -> None:
    asked = question(seed)
    search = SearchRecords(**vars(asked.search.take(range(_ROWS // 2))))
    held_out = CalibrationRecords(**vars(asked.search.take(range(_ROWS // 2, _ROWS))))
    asked = replace(asked, search=search)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "calibration.npz"
        write_records(path, held_out)
        plan = planned(asked, path)
    assume(plan is not None)
    assert plan is not None
    certified = plan.families[FAMILY].certificate is not None
    verifier(plan, asked, held_out if certified else None).check()


def never_worse(before: Inputs, after: Inputs, *, rate_ratio: float = _RATES) -> None:
    """Goes as far and, as far as it went before, is worth as much."""
    plan = planned(before)
    assume(plan is not None)
    assert plan is not None
    other = planned(after)
    assert other is not None
    reached_per_s = rate_per_s(plan)
    assert rate_per_s(other) >= reached_per_s / rate_ratio
    both_per_s = min(reached_per_s, rate_per_s(other))
    same = planned(with_goal(after, max_rate_per_s=both_per_s))
    assert same is not None
    assert worth(same) >= worth(plan) - _ROUNDING


@settings(max_examples=4)
@given(seeds, st.data())
def test_one_more_endpoint_is_never_worse(seed: int, data: st.DataObject) -> None:
    asked = question(seed)
    like = data.draw(st.sampled_from(asked.cluster.endpoints))
    extra = msgspec.structs.replace(like, name="extra", http="extra:1", grpc="extra:2", metrics="extra:3")
    larger = msgspec.structs.replace(asked.cluster, endpoints=(*asked.cluster.endpoints, extra))
    never_worse(asked, replace(asked, cluster=larger))


@settings(max_examples=4)
@given(seeds, st.floats(1.05, 3.0))
def test_a_looser_slo_is_never_worse(seed: int, factor: float) -> None:
    """The ladder is the same; triggers are climbed to, which may end a few per cent lower on another way."""
    asked = question(seed)
    slo_s = asked.goal.slo_s
    assert slo_s is not None
    never_worse(asked, with_goal(asked, slo_s=factor * slo_s), rate_ratio=1.05)


# the first run compiles the simulator
@pytest.mark.timeout(240)
def test_a_second_opinion_finds_nothing_wrong_with_two_layouts_that_were_simulated(tmp_path: Path) -> None:
    write_records(tmp_path / "calibration.npz", calibration())
    known = profile(device_kind="cpu")
    sizes = {"small": 1, "large": 3}
    models = {
        name: msgspec.structs.replace(model, memory_bytes=sizes[name], load_s=2.0)
        for name, model in known.models.items()
    }
    (one,) = cluster().endpoints
    endpoints = tuple(
        msgspec.structs.replace(one, name=name, memory_bytes=3, http=f"{name}:1", grpc=f"{name}:2", metrics=f"{name}:3")
        for name in "ab"
    )
    given = inputs(
        goal=goal(max_epsilon=0.2),
        prior=((20.0, 0.495), (40.0, 0.495), (1000.0, 0.01)),
        profiles={"cpu": msgspec.structs.replace(known, models=models)},
        cluster=msgspec.structs.replace(cluster(), endpoints=endpoints),
    )
    plan = plan_family(given, tmp_path / "calibration.npz")
    assert len(plan.layouts) == 2
    verifier(plan, given, calibration()).check()
