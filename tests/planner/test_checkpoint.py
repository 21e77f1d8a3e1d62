from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest

from planner.checkpoint import Checkpoint, RememberedPredictions
from planner.planning import plan_family
from planner.predict import CHECK, Prediction
from planner.triggers import greedy, trial_gear
from tests.fakes.planned import FormulaPredictor, goal, inputs
from tests.planner.test_triggers import CASCADE, DEVICE, predictor

if TYPE_CHECKING:
    from pathlib import Path

GEAR = trial_gear(CASCADE, greedy(CASCADE, DEVICE), "all")


class Counting(FormulaPredictor):
    """Counts what it is asked, and can be interrupted."""

    asked = 0
    ends_after = 10**9

    def gear(self, *args: Any) -> Prediction:
        type(self).asked += 1
        if type(self).asked > type(self).ends_after:
            raise KeyboardInterrupt
        return super().gear(*args)


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> type[Counting]:
    monkeypatch.setattr("planner.planning.SimulatedGears", Counting.of)
    monkeypatch.setattr(Counting, "asked", 0)
    monkeypatch.setattr(Counting, "ends_after", 10**9)
    return Counting


def test_what_was_said_is_not_asked_again(tmp_path: Path, counting: type[Counting]) -> None:
    formula = counting(DEVICE.models, [CASCADE], DEVICE.slo_s)
    file = tmp_path / "made" / "some.jsonl"
    for _ in range(2):
        remembered = RememberedPredictions(formula, file)
        # one that keeps, and one that is late without end
        for rate_per_s in (10.0, 1e6):
            assert remembered.gear(GEAR, rate_per_s, CHECK) == formula.gear(GEAR, rate_per_s, CHECK)
        gears = [msgspec.structs.replace(GEAR, max_rate_per_s=None)]
        assert remembered.share_in_force(gears, 10.0) == 1.0
        assert remembered.comes_down(gears, 10.0, 20.0)
    # two by the first, none by the second, and four here
    assert counting.asked == 6


def test_numbers_of_numpy_are_remembered_too(tmp_path: Path) -> None:
    class Numpy(FormulaPredictor):
        def gear(self, *args: Any) -> Prediction:
            found = super().gear(*args)
            return Prediction(*map(np.float64, list(vars(found).values())[:6]), keeps=np.bool_(found.keeps))  # type: ignore[arg-type]

    plain = predictor().gear(GEAR, 10.0, CHECK)
    for _ in range(2):
        found = RememberedPredictions(Numpy(DEVICE.models, [CASCADE], DEVICE.slo_s), tmp_path / "some.jsonl").gear(
            GEAR, 10.0, CHECK
        )
        assert found == plain
        assert type(found.keeps) is bool


def test_a_line_that_was_cut_off_is_asked_again(tmp_path: Path, counting: type[Counting]) -> None:
    formula = counting(DEVICE.models, [CASCADE], DEVICE.slo_s)
    file = tmp_path / "some.jsonl"
    for rate_per_s in (10.0, 20.0):
        RememberedPredictions(formula, file).gear(GEAR, rate_per_s, CHECK)
    whole = file.read_text()
    file.write_text(whole[:-9])
    again = RememberedPredictions(formula, file)
    again.gear(GEAR, 10.0, CHECK)
    again.gear(GEAR, 20.0, CHECK)
    assert counting.asked == 3
    assert file.read_text() == whole


def test_an_interrupted_plan_goes_on_and_comes_out_the_same(tmp_path: Path, counting: type[Counting]) -> None:
    whole = msgspec.json.encode(plan_family(inputs(), None))
    all_asked = counting.asked
    checkpoint = Checkpoint(tmp_path / "plan.json.partial")
    total = 0
    for ends_after in (all_asked // 3, all_asked // 3):
        counting.asked, counting.ends_after = 0, ends_after
        with pytest.raises(KeyboardInterrupt):
            plan_family(inputs(), None, checkpoint=checkpoint)
        total += counting.asked - 1
    counting.asked, counting.ends_after = 0, 10**9
    assert msgspec.json.encode(plan_family(inputs(), None, checkpoint=checkpoint)) == whole
    assert total + counting.asked == all_asked
    checkpoint.remove()
    assert list(tmp_path.iterdir()) == []


def test_other_inputs_ask_anew(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path)
    contents = [inputs(), inputs(seed=1), inputs(goal=goal(slo_s=0.2)), inputs(largest_batch={"small": 4, "large": 2})]
    files = {checkpoint.file([given.goal, given.seed, dict(given.largest_batch)]) for given in contents}
    assert len(files) == 4


def test_nothing_is_kept_where_nothing_was_predicted(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tmp_path / "none")
    RememberedPredictions(predictor(), checkpoint.file("what"))
    assert not checkpoint.folder.exists()
    checkpoint.remove()
