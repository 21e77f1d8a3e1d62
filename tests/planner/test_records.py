from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascadeserve.errors import UsageError
from cascadeserve.gear_plan import LadderEntry, Stage
from planner.cascade_rows import cascade_answers, reach
from planner.records import CalibrationRecords, ModelAnswers, Provenance, Records, SearchRecords, problems

MODELS = ("a", "b", "c")
# few values, so that ties with a threshold are common; NaN is "no certainty"
CERTAINTIES = [0.0, 0.25, 0.5, 0.75, 1.0, float("nan")]


def make(rows: int, seed: int = 0) -> SearchRecords:
    rng = np.random.default_rng(seed)
    models = {
        name: ModelAnswers(
            label=rng.integers(0, 4, rows), certainty=rng.choice(np.array(CERTAINTIES, np.float32), size=rows)
        )
        for name in MODELS
    }
    return SearchRecords(family="tiny", models=models, truth=rng.integers(0, 4, rows), group_id=np.arange(rows))


def entry(*stages: tuple[str, float | None]) -> LadderEntry:
    return LadderEntry(
        name="e",
        stages=tuple(Stage(model=m, threshold=t) for m, t in stages),
        reach=(1.0,) + (0.0,) * (len(stages) - 1),
    )


@given(
    st.integers(1, 60),
    st.integers(0, 99),
    st.permutations(MODELS),
    st.lists(st.sampled_from(CERTAINTIES[:5]), max_size=2),
)
def test_a_cascade_answers_as_its_stages_do_one_row_at_a_time(
    rows: int, seed: int, order: list[str], thresholds: list[float]
) -> None:
    records = make(rows, seed)
    stages = [*zip(order, thresholds, strict=False), (order[len(thresholds)], None)]
    label, stage = cascade_answers(entry(*stages), records)
    for row in range(rows):
        for position, (model, threshold) in enumerate(stages):
            if threshold is None or records.models[model].certainty[row] >= threshold:
                assert (label[row], stage[row]) == (records.models[model].label[row], position)
                break
    assert label.dtype == np.int64
    assert stage.dtype == np.int32
    arrived = [int(np.sum(stage >= position)) / rows for position in range(len(stages))]
    assert reach(stage, len(stages)) == pytest.approx(arrived)


def test_thresholds_are_compared_as_float32() -> None:
    certainty = np.array([0.1], np.float32)  # slightly more than the float64 0.1
    answers = ModelAnswers(label=np.array([1]), certainty=certainty)
    last = ModelAnswers(label=np.array([2]), certainty=certainty)
    records = SearchRecords(family="f", models={"a": answers, "b": last}, truth=np.array([1]), group_id=np.array([0]))
    assert cascade_answers(entry(("a", 0.1), ("b", None)), records).label == 1
    # as float64 this threshold lies above the certainty, as float32 it is the same number
    just_above = float(certainty[0]) + 1e-10
    assert cascade_answers(entry(("a", just_above), ("b", None)), records).label == 1
    above = float(np.nextafter(certainty[0], np.float32(1)))
    assert cascade_answers(entry(("a", above), ("b", None)), records).label == 2


def test_evaluating_changes_no_records() -> None:
    records = make(50)
    before = records.digest()
    cascade_answers(entry(("a", 0.5), ("b", None)), records).label[:] = 9
    assert records.digest() == before


def test_a_model_that_was_not_recorded_is_named() -> None:
    with pytest.raises(UsageError, match="'e' uses the model 'z', but the records hold only a, b, c"):
        cascade_answers(entry(("a", 0.5), ("z", None)), make(3))


def test_rows_are_taken_with_everything_that_belongs_to_them() -> None:
    records = make(6)
    scores = np.arange(12, dtype=np.float16).reshape(6, 2)
    records.models["a"] = replace(records.models["a"], scores=scores, provenance=Provenance(digest="d"))
    for taken in (records.take(np.array([4, 1, 1])), records.take(np.array([4, 1, 1]))):
        assert type(taken) is SearchRecords
        assert len(taken) == 3
        assert taken.group_id.tolist() == [4, 1, 1]
        assert taken.models["a"].scores is not None
        assert taken.models["a"].scores.tolist() == scores[[4, 1, 1]].tolist()
        assert taken.models["a"].provenance.digest == "d"
        assert taken.models["b"].label.tolist() == records.models["b"].label[[4, 1, 1]].tolist()
    assert len(records.take(records.truth == records.truth[0])) == np.sum(records.truth == records.truth[0])


def test_the_digest_depends_on_all_content() -> None:
    one = make(5)
    a = one.models["a"]
    changed: list[Records] = [
        make(5, seed=1),
        make(4),
        replace(one, family="other"),
        replace(one, group_id=one.group_id + 1),
        replace(one, models=dict(reversed(one.models.items()))),
        replace(one, models={**one.models, "a": replace(a, provenance=Provenance(digest="d"))}),
        replace(one, models={**one.models, "a": replace(a, scores=np.zeros((5, 2), np.float16))}),
        CalibrationRecords(**vars(one)),
    ]
    digests = {records.digest() for records in [one, *changed]}
    assert len(digests) == 1 + len(changed)
    assert make(5).digest() == one.digest()
    assert one.take(np.arange(5)).digest() == one.digest()


def test_problems_name_the_array() -> None:
    assert [name for name, _ in problems(make(500))] == ["a/certainty", "b/certainty", "c/certainty"]
    assert [name for name, _ in problems(replace(make(1), models={}))] == ["models"]
