from __future__ import annotations

import json
from itertools import product

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascadeserve.gear_plan import Stage
from cascadeserve.policy.escalation import accepted
from planner.records import ModelAnswers
from planner.search_grid import cuts_between, on_grid, quantile_axis, ranked

ANY_FLOAT32 = st.floats(width=32)
CLOSE_FLOAT32 = st.integers(0, 8).map(lambda ulps: float(np.float32(0.5) + ulps * np.finfo(np.float32).eps / 2))


@given(st.lists(ANY_FLOAT32 | CLOSE_FLOAT32, max_size=20))
def test_a_cut_lies_strictly_between_certainties_and_survives_json(values: list[float]) -> None:
    certainty = np.array(values, np.float32)
    answers = ModelAnswers(label=np.zeros(len(values), np.int64), certainty=certainty)
    model = ranked(answers, np.zeros(len(values), np.int64))
    assert not np.isin(model.cuts, certainty).any()
    assert (np.diff(model.cuts) > 0).all()
    for index, cut in enumerate(model.cuts):
        stage = Stage(model="m", threshold=float(cut))
        stored = msgspec.json.decode(msgspec.json.encode(stage), type=Stage)
        assert stored.threshold == json.loads(json.dumps(float(cut))) == float(cut)
        taken = accepted(certainty, stored.threshold)
        assert taken.tolist() == (model.rank > index).tolist()
        assert 0 < taken.sum() < len(values)


def test_stepped_certainties_have_one_cut_between_steps() -> None:
    assert cuts_between(np.array([0.5, 1.0, 0.5, 0.0, 1.0], np.float32)).tolist() == [0.25, 0.75]


@pytest.mark.parametrize(
    "values",
    [
        [],
        [0.5, 0.5, 0.5],
        [np.nan, np.nan],
        [np.nan, 0.5],
        [0.0, -0.0],
        [0.5, np.nextafter(np.float32(0.5), np.float32(1))],  # no float32 between the two
        [-np.inf, 0.5, np.inf],
        [2e9, 3e9],  # beyond what a gear plan holds
    ],
)
def test_where_nothing_can_be_told_apart_there_is_no_cut(values: list[float]) -> None:
    assert len(cuts_between(np.array(values, np.float32))) == 0


def test_nan_is_taken_by_no_cut() -> None:
    answers = ModelAnswers(label=np.zeros(3, np.int64), certainty=np.array([np.nan, 0.2, 0.4], np.float32))
    assert ranked(answers, np.zeros(3, np.int64)).rank.tolist() == [0, 0, 1]


def test_an_axis_follows_the_quantiles_of_the_rows() -> None:
    rng = np.random.default_rng(1)
    certainty = rng.random(10_000, np.float32) ** 8
    model = ranked(ModelAnswers(np.zeros(10_000, np.int64), certainty), np.zeros(10_000, np.int64))
    axis = quantile_axis(model, 11)
    assert axis[[0, -1]].tolist() == [0, len(model.cuts) - 1]
    assert np.allclose(model.cuts[axis], np.quantile(certainty, np.arange(11) / 10), rtol=0.05, atol=1e-5)


def test_a_step_that_most_rows_stand_on_is_one_cut_of_an_axis() -> None:
    certainty = np.concatenate((np.full(9_000, 0.5), np.linspace(0, 0.4, 500), np.linspace(0.6, 1, 500)))
    model = ranked(ModelAnswers(np.zeros(10_000, np.int64), certainty.astype(np.float32)), np.zeros(10_000, np.int64))
    axis = quantile_axis(model, 32)
    assert len(np.unique(axis)) == len(axis) < 32
    assert axis[0] >= 0


@pytest.mark.parametrize("num_models", [1, 2, 3, 4])
def test_the_grid_counts_what_stage_by_stage_evaluation_counts(num_models: int) -> None:
    rng = np.random.default_rng(num_models)
    truth = rng.integers(0, 2, 60)
    answers = [
        ModelAnswers(rng.integers(0, 2, 60), rng.integers(0, 5, 60).astype(np.float32)) for _ in range(num_models)
    ]
    answers[0].certainty[7] = np.nan
    models = [ranked(one, truth) for one in answers]
    axes = [quantile_axis(model, 9) for model in models[:-1]]
    outcome = on_grid(models, axes)
    for place in product(*(range(len(axis)) for axis in axes)):
        thresholds = [float(model.cuts[axis[i]]) for model, axis, i in zip(models, axes, place, strict=False)]
        waiting, correct = np.ones(60, bool), 0
        for stage, (one, threshold) in enumerate(zip(answers, [*thresholds, None], strict=True)):
            assert outcome.reach[stage][place] == waiting.sum()
            taken = waiting & accepted(one.certainty, threshold)
            correct += (one.label[taken] == truth[taken]).sum()
            waiting &= ~taken
        assert outcome.correct[place] == correct
