"""Temperature scaling: one number that makes the probabilities of a model as sure as its answers are right."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.optimize import minimize_scalar

from cascadeserve.errors import UsageError
from export.family import NUM_TEMPERATURE_ROWS
from export.sources import in_batches

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from export.family import Family, FamilyModel
    from export.sources import Source

LOWEST, HIGHEST = 0.05, 20.0


def with_fitted_temperature(family: Family, model: FamilyModel, source: Source) -> FamilyModel:
    """Return the model with its temperature settled: fitted to labelled rows of the family, if it asks for that.

    A variant gets the temperature of its float source, so that the two differ in nothing else.

    Raises:
        UsageError: nothing can be fitted to these rows.

    """
    if not model.fit_temperature:
        return model
    rows, label = family.checked_labelled_rows(NUM_TEMPERATURE_ROWS)
    values = in_batches(source.run, rows, model.max_batch_size).astype(np.float64)
    if model.head.output == "probabilities":
        values = np.log(np.maximum(values, np.finfo(np.float32).tiny))
    try:
        temperature = fit_temperature(values, label)
    except UsageError as error:
        raise UsageError(f"{model.name}: {error}") from error
    return replace(model, head=replace(model.head, temperature=temperature), fit_temperature=False)


def fit_temperature(logits: NDArray[np.floating[Any]], label: NDArray[np.integer[Any]]) -> float:
    """Temperature T in [LOWEST, HIGHEST] under which softmax(logits / T) makes the right labels most likely.

    That is maximum likelihood, as in Guo et al., On Calibration of Modern Neural Networks, 2017 (arXiv:1706.04599). The
    likelihood of the result is never below that of T = 1, which is returned where nothing is better. Fit it on the
    search split: the calibration split may judge a ladder only if nothing was chosen by it.

    For a model that gives probabilities, `logits` are their logarithms, floored where its number format underflows.
    A class that is ruled out may have the logit -inf.

    Args:
        logits: [n, classes], as the model gives them.
        label: [n], the right class of each row.

    Raises:
        UsageError: there are no rows, the shapes do not fit, a label names no class, or a logit is no number.

    """
    logits, label = np.asarray(logits, dtype=np.float64), np.asarray(label)
    _check(logits, label)
    # the largest logit of every row is 0 then, so that no exponential below overflows and no sum of them underflows
    logits = logits - logits.max(axis=1, keepdims=True)
    of_label = np.take_along_axis(logits, label[:, np.newaxis].astype(np.int64), axis=1)[:, 0]

    def loss(log_temperature: float) -> float:
        sharpness = np.exp(-log_temperature)
        return float(np.mean(np.log(np.exp(logits * sharpness).sum(axis=1)) - of_label * sharpness))

    # The loss is convex in 1 / T, hence has one valley in log T too: a bounded search cannot miss it.
    best = minimize_scalar(loss, bounds=(np.log(LOWEST), np.log(HIGHEST)), method="bounded", options={"xatol": 1e-5}).x
    return float(np.clip(np.exp(best), LOWEST, HIGHEST)) if loss(best) < loss(0.0) else 1.0


def _check(logits: NDArray[np.float64], label: NDArray[np.integer[Any]]) -> None:
    if logits.ndim != 2 or label.ndim != 1:  # noqa: PLR2004 - [n, classes]
        raise UsageError(
            f"a temperature is fitted to logits [n, classes] and labels [n], not to {list(logits.shape)} and "
            f"{list(label.shape)}"
        )
    if len(logits) != len(label):
        raise UsageError(f"a temperature is fitted to one label per row, not to {len(label)} for {len(logits)} rows")
    if not logits.size:
        raise UsageError(f"a temperature cannot be fitted to logits of shape {list(logits.shape)}: there are none")
    if label.dtype.kind not in "iu":
        raise UsageError(f"the labels that a temperature is fitted to must be integers, not {label.dtype}")
    classes = logits.shape[1]
    outside = (label < 0) | (label >= classes)
    if outside.any():
        row = int(outside.argmax())
        raise UsageError(f"the label of row {row} is {label[row]}, but the logits have the classes 0 to {classes - 1}")
    broken = (np.isnan(logits) | np.isposinf(logits)).any(axis=1)
    if broken.any():
        raise UsageError(f"the logits of row {int(broken.argmax())} hold NaN or infinity, so no temperature fits them")
    impossible = np.isneginf(logits[np.arange(len(label)), label])
    if impossible.any():
        raise UsageError(
            f"the right class of row {int(impossible.argmax())} has the logit -inf, which no temperature makes likely; "
            "floor the logits"
        )
