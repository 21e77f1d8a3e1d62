"""What an ensemble would come to: every model of a subset is asked, and the mean of their scores decides.

This is a figure to compare plans with, not a policy. Nothing here can be served: the orchestrator has no parallel
stages whose scores it would join. Triton could join them in an ensemble of its own; recorded and profiled as a model of
the family, that one is planned like any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations
from typing import TYPE_CHECKING

import numpy as np

from cascadeserve.errors import UsageError
from planner.front import pareto_front

if TYPE_CHECKING:
    from collections.abc import Mapping

    from planner.records import HeldOutRecords, SearchRecords

# every subset is tried, and of so many models there are 4,083
_MOST_MODELS = 12


@dataclass(frozen=True)
class EnsembleFigure:
    """Models that are all asked; `accuracy` of the mean of their scores, `work_s` in device-seconds per row."""

    models: tuple[str, ...]
    accuracy: float
    work_s: float


def mean_of_scores(records: SearchRecords | HeldOutRecords, row_work_s: Mapping[str, float]) -> list[EnsembleFigure]:
    """Ensembles of two models and more that no other one beats, from the most accurate to the cheapest.

    `row_work_s` is the device-seconds that one row costs, by model. Scores are averaged as they were recorded, in
    float32, and the first of the classes with the largest mean is the answer.

    Raises:
        UsageError: a model's scores were not kept, models have other classes, or there are too many models.

    """
    names = list(records.models)
    if len(names) > _MOST_MODELS:
        raise UsageError(f"ensembles of {len(names)} models are too many to try; take at most {_MOST_MODELS} models")
    scores = {}
    for name, answers in records.models.items():
        if answers.scores is None:
            raise UsageError(f"the records hold no scores of model {name!r}; record it anew, with scores")
        scores[name] = answers.scores.astype(np.float32)
    if len({array.shape[1] for array in scores.values()}) > 1:
        raise UsageError("the models have scores of different numbers of classes, of which there is no mean")
    found = []
    for size in range(2, len(names) + 1):
        for models in combinations(names, size):
            # the sum has its largest class where the mean has it
            total = np.sum([scores[name] for name in models], axis=0)
            right = np.argmax(total, axis=1) == records.truth
            found.append(EnsembleFigure(models, float(right.mean()), sum(row_work_s[name] for name in models)))
    return [found[i] for i in pareto_front([f.accuracy for f in found], [f.work_s for f in found])]
