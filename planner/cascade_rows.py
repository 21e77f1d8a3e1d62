"""What a cascade answers to recorded rows. Search and certificate evaluate cascades here and nowhere else."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cascadeserve.errors import UsageError
from cascadeserve.policy.escalation import accepted

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from cascadeserve.gear_plan import LadderEntry
    from planner.records import Records


class CascadeAnswers(NamedTuple):
    """For n rows: label int64 [n] of the answer, stage int32 [n] (from 0) that gave it."""

    label: NDArray[np.int64]
    stage: NDArray[np.int32]


def cascade_answers(entry: LadderEntry, records: Records) -> CascadeAnswers:
    """Answer every row as the orchestrator would.

    A row leaves at the first stage whose certainty is at least the threshold, both as float32; a NaN certainty goes on.
    The test is the one of `cascadeserve.policy.escalation`, which serving uses.

    Raises:
        UsageError: the records lack a model of the cascade.

    """
    for stage in entry.stages:
        if stage.model not in records.models:
            known = ", ".join(records.models)
            raise UsageError(f"{entry.name!r} uses the model {stage.model!r}, but the records hold only {known}")
    last = len(entry.stages) - 1
    label = records.models[entry.stages[last].model].label.copy()
    stage_of = np.full(len(label), last, dtype=np.int32)
    # From the last stage to the first, so that the first one that accepts a row has the last word.
    for position in range(last - 1, -1, -1):
        stage = entry.stages[position]
        answers = records.models[stage.model]
        takes = accepted(answers.certainty, stage.threshold)
        np.copyto(label, answers.label, where=takes)
        stage_of[takes] = position
    return CascadeAnswers(label=label, stage=stage_of)


def reach(stage: NDArray[np.int32], num_stages: int) -> tuple[float, ...]:
    """Share of the rows that reaches each of `num_stages` stages, from the answering stage [n]; the first is 1.0."""
    leaving = np.bincount(stage, minlength=num_stages)
    return tuple(float(share) for share in np.cumsum(leaving[::-1])[::-1] / len(stage))
