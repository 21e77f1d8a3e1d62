from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from cascadeserve.errors import UsageError
from planner.ensembles import EnsembleFigure, mean_of_scores
from planner.records import ModelAnswers, SearchRecords

WORK_S = {"a": 1.0, "b": 2.0, "c": 4.0}


def records(**changes: Any) -> SearchRecords:
    """Three models that are each wrong on one row, where the others are right and surer."""
    right, wrong = [0.1, 0.8, 0.1], [0.5, 0.4, 0.1]
    models = {
        name: ModelAnswers(
            label=np.array([0 if row == at else 1 for row in range(4)]),
            certainty=np.zeros(4, np.float32),
            scores=np.array([wrong if row == at else right for row in range(4)], np.float16),
        )
        for at, name in enumerate("abc")
    }
    return SearchRecords(family="abc", models=models | changes, truth=np.ones(4, np.int64), group_id=np.arange(4))


def test_the_mean_of_the_scores_decides_and_all_models_are_paid_for() -> None:
    assert mean_of_scores(records(), WORK_S) == [EnsembleFigure(("a", "b"), 1.0, 3.0)]


def test_ensembles_that_no_other_beats_go_from_accurate_to_cheap() -> None:
    loud = replace(records().models["b"], scores=np.array([[0.9, 0.0, 0.1]] * 4, np.float16))
    found = mean_of_scores(records(b=loud), WORK_S)
    assert [figure.models for figure in found] == [("a", "c"), ("a", "b")]
    assert found[0].accuracy > found[1].accuracy


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"b": replace(records().models["b"], scores=None)}, "no scores of model 'b'"),
        ({"b": replace(records().models["b"], scores=np.zeros((4, 2), np.float16))}, "different numbers of classes"),
        (dict.fromkeys("defghijklmn", records().models["a"]), "too many to try"),
    ],
)
def test_what_has_no_mean_is_refused(changes: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        mean_of_scores(records(**changes), WORK_S)
