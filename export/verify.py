"""Holds what a Triton serves against what the models of a family answer in the framework they come from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cascadeserve.errors import CascadeServeError, ExportRefused
from export.ensemble import classifier_of, preprocessed
from export.family import NUM_PARITY_ROWS
from export.parity import (
    VARIANT_LIMITS,
    batch_difference,
    compared_numbers,
    count_wrong_labels,
    source_answers,
)
from export.reasons import reason_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from export.family import Family, FamilyModel
    from export.parity import Outputs, Run

# Between batches an answer may move by this share of what it may differ from its source.
_BATCH_SHARE = 0.1


@dataclass(frozen=True)
class Measured:
    """How far a served model is from its source over NUM_PARITY_ROWS rows.

    Errors are those of scores and certainty: the worst of all rows, and the mean over rows of a row's worst.
    `label_agreement` is a share of rows, `wrong_labels` counts those that differ though their classes are not tied.
    """

    max_abs_error: float
    mean_error: float
    label_agreement: float
    wrong_labels: int
    batch_difference: float


def expected_answers(family: Family, model: FamilyModel, rows: Outputs) -> Outputs:
    """What the source answers: label [n, 1], certainty [n, 1], scores [n, classes].

    Raises:
        ExportRefused: the family's own code fails.

    """
    return _of_family(model.name, lambda: _expected_answers(family, model, rows))


def _expected_answers(family: Family, model: FamilyModel, rows: Outputs) -> Outputs:
    if model.preprocessing is None:
        return source_answers(family, model, rows)
    return source_answers(*classifier_of(family, model), preprocessed(model, rows))


def sample_rows(family: Family) -> Outputs:
    """Rows of the family's sample, NUM_PARITY_ROWS of them, by input; errors as in `expected_answers`."""
    return _of_family("sample", lambda: family.checked_sample(NUM_PARITY_ROWS))


def _of_family(what: str, ask: Callable[[], Outputs]) -> Outputs:
    try:
        return ask()
    except CascadeServeError:
        raise
    except Exception as error:
        # whatever the family's code raises: one sentence says where
        raise ExportRefused(f"{what}: {type(error).__name__}: {reason_of(error)}") from error


def measure(model: FamilyModel, expected: Outputs, run: Run, rows: Outputs, tolerance: float) -> Measured:
    """Put the rows to a served model in batches of several sizes and beside several others.

    `run(rows, size)` returns label and certainty [n, 1], and scores [n, classes] where the model gives them; one that
    keeps them to itself is held to its certainties.

    Raises:
        ExportRefused: outputs have another shape than the source's.

    """

    def run_within(rows: Outputs, size: int) -> Outputs:
        return run(rows, min(size, model.max_batch_size))

    answers = run_within(rows, model.max_batch_size)
    for name, array in expected.items():
        if name in answers and answers[name].shape != array.shape:
            raise ExportRefused(
                f"{model.name}: its {name} are {list(answers[name].shape)}, the source's are {list(array.shape)}; "
                "export it again"
            )
    errors = np.concatenate(
        [np.abs(answers[name].astype(np.float64) - expected[name]) for name in compared_numbers(answers)], axis=1
    ).max(axis=1)
    return Measured(
        max_abs_error=float(errors.max()),
        mean_error=float(errors.mean()),
        label_agreement=float(np.mean(answers["label"] == expected["label"])),
        wrong_labels=count_wrong_labels(expected, answers, tolerance),
        batch_difference=batch_difference(model, run_within, rows, answers),
    )


def verdict(model: FamilyModel, measured: Measured, tolerance: float) -> str | None:
    """Say what is wrong with a served model, after its name; None if nothing is.

    A variant is held to VARIANT_LIMITS, anything else to `tolerance` and to every label.
    """
    if model.variant is not None:
        limits = VARIANT_LIMITS[model.variant]
        if not (measured.mean_error <= limits.mean_error and measured.label_agreement >= limits.label_agreement):
            return (
                f"gives the source's label on {measured.label_agreement:.4f} of {NUM_PARITY_ROWS} rows, with scores "
                f"{measured.mean_error:.2e} off on average, wanted of {model.variant} are {limits.label_agreement:g} "
                f"and at most {limits.mean_error:g}; export the family again"
            )
    elif not measured.max_abs_error <= tolerance:
        return (
            f"scores differ from the source's by up to {measured.max_abs_error:.2e}, allowed are {tolerance:.0e}; "
            "export the family again, or raise --tolerance if its device sums in another order"
        )
    elif measured.wrong_labels:
        return f"{measured.wrong_labels} of {NUM_PARITY_ROWS} labels differ from the source's; export the family again"
    if not measured.batch_difference <= tolerance * _BATCH_SHARE:
        return (
            f"a row's scores change by up to {measured.batch_difference:.2e} with the rows it shares a batch with, "
            f"allowed are {tolerance * _BATCH_SHARE:.0e}; certificates need answers that depend on the row alone: "
            "export the family again, or raise --tolerance if its device sums in another order"
        )
    return None
