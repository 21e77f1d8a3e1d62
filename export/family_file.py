"""The family file: models that lie in files, as a person writes it down (`family.toml`).

    schema_version = 1
    name = "mine"
    classes = 10
    rows = "search.npz"                # `input:<TENSOR>` [n, *shape] and, for temperature = "fit", `label` [n]

    [[inputs]]
    name = "image"
    datatype = "FP32"
    shape = [3, 32, 32]                # without the batch axis; -1 where it varies

    [[models]]                         # from cheap to dear
    name = "small"
    file = "small.onnx"                # or TorchScript (.pt, .ts), torch.export (.pt2); several may share a file
    max_batch_size = 64
    variant = "int8"                   # or fp16, optimised, tensorrt
    output = "logits"                  # or probabilities
    output_name = "logits"             # of an ONNX file with several outputs
    certainty = "margin"               # or max_probability, negative_entropy
    temperature = 1.0                  # or "fit"
    keep_scores = true
    [models.preprocessing]             # where the file takes something else than the family's inputs; see Preprocessing
    name = "counts"
    file = "counts.py"
    outputs = [{ name = "counts", datatype = "FP32", shape = [512] }]

Paths are relative to the file. `rows` are search rows: everything is chosen by those, and a certificate may judge only
what its own rows did not choose. So never give calibration rows. They are taken in one shuffled order that is always
the same, since files are often sorted by class: the first NUM_PARITY_ROWS of it hold every model against its source,
the next ones, up to NUM_QUANTISATION_ROWS, fix the scales of INT8 variants, which are judged by the former and must
therefore not see them. Temperatures are fitted to up to NUM_TEMPERATURE_ROWS from its beginning: the checks compare two
forms of a model at one temperature and so are not made easier by it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal, get_args

import numpy as np
from msgspec import Meta

from cascadeserve.artefacts import Artefact, read_toml
from cascadeserve.errors import InvalidArtefact, UsageError
from cascadeserve.gear_plan import Count, Name, TensorSpec
from cascadeserve.replay.rows import Rows, read_rows
from export.ensemble import Preprocessing
from export.family import (
    LEAST_QUANTISATION_ROWS,
    NUM_PARITY_ROWS,
    Certainty,
    Family,
    FamilyModel,
    Head,
    Output,
    Variant,
    fits,
)

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

Text = Annotated[str, Meta(min_length=1)]


class PreprocessingEntry(Artefact, frozen=True, kw_only=True):
    """What turns the family's inputs into those of a model; see `Preprocessing` for what the fields mean."""

    name: Name
    file: Text
    outputs: Annotated[tuple[TensorSpec, ...], Meta(min_length=1)]


class ModelEntry(Artefact, frozen=True, kw_only=True):
    """One model of a family file; see `FamilyModel` and `Head` for what the fields mean."""

    name: Name
    file: Text
    max_batch_size: Count
    variant: Variant | None = None
    output: Output = "logits"
    output_name: Text | None = None
    certainty: Certainty = "margin"
    temperature: float | Literal["fit"] = 1.0
    keep_scores: bool = True
    preprocessing: PreprocessingEntry | None = None


class FamilyFile(Artefact, frozen=True, kw_only=True):
    """What stands in a family file."""

    schema_version: Literal[1]
    name: Name
    classes: Annotated[int, Meta(ge=2)]
    rows: Text
    inputs: Annotated[tuple[TensorSpec, ...], Meta(min_length=1)]
    models: Annotated[tuple[ModelEntry, ...], Meta(min_length=1)]

    def __post_init__(self) -> None:
        """Check the shapes: Triton takes no tensor without an axis, and an axis of 0 holds nothing."""
        stated = [(f"$.inputs[{index}]", spec) for index, spec in enumerate(self.inputs)]
        for number, model in enumerate(self.models):
            outputs = () if model.preprocessing is None else model.preprocessing.outputs
            where = f"$.models[{number}].preprocessing.outputs"
            stated += [(f"{where}[{index}]", spec) for index, spec in enumerate(outputs)]
        for field, spec in stated:
            if not spec.shape or 0 in spec.shape:
                raise ValueError(
                    f"{field}.shape: is {list(spec.shape)}; give one or more axes of a row, each of 1 or more, or -1 "
                    "where it varies; [1] for a single number"
                )


def read_family_file(path: Path) -> FamilyFile:
    """Read a family file, but none of the files that it names.

    Raises:
        InvalidArtefact: naming the field.

    """
    try:
        return read_toml(path, FamilyFile)
    except InvalidArtefact as error:
        if (error.field or "").endswith(".variant") and "'dynamic_int8'" in str(error):
            what = (
                "there is no variant 'dynamic_int8', since a row's answer would depend on the other rows of its batch; "
                f"choose one of {', '.join(get_args(Variant))}"
            )
            raise InvalidArtefact(what, path=path, field=error.field) from error
        raise


def read_family(path: Path) -> Family:
    """Read a family file and its rows; the models are read when they are exported.

    Raises:
        InvalidArtefact: naming the field of the file, or the array of the rows.

    """
    stated = read_family_file(path)
    models = []
    for index, entry in enumerate(stated.models):
        try:
            models.append(_model(entry, path.parent))
        except UsageError as error:
            raise InvalidArtefact(str(error), path=path, field=f"$.models[{index}]") from error
    rows_path = path.parent / stated.rows
    rows = _with_bytes(read_rows(rows_path))
    _check_rows(rows, stated, rows_path)
    order = np.random.default_rng(0).permutation(len(rows))

    def some(start: int, count: int) -> dict[str, NDArray[np.generic]]:
        return {name: array[order[start : start + count]] for name, array in rows.inputs.items()}

    labels = rows.labels
    try:
        return Family(
            name=stated.name,
            inputs=stated.inputs,
            classes=stated.classes,
            models=tuple(models),
            sample=lambda n: some(0, n),
            quantisation_rows=lambda n: some(NUM_PARITY_ROWS, n),
            labelled_rows=None if labels is None else lambda n: (some(0, n), labels[order[:n]]),
        )
    except UsageError as error:
        raise InvalidArtefact(str(error), path=path) from error


def _with_bytes(rows: Rows) -> Rows:
    """Text as it is sent, in UTF-8."""
    inputs: dict[str, NDArray[np.generic]] = {
        name: np.char.encode(array.astype(np.str_), "utf-8") if array.dtype.kind == "U" else array
        for name, array in rows.inputs.items()
    }
    return Rows(inputs, rows.labels)


def _preprocessing(entry: PreprocessingEntry, folder: Path) -> Preprocessing:
    return Preprocessing(name=entry.name, source=folder / entry.file, outputs=entry.outputs)


def _model(entry: ModelEntry, folder: Path) -> FamilyModel:
    fitted = entry.temperature == "fit"
    return FamilyModel(
        name=entry.name,
        file=folder / entry.file,
        max_batch_size=entry.max_batch_size,
        variant=entry.variant,
        output_name=entry.output_name,
        head=Head(
            certainty=entry.certainty,
            output=entry.output,
            temperature=1.0 if isinstance(entry.temperature, str) else entry.temperature,
            keep_scores=entry.keep_scores,
        ),
        fit_temperature=fitted,
        preprocessing=None if entry.preprocessing is None else _preprocessing(entry.preprocessing, folder),
    )


def _check_rows(rows: Rows, stated: FamilyFile, path: Path) -> None:
    specs = {spec.name: spec for spec in stated.inputs}
    if absent := [name for name in specs if name not in rows.inputs]:
        raise InvalidArtefact("is missing; the family has such an input", path=path, field=f"input:{absent[0]}")
    for name, array in rows.inputs.items():
        if name not in specs:
            known = ", ".join(specs)
            raise InvalidArtefact(f"is no input of the family, only {known}", path=path, field=f"input:{name}")
        spec = specs[name]
        if not fits(spec, array.shape, array.dtype):
            raise InvalidArtefact(
                f"is {array.dtype} {list(array.shape)}, but the family states {spec.datatype} {['n', *spec.shape]}; "
                "make them agree",
                path=path,
                field=f"input:{name}",
            )
    int8 = any(model.variant == "int8" for model in stated.models)
    needed = NUM_PARITY_ROWS + LEAST_QUANTISATION_ROWS * int8
    if len(rows) < needed:
        what = (
            f"{NUM_PARITY_ROWS} to check the models" + f" and {LEAST_QUANTISATION_ROWS} others for INT8 scales" * int8
        )
        raise InvalidArtefact(f"holds {len(rows)} rows, but {what} are needed", path=path)
    fitted = [model.name for model in stated.models if model.temperature == "fit"]
    if fitted and rows.labels is None:
        raise InvalidArtefact(
            f"is missing; the temperature of {fitted[0]} is fitted to rows with labels", path=path, field="label"
        )
    if rows.labels is not None and not ((rows.labels >= 0) & (rows.labels < stated.classes)).all():
        what = f"runs from {rows.labels.min()} to {rows.labels.max()}, but the family has the classes 0 to"
        raise InvalidArtefact(f"{what} {stated.classes - 1}", path=path, field="label")
