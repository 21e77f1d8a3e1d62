"""Checks that a model does what its source does, and that a row's answer depends on that row alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from cascadeserve.errors import ExportRefused
from export.family import NUM_PARITY_ROWS
from export.heads import answers_of
from export.reasons import reason_of
from export.sources import ORT_ERRORS, batches, in_batches, open_session, open_source
from export.temperature import with_fitted_temperature

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    import onnxruntime as ort
    from numpy.typing import NDArray

    from export.family import Family, FamilyModel, Variant
    from export.sources import Source

    Outputs = dict[str, NDArray[Any]]
    # answers of a model to rows that are put to it in batches of a size
    Run = Callable[[Outputs, int], Outputs]

# Scores of one row may differ by this much with the size of its batch: kernels sum in another order then.
BATCH_TOLERANCE = 1e-5
_ADVICE: dict[Variant, str] = {
    "optimised": "drop this variant",
    "fp16": "drop this variant, or keep values within what FP16 holds (65504)",
    "int8": "give quantisation_rows that look like what will be served, or drop this variant",
    "tensorrt": "drop this variant",
}


@dataclass(frozen=True)
class Limits:
    """How far a variant may be from its float model: share of labels, and mean over rows of a row's worst score.

    The mean, since rows near a tie may move far and are what `label_agreement` counts.
    """

    label_agreement: float
    mean_error: float


# An exact form is held to what other kernels and orders of sums do. The digits models are ten times within the others.
VARIANT_LIMITS: dict[Variant, Limits] = {
    "optimised": Limits(0.995, 1e-4),
    "fp16": Limits(0.995, 0.005),
    "int8": Limits(0.97, 0.05),
    # FP16 on the GPU; what an export writes is the float model itself
    "tensorrt": Limits(0.995, 0.005),
}


# by which a probability may miss the range from 0 to 1: half precision
_ROUNDING = 1e-2


@dataclass(frozen=True)
class Parity:
    """Largest differences over NUM_PARITY_ROWS rows; `label_agreement` is a share of rows.

    The differences are of scores and certainties; of certainties alone where the model returns no scores.
    """

    max_abs_error: float
    label_agreement: float
    max_batch_difference: float


def check_parity(family: Family, model: FamilyModel, source: Source, onnx_model: bytes, tolerance: float) -> Parity:
    """Hold the exported model against its source and against itself in other batches.

    What the head should make of the source's answers is worked out in numpy.

    Raises:
        ExportRefused: naming the model, what was measured and what is allowed.

    """
    rows = family.checked_sample(NUM_PARITY_ROWS)
    values = in_batches(source.run, rows, model.max_batch_size)
    if values.shape != (NUM_PARITY_ROWS, family.classes):
        raise ExportRefused(
            f"{model.name}: returns {model.head.output} of shape {list(values.shape)} for {NUM_PARITY_ROWS} rows, "
            f"but the family has {family.classes} classes"
        )
    if model.head.output == "probabilities" and not (values.min() >= -_ROUNDING and values.max() <= 1 + _ROUNDING):
        raise ExportRefused(
            f"{model.name}: its output is said to be probabilities, but it has values from {values.min():.3g} to "
            f'{values.max():.3g}; say output = "logits"'
        )
    wanted = answers_of(values, model.head)
    if not np.isfinite(wanted["scores"]).all():
        raise ExportRefused(f"{model.name}: gives scores that are no numbers for rows of the family's sample")
    # One by one too: code that looks at its batch, or branches on values, is told here from a wrong export.
    alone = answers_of(in_batches(source.run, rows, 1), model.head)
    _refuse_batch_dependence(model, _max_difference(wanted["scores"], alone["scores"]), tolerance)
    try:
        return _compare(family, model, source.framework, wanted, rows, onnx_model, tolerance)
    except ORT_ERRORS as error:
        raise ExportRefused(
            f"{model.name}: the exported model does not run on every batch size ({reason_of(error)}); look for code "
            "that fixes the batch size or ignores an input"
        ) from error


def _compare(
    family: Family,
    model: FamilyModel,
    framework: str,
    wanted: Outputs,
    rows: Outputs,
    onnx_model: bytes,
    tolerance: float,
) -> Parity:
    session = open_session(onnx_model)
    if unused := {spec.name for spec in family.inputs} - {entry.name for entry in session.get_inputs()}:
        raise ExportRefused(f"{model.name}: does not use the input {min(unused)!r}, so it is not in its graph")
    run = partial(_run_onnx, session)
    exported = run(rows, model.max_batch_size)
    max_abs_error = _largest(_max_difference(wanted[name], exported[name]) for name in compared_numbers(exported))
    if not max_abs_error <= tolerance:
        raise ExportRefused(
            f"{model.name}: scores differ from {framework}'s by up to {max_abs_error:.2e}, allowed are {tolerance:.0e}"
            "; look for operators that export differently, or raise --tolerance if this is wanted"
        )
    if wrong := count_wrong_labels(wanted, exported, tolerance):
        raise ExportRefused(f"{model.name}: {wrong} of {NUM_PARITY_ROWS} labels differ from {framework}'s")
    difference = _check_batches(model, run, rows, exported)
    return Parity(max_abs_error, float(np.mean(wanted["label"] == exported["label"])), difference)


def check_variant(family: Family, model: FamilyModel, float_model: bytes, onnx_model: bytes) -> Parity:
    """Hold a variant against its float model, within VARIANT_LIMITS, and against itself in other batches.

    Raises:
        ExportRefused: naming the model, what was measured and what is allowed.

    """
    if model.variant is None:
        raise ValueError(f"{model.name} is no variant")  # a mistake of the caller, not of the family
    rows = family.checked_sample(NUM_PARITY_ROWS)
    try:
        wanted = _run_onnx(open_session(float_model), rows, model.max_batch_size)
        run = partial(_run_onnx, open_session(onnx_model))
        found = run(rows, model.max_batch_size)
        name = compared_numbers(found)[0]
        errors = np.abs(wanted[name].astype(np.float64) - found[name]).max(axis=1)
        agreement = float(np.mean(wanted["label"] == found["label"]))
        _refuse_beyond_limits(model.name, model.variant, float(errors.mean()), agreement)
        return Parity(float(errors.max()), agreement, _check_batches(model, run, rows, found))
    except ORT_ERRORS as error:
        raise ExportRefused(
            f"{model.name}: its {model.variant} variant does not run on every batch size ({reason_of(error)}); "
            "drop this variant"
        ) from error


def _refuse_beyond_limits(name: str, variant: Variant, mean_error: float, agreement: float) -> None:
    limits = VARIANT_LIMITS[variant]
    if not (mean_error <= limits.mean_error and agreement >= limits.label_agreement):
        raise ExportRefused(
            f"{name}: its {variant} variant gives the float model's label on {agreement:.4f} of {NUM_PARITY_ROWS} rows,"
            f" with scores {mean_error:.2e} off on average, wanted are {limits.label_agreement:g} and at most "
            f"{limits.mean_error:g}; {_ADVICE[variant]}"
        )


def _check_batches(model: FamilyModel, run: Run, rows: Outputs, exported: Outputs) -> float:
    """Refuse a model whose answers depend on the batch, whatever its variant; returns the largest difference."""
    difference = batch_difference(model, run, rows, exported)
    _refuse_batch_dependence(model, difference, BATCH_TOLERANCE)
    return difference


def batch_difference(model: FamilyModel, run: Run, rows: Outputs, answers: Outputs) -> float:
    """Largest difference of a row's scores with the size of its batch and with the rows beside it.

    `answers` are those of full batches.
    """
    others = [_difference(answers, run(rows, size)) for size in _other_sizes(model)]
    return _largest([*others, *_differences_beside_others(run, rows, answers, model.max_batch_size)])


def source_answers(family: Family, model: FamilyModel, rows: Outputs) -> Outputs:
    """Answers of the source, in full batches, with the head: label and certainty [n, 1], scores [n, classes]."""
    source = open_source(family, model)
    head = with_fitted_temperature(family, model, source).head
    return answers_of(in_batches(source.run, rows, model.max_batch_size), head)


def count_wrong_labels(wanted: Outputs, found: Outputs, tolerance: float) -> int:
    """Rows with another label than wanted; where two classes are tied within the tolerance, either label is right."""
    best = np.sort(wanted["scores"], axis=1)[:, -2:]
    tied = best[:, 1] - best[:, 0] <= 2 * tolerance
    return int(np.count_nonzero((wanted["label"] != found["label"]).reshape(-1) & ~tied))


def _refuse_batch_dependence(model: FamilyModel, difference: float, allowed: float) -> None:
    if not difference <= allowed:
        raise ExportRefused(
            f"{model.name}: a row's scores change by up to {difference:.2e} with the rows it shares a batch with, "
            f"allowed are {allowed:.0e}; certificates need answers that depend on the row alone (batch statistics, "
            "branches on values and dynamic quantisation do not give them)"
        )


def _other_sizes(model: FamilyModel) -> list[int]:
    return sorted({1, 3, min(8, model.max_batch_size)})


def _differences_beside_others(run: Run, rows: Outputs, exported: Outputs, size: int) -> list[float]:
    """The same rows in batches of other neighbours: shuffled, and beside rows far from any data."""
    order = np.random.default_rng(0).permutation(NUM_PARITY_ROWS)
    shuffled = run({name: array[order] for name, array in rows.items()}, size)
    differences = [_difference({name: array[order] for name, array in exported.items()}, shuffled)]
    if size > 1 and any(array.dtype.kind == "f" for array in rows.values()):
        beside = {name: np.resize(array, (size, *array.shape[1:])) for name, array in rows.items()}
        for name, array in beside.items():
            if array.dtype.kind == "f":
                array[1:] = rows[name][1] * array.dtype.type(100)
        outlying = run(beside, size)
        first = [{name: array[:1] for name, array in answers.items()} for answers in (exported, outlying)]
        differences.append(_difference(*first))
    return differences


def _largest(values: Iterable[float]) -> float:
    """Largest value, NaN if any is: the built-in max may lose it."""
    return float(np.max(list(values)))


def compared_numbers(outputs: Outputs) -> list[str]:
    """Outputs that are compared as numbers: all that there are, but the labels."""
    return [name for name in ("scores", "certainty") if name in outputs]


def _run_onnx(session: ort.InferenceSession, rows: Outputs, size: int) -> Outputs:
    names = [output.name for output in session.get_outputs()]
    parts = [session.run(names, batch) for batch in batches(rows, size)]
    return {name: np.concatenate([part[i] for part in parts]) for i, name in enumerate(names)}


def _difference(one: Outputs, other: Outputs) -> float:
    return _max_difference(*(answers[compared_numbers(answers)[0]] for answers in (one, other)))


def _max_difference(one: NDArray[np.generic], other: NDArray[np.generic]) -> float:
    return float(np.abs(one.astype(np.float64) - other.astype(np.float64)).max())
