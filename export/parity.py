"""Checks that a model does what its source does, and that a row's answer depends on that row alone."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cascadeserve.errors import ExportRefused

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # must be set before the import

import onnxruntime as ort

from export.onnx_export import CascadeHead

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from numpy.typing import NDArray
    from torch import nn

    from export.family import Family, FamilyModel, Variant

    Outputs = dict[str, NDArray[Any]]
    # answers of a model to rows that are put to it in batches of a size
    Run = Callable[[Outputs, int], Outputs]

NUM_ROWS = 256
# Scores of one row may differ by this much with the size of its batch: kernels sum in another order then.
BATCH_TOLERANCE = 1e-5
ORT_ERRORS = (ort.capi.onnxruntime_pybind11_state.Fail, ort.capi.onnxruntime_pybind11_state.InvalidArgument, ValueError)
_ADVICE: dict[Variant, str] = {
    "optimised": "drop this variant",
    "fp16": "drop this variant, or keep values within what FP16 holds (65504)",
    "int8": "give quantisation_rows that look like what will be served, or drop this variant",
    "tensorrt": "drop this variant",
}
_OUTPUTS = ("label", "certainty", "scores")


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


@dataclass(frozen=True)
class Parity:
    """Largest differences over NUM_ROWS rows; `label_agreement` is a share of rows."""

    max_abs_error: float
    label_agreement: float
    max_batch_difference: float


def check_parity(family: Family, model: FamilyModel, module: nn.Module, onnx_model: bytes, tolerance: float) -> Parity:
    """Hold the exported model against PyTorch and against itself in other batches.

    Raises:
        ExportRefused: naming the model, what was measured and what is allowed.

    """
    rows = family.checked_sample(NUM_ROWS)
    source = _run_torch(family, module, rows, model.max_batch_size)
    if source["scores"].shape != (NUM_ROWS, family.classes):
        raise ExportRefused(
            f"{model.name}: returns logits of shape {list(source['scores'].shape)} for {NUM_ROWS} rows, "
            f"but the family has {family.classes} classes"
        )
    if not np.isfinite(source["scores"]).all():
        raise ExportRefused(f"{model.name}: gives scores that are no numbers for rows of the family's sample")
    # One by one too: code that looks at its batch, or branches on values, is told here from a wrong export.
    alone = _run_torch(family, module, rows, 1)
    _refuse_batch_dependence(model, _max_difference(source["scores"], alone["scores"]), tolerance)
    try:
        return _compare(family, model, source, rows, onnx_model, tolerance)
    except ORT_ERRORS as error:
        raise ExportRefused(
            f"{model.name}: the exported model does not run on every batch size ({_first_line(error)}); look for code "
            "that fixes the batch size or ignores an input"
        ) from error


def _compare(
    family: Family, model: FamilyModel, source: Outputs, rows: Outputs, onnx_model: bytes, tolerance: float
) -> Parity:
    session = _session(onnx_model)
    if unused := {spec.name for spec in family.inputs} - {entry.name for entry in session.get_inputs()}:
        raise ExportRefused(f"{model.name}: does not use the input {min(unused)!r}, so it is not in its graph")
    run = partial(_run_onnx, session)
    exported = run(rows, model.max_batch_size)
    max_abs_error = _largest(_max_difference(source[name], exported[name]) for name in ("scores", "certainty"))
    if not max_abs_error <= tolerance:
        raise ExportRefused(
            f"{model.name}: scores differ from PyTorch by up to {max_abs_error:.2e}, allowed are {tolerance:.0e}; "
            "look for operators that export differently, or raise --tolerance if this is wanted"
        )
    # Where two classes are tied within the tolerance, either label is right.
    agree = (source["label"] == exported["label"]).reshape(-1) | (source["certainty"].reshape(-1) <= 2 * tolerance)
    if not agree.all():
        raise ExportRefused(f"{model.name}: {np.count_nonzero(~agree)} of {NUM_ROWS} labels differ from PyTorch's")
    difference = _check_batches(model, run, rows, exported)
    return Parity(max_abs_error, float(np.mean(source["label"] == exported["label"])), difference)


def check_variant(family: Family, model: FamilyModel, float_model: bytes, onnx_model: bytes) -> Parity:
    """Hold a variant against its float model, within VARIANT_LIMITS, and against itself in other batches.

    Raises:
        ExportRefused: naming the model, what was measured and what is allowed.

    """
    if model.variant is None:
        raise ValueError(f"{model.name} is no variant")  # a mistake of the caller, not of the family
    rows = family.checked_sample(NUM_ROWS)
    try:
        wanted = _run_onnx(_session(float_model), rows, model.max_batch_size)
        run = partial(_run_onnx, _session(onnx_model))
        found = run(rows, model.max_batch_size)
        errors = np.abs(wanted["scores"].astype(np.float64) - found["scores"]).max(axis=1)
        agreement = float(np.mean(wanted["label"] == found["label"]))
        _refuse_beyond_limits(model.name, model.variant, float(errors.mean()), agreement)
        return Parity(float(errors.max()), agreement, _check_batches(model, run, rows, found))
    except ORT_ERRORS as error:
        raise ExportRefused(
            f"{model.name}: its {model.variant} variant does not run on every batch size ({_first_line(error)}); "
            "drop this variant"
        ) from error


def _refuse_beyond_limits(name: str, variant: Variant, mean_error: float, agreement: float) -> None:
    limits = VARIANT_LIMITS[variant]
    if not (mean_error <= limits.mean_error and agreement >= limits.label_agreement):
        raise ExportRefused(
            f"{name}: its {variant} variant gives the float model's label on {agreement:.4f} of {NUM_ROWS} rows, with "
            f"scores {mean_error:.2e} off on average, wanted are {limits.label_agreement:g} and at most "
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
    others = [_max_difference(answers["scores"], run(rows, size)["scores"]) for size in _other_sizes(model)]
    return _largest([*others, *_differences_beside_others(run, rows, answers, model.max_batch_size)])


def source_answers(family: Family, model: FamilyModel, rows: Outputs) -> Outputs:
    """What the source answers to NUM_ROWS rows, in full batches: label and certainty [n, 1], scores [n, classes]."""
    return _run_torch(family, model.build().eval(), rows, model.max_batch_size)


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
    order = np.random.default_rng(0).permutation(NUM_ROWS)
    shuffled = run({name: array[order] for name, array in rows.items()}, size)["scores"]
    differences = [_max_difference(exported["scores"][order], shuffled)]
    if size > 1 and any(array.dtype.kind == "f" for array in rows.values()):
        beside = {name: np.resize(array, (size, *array.shape[1:])) for name, array in rows.items()}
        for name, array in beside.items():
            if array.dtype.kind == "f":
                array[1:] = rows[name][1] * array.dtype.type(100)
        outlying = run(beside, size)
        differences.append(_max_difference(exported["scores"][:1], outlying["scores"][:1]))
    return differences


def _largest(values: Iterable[float]) -> float:
    """Largest value, NaN if any is: the built-in max may lose it."""
    return float(np.max(list(values)))


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


def _session(onnx_model: bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(onnx_model, options, providers=["CPUExecutionProvider"])


def _run_onnx(session: ort.InferenceSession, rows: Outputs, size: int) -> Outputs:
    parts = [
        session.run(list(_OUTPUTS), {name: array[start : start + size] for name, array in rows.items()})
        for start in range(0, len(next(iter(rows.values()))), size)
    ]
    return {name: np.concatenate([part[i] for part in parts]) for i, name in enumerate(_OUTPUTS)}


def _run_torch(family: Family, module: nn.Module, rows: Outputs, size: int) -> Outputs:
    """In the same batches as ONNX Runtime, so that a model that looks at its batch mates is told from a wrong one."""
    head = CascadeHead(module).eval()
    parts = []
    with torch.inference_mode():
        for start in range(0, NUM_ROWS, size):
            batch = [torch.from_numpy(rows[spec.name][start : start + size]) for spec in family.inputs]
            parts.append(head(*batch))
    return {name: torch.cat([part[i] for part in parts]).numpy() for i, name in enumerate(_OUTPUTS)}


def _max_difference(one: NDArray[np.generic], other: NDArray[np.generic]) -> float:
    return float(np.abs(one.astype(np.float64) - other.astype(np.float64)).max())
