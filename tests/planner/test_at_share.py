from __future__ import annotations

import msgspec
import pytest

from planner.at_share import plan_at_share, slowed
from planner.planning import plan_family
from planner.profile import FrontCost, PairEntry, Profile, check_profile, work_rate
from tests.fakes.planned import FormulaPredictor, inputs, profile


def full_profile() -> Profile:
    pair = PairEntry(models=("small", "large"), batches=(4, 4), interval_s=(0.05, 0.05))
    front = FrontCost(request_s=1e-4, answer_s=2e-4, batch_s=3e-4, row_s=4e-4, path_s=5e-4)
    return profile(pairs=(pair,), front=front)


def test_all_of_the_time_is_the_device_itself() -> None:
    whole = profile()
    assert slowed(whole, 1.0) is whole


def test_with_half_of_the_time_everything_on_the_device_takes_twice_as_long() -> None:
    whole = full_profile()
    half = slowed(whole, 0.5)
    check_profile(half)
    assert half.models["large"].busy[0].busy_s == 2 * whole.models["large"].busy[0].busy_s
    assert half.models["large"].overhead_s == whole.models["large"].overhead_s
    # two models share what there is as they share a whole device
    assert work_rate(half, half.pairs[0]) == pytest.approx(work_rate(whole, whole.pairs[0]))
    assert half.front == FrontCost(request_s=2e-4, answer_s=4e-4, batch_s=6e-4, row_s=8e-4, path_s=5e-4)


def test_a_plan_for_a_share_says_what_devices_really_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planner.planning.SimulatedGears", FormulaPredictor.of)
    whole = plan_family(inputs(), None).families["tiny"]
    plan = plan_family(inputs(share=0.5), None)
    half = plan.families["tiny"]
    assert half.share == 0.5
    assert half.models["large"].busy_s == whole.models["large"].busy_s
    assert half.max_rate_per_s("all") == pytest.approx(whole.max_rate_per_s("all") / 2, rel=0.5)
    believed = plan_at_share(plan, "tiny").families["tiny"].models["large"]
    assert believed.batch_busy_s(8) == pytest.approx(2 * half.models["large"].batch_busy_s(8))


def test_a_plan_for_one_family_does_not_mention_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planner.planning.SimulatedGears", FormulaPredictor.of)
    plan = plan_family(inputs(), None)
    assert b"share" not in msgspec.json.encode(msgspec.structs.replace(plan.families["tiny"], expected=None))
    assert plan.families["tiny"].guaranteed_share == 1.0
    assert plan_at_share(plan, "tiny") is plan


def test_a_multiple_of_a_batch_of_the_reference_is_that_of_the_device_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planner.planning.SimulatedGears", FormulaPredictor.of)
    goal = msgspec.structs.replace(inputs().goal, slo_s=None, slo_per_reference_batch=20.0)
    slos = {plan_family(inputs(goal=goal, share=share), None).families["tiny"].slo_s for share in (1.0, 0.5)}
    assert len(slos) == 1
