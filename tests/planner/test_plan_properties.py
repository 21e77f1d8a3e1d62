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
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from benchmarks.fluid import FluidPredictor
from benchmarks.small_instances import FAMILY, small_instance
from cascadeserve.artefacts import write_json
from cascadeserve.gear_plan import read_gear_plan
from planner.infeasible import Infeasible
from planner.planning import plan_family
from planner.records import CalibrationRecords, SearchRecords
from planner.records_files import write_records
from tests.fakes.verifier import Device, Verifier

if TYPE_CHECKING:
    from cascadeserve.gear_plan import GearPlan
    from planner.inputs import Inputs

_ROWS = 800
# what ladders that are chosen anew for other batch sizes may differ by in accuracy
_LADDERS = 2e-3
# rates are found to this ratio
_RATES = 1.01

seeds = st.integers(0, 10**6)


@functools.lru_cache(maxsize=64)
def question(seed: int) -> Inputs:
    return small_instance(seed, num_rows=_ROWS)


def planned(inputs: Inputs, calibration: Path | None = None) -> GearPlan | None:
    try:
        return plan_family(inputs, calibration, predict=FluidPredictor)
    except Infeasible:
        return None


def with_goal(inputs: Inputs, **changes: float | None) -> Inputs:
    return replace(inputs, goal=msgspec.structs.replace(inputs.goal, **changes))


def rate_per_s(plan: GearPlan) -> float:
    return plan.families[FAMILY].max_rate_per_s(plan.layouts[-1].name)


def accuracy(plan: GearPlan) -> float:
    expected = plan.families[FAMILY].expected
    assert expected is not None
    return expected.accuracy


def verifier(plan: GearPlan, inputs: Inputs, calibration: CalibrationRecords | None = None) -> Verifier:
    devices = {
        each.name: Device(
            each.slots,
            each.memory_bytes,
            {name: model.memory_bytes for name, model in inputs.profiles[each.kind].models.items()},
        )
        for each in inputs.cluster.endpoints
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        write_json(path, plan)
        assert read_gear_plan(path, inputs.cluster) == plan
        document = json.loads(path.read_text())
    return Verifier(document, devices, inputs.search, inputs.prior, calibration)


@settings(max_examples=12)
@given(seeds)
def test_a_second_opinion_finds_nothing_wrong_with_a_plan(seed: int) -> None:
    inputs = question(seed)
    search = SearchRecords(**vars(inputs.search.take(range(_ROWS // 2))))
    held_out = CalibrationRecords(**vars(inputs.search.take(range(_ROWS // 2, _ROWS))))
    inputs = replace(inputs, search=search)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "calibration.npz"
        write_records(path, held_out)
        plan = planned(inputs, path)
    assume(plan is not None)
    assert plan is not None
    certified = plan.families[FAMILY].certificate is not None
    verifier(plan, inputs, held_out if certified else None).check()


def never_worse(before: Inputs, after: Inputs) -> None:
    """Goes as far and, as far as it went before, answers as many rows rightly."""
    plan = planned(before)
    assume(plan is not None)
    assert plan is not None
    other = planned(after)
    assert other is not None
    reached_per_s = rate_per_s(plan)
    assert rate_per_s(other) >= reached_per_s / _RATES
    asked = min(reached_per_s, rate_per_s(other))
    same = planned(with_goal(after, max_rate_per_s=asked))
    assert same is not None
    assert accuracy(same) >= accuracy(plan) - _LADDERS


@settings(max_examples=6)
@given(seeds, st.data())
def test_one_more_endpoint_is_never_worse(seed: int, data: st.DataObject) -> None:
    inputs = question(seed)
    like = data.draw(st.sampled_from(inputs.cluster.endpoints))
    extra = msgspec.structs.replace(like, name="extra", http="extra:1", grpc="extra:2", metrics="extra:3")
    cluster = msgspec.structs.replace(inputs.cluster, endpoints=(*inputs.cluster.endpoints, extra))
    never_worse(inputs, replace(inputs, cluster=cluster))


@settings(max_examples=6)
@given(seeds, st.floats(1.05, 3.0))
def test_a_looser_slo_is_never_worse(seed: int, factor: float) -> None:
    inputs = question(seed)
    slo_s = inputs.goal.slo_s
    assert slo_s is not None
    never_worse(inputs, with_goal(inputs, slo_s=factor * slo_s))
