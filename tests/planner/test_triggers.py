from __future__ import annotations

from cascadeserve.gear_plan import LadderEntry, PlannedModel, Stage, Trigger
from planner.predict import THOROUGH
from planner.triggers import Device, greedy, trial_gear, tune
from tests.fakes.planned import FormulaPredictor

SMALL = PlannedModel(max_batch=48, busy_s=((1, 0.001), (48, 0.002)))
LARGE = PlannedModel(max_batch=32, busy_s=((1, 0.01), (32, 0.32)))
DEVICE = Device(models={"small": SMALL, "large": LARGE}, slots={"a": 1}, slo_s=0.1, layout="all")
CASCADE = LadderEntry(
    name="cascade", stages=(Stage(model="small", threshold=0.5), Stage(model="large")), reach=(1.0, 0.2)
)


def predictor(call_s: float = 0.0) -> FormulaPredictor:
    return FormulaPredictor(DEVICE.models, [CASCADE], DEVICE.slo_s, call_s=call_s)


def test_batches_are_powers_of_two_or_the_largest_there_is() -> None:
    assert DEVICE.largest_within("small", 1.0) == 48
    assert DEVICE.largest_within("large", 0.045) == 4
    assert DEVICE.largest_within("large", 0.0) == 1, "one row has to be sent, however long it takes"


def test_greedy_triggers_never_wait() -> None:
    assert greedy(CASCADE, DEVICE) == {
        "small": Trigger(min_batch=1, max_batch=48, max_wait_s=0.0),
        "large": Trigger(min_batch=1, max_batch=2, max_wait_s=0.0),
    }


def test_the_sustained_rate_is_the_highest_that_keeps_the_slo() -> None:
    formula = predictor()
    greedy_triggers = tune(CASCADE, DEVICE, formula)[0]
    gear = trial_gear(CASCADE, greedy_triggers.triggers, "all")
    assert formula.gear(gear, greedy_triggers.sustained_per_s, THOROUGH).keeps
    assert not formula.gear(gear, greedy_triggers.sustained_per_s * 1.02, THOROUGH).keeps


def test_eager_triggers_are_kept_beside_greedy_ones_where_calls_are_dear() -> None:
    greedy_triggers, eager = tune(CASCADE, DEVICE, predictor(call_s=0.02))
    assert all(trigger.min_batch == 1 for trigger in greedy_triggers.triggers.values())
    assert any(trigger.min_batch > 1 for trigger in eager.triggers.values())
    assert eager.sustained_per_s > 1.03 * greedy_triggers.sustained_per_s


def test_no_batch_is_longer_than_the_slo() -> None:
    for tuned in tune(CASCADE, DEVICE, predictor(call_s=0.02)):
        for model, trigger in tuned.triggers.items():
            assert DEVICE.models[model].batch_busy_s(trigger.max_batch) <= DEVICE.slo_s


def test_what_never_keeps_the_slo_is_left_out() -> None:
    hopeless = Device(models=DEVICE.models, slots={"a": 1}, slo_s=0.005, layout="all")
    assert tune(CASCADE, hopeless, FormulaPredictor(DEVICE.models, [CASCADE], 0.005)) == []
