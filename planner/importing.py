"""Records from predictions that exist already, so that a family can be planned before it is deployed.

An import file (TOML) says where in .npz and .csv files the right labels and each model's answers stand:

    schema_version = 1
    family = "mmlu"
    truth = { file = "logits.npz", name = "label" }          # an array of an .npz, or a column of a .csv

    [[models]]                                               # from cheap to dear
    name = "small"
    scores = { file = "logits.npz", name = "small" }         # [rows, classes]
    scale = "logits"                                         # or "probabilities"

    [[models]]
    name = "large"
    label = { file = "large.csv", name = "predicted" }
    certainty = { file = "large.csv", name = "confidence" }

Files lie relative to the import file. With scores the certainty is the top-1 minus the top-2 probability, as in an
exported model. The rows are then split into search, calibration and test rows, so that no group stands in two splits.
"""

from __future__ import annotations

import csv
import zipfile
import zlib
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import msgspec
import numpy as np
from scipy.special import softmax

from cascadeserve.artefacts import Artefact, read_toml
from cascadeserve.errors import InvalidArtefact, UsageError
from cascadeserve.gear_plan import Name
from planner.records import (
    CalibrationRecords,
    HeldOutRecords,
    ModelAnswers,
    Provenance,
    Records,
    SearchRecords,
    problems,
)

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

# Probabilities that were rounded to FP16 or to 6 digits still sum to 1 within this.
_SUM_TOLERANCE = 0.01
# Certainties are kept as FP32. No score or label is larger either, and below this softmax and sums cannot overflow.
_LARGEST = float(np.finfo(np.float32).max)
# From here on float64 holds no longer every whole number, and two labels would become one.
_LABELS_END = 2**53
# booleans, integers, floats, and texts that may be such
_NUMBER_KINDS = "biufUS"


class Column(Artefact, frozen=True, kw_only=True):
    """An array of an .npz file or a column of a .csv file with a header line."""

    file: Annotated[str, msgspec.Meta(min_length=1)]
    name: Annotated[str, msgspec.Meta(min_length=1)]


class ImportedModel(Artefact, frozen=True, kw_only=True):
    """One model: scores and what they are, or label and certainty."""

    name: Name
    scores: Column | None = None
    scale: Literal["logits", "probabilities"] | None = None
    label: Column | None = None
    certainty: Column | None = None
    # right labels as this model's file has them, to be held against those of the family: finds rows in another order
    truth: Column | None = None

    def __post_init__(self) -> None:
        """Check that one of the two forms is given."""
        given = [value is not None for value in (self.scores, self.scale, self.label, self.certainty)]
        if given not in ([True, True, False, False], [False, False, True, True]):
            raise ValueError("a model needs either scores and scale, or label and certainty")


class ImportFile(Artefact, frozen=True, kw_only=True):
    """Where the records of a family come from; the models from cheap to dear."""

    schema_version: Literal[1]
    family: Name
    truth: Column
    # rows that are not independent of each other have the same value, a number or a text; None: all are independent
    group: Column | None = None
    models: Annotated[tuple[ImportedModel, ...], msgspec.Meta(min_length=1)]
    keep_scores: bool = False

    def __post_init__(self) -> None:
        """Check that no name is used twice."""
        names = [model.name for model in self.models]
        if len(set(names)) != len(names):
            raise ValueError("two models have the same name")


class Splits(NamedTuple):
    """Records by what they are for."""

    search: SearchRecords
    calibration: CalibrationRecords
    held_out: HeldOutRecords


def import_records(path: Path) -> Records:
    """Read an import file and what it names.

    Raises:
        InvalidArtefact: naming the file and the array or column.

    """
    wanted = read_toml(path, ImportFile)
    return gather(wanted, path.parent)


def gather(wanted: ImportFile, folder: Path) -> Records:
    """Read what an import file names, files relative to `folder`; errors as in `import_records`."""
    source = _Source(folder)
    truth = source.labels(wanted.truth)
    if wanted.group is None:
        group = np.arange(len(truth), dtype=np.int64)
    else:
        group = np.unique(source.column(wanted.group), return_inverse=True)[1].astype(np.int64)
    models = {}
    for model in wanted.models:
        models[model.name] = source.answers(model, keep_scores=wanted.keep_scores)
        if model.truth is not None and not np.array_equal(source.labels(model.truth), truth):
            raise source.invalid(model.truth, "differs from the family's truth; bring the rows into the same order")
    records = Records(family=wanted.family, models=models, truth=truth, group_id=group)
    for name, problem in problems(records):
        raise InvalidArtefact(problem, path=folder, field=name)
    return records


def split(records: Records, *, fractions: tuple[float, float, float], seed: int) -> Splits:
    """Divide rows into search, calibration and test by chance, whole groups at a time.

    `fractions` are of the groups, hence of the rows only on average where groups differ in size: cutting by rows would
    make the place of a group depend on its size. Rows keep their order inside a split; the same arguments give the same
    splits.

    Raises:
        UsageError: the fractions do not sum to 1, or a split got nothing.

    """
    # written so that NaN, which compares with nothing, is refused too
    if not (min(fractions) > 0.0 and abs(sum(fractions) - 1.0) <= _SUM_TOLERANCE**2):
        raise UsageError("the fractions of search, calibration and test must be positive and sum to 1")
    names, group_of = np.unique(records.group_id, return_inverse=True)
    cuts = np.rint(np.cumsum(fractions[:2]) * len(names)).astype(np.int64)
    if not 0 < cuts[0] < cuts[1] < len(names):
        raise UsageError(f"{len(names)} independent groups of rows are too few for three splits of these fractions")
    place = np.random.default_rng(seed).permutation(len(names))
    part = np.searchsorted(cuts, place[group_of], side="right")
    search, calibration, held_out = (records.take(part == index) for index in range(3))
    return Splits(
        search=SearchRecords(**vars(search)),
        calibration=CalibrationRecords(**vars(calibration)),
        held_out=HeldOutRecords(**vars(held_out)),
    )


class _Source:
    """Columns of the files in a folder; each file is read once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tables: dict[str, dict[str, NDArray[Any]]] = {}

    def invalid(self, column: Column, problem: str) -> InvalidArtefact:
        return InvalidArtefact(problem, path=self.folder / column.file, field=column.name)

    def column(self, column: Column) -> NDArray[Any]:
        if column.file not in self._tables:
            path = self.folder / column.file
            self._tables[column.file] = _read_csv(path) if path.suffix.lower() == ".csv" else _read_npz(path)
        table = self._tables[column.file]
        if column.name not in table:
            raise self.invalid(column, f"is missing; the file has {', '.join(table)}")
        return table[column.name]

    def numbers(self, column: Column, axes: int) -> NDArray[np.float64]:
        cells = self.column(column)
        if cells.dtype.kind not in _NUMBER_KINDS:
            raise self.invalid(column, f"must hold real numbers, but is {cells.dtype}")
        try:
            # a wider float may become infinite, which is refused below
            with np.errstate(over="ignore"):
                values = cells.astype(np.float64)
        except (ValueError, TypeError) as error:
            raise self.invalid(column, f"must hold numbers ({error})") from error
        if values.ndim != axes:
            raise self.invalid(column, f"has {values.ndim} axes, but must have {axes}")
        if not len(values):
            raise self.invalid(column, "is empty; records need at least one row")
        beside = tuple(range(1, axes))
        if (bad := np.flatnonzero(~np.isfinite(values).all(axis=beside))).size:
            raise self.invalid(column, f"is NaN or infinite in {bad.size} rows, first in row {bad[0]}; drop these rows")
        if (bad := np.flatnonzero((np.abs(values) > _LARGEST).any(axis=beside))).size:
            problem = f"is beyond {_LARGEST:.2g} in {bad.size} rows, first in row {bad[0]}; drop these rows"
            raise self.invalid(column, problem)
        return values

    def labels(self, column: Column) -> NDArray[np.int64]:
        values = self.numbers(column, axes=1)
        if np.any(values < 0) or np.any(values >= _LABELS_END) or np.any(values != np.rint(values)):
            raise self.invalid(column, f"must hold labels: whole numbers from 0, below {_LABELS_END}")
        return values.astype(np.int64)

    def answers(self, model: ImportedModel, *, keep_scores: bool) -> ModelAnswers:
        origin = Provenance(backend="import")
        if model.label is not None and model.certainty is not None:
            certainty = self.numbers(model.certainty, axes=1).astype(np.float32)
            return ModelAnswers(label=self.labels(model.label), certainty=certainty, provenance=origin)
        assert model.scores is not None
        scores = self.numbers(model.scores, axes=2)
        if scores.shape[1] < 2:  # noqa: PLR2004 - the second largest is needed
            raise self.invalid(model.scores, "needs scores of at least two classes per row")
        if model.scale == "logits":
            scores = softmax(scores, axis=1)
        elif np.any(scores < 0.0) or np.any(np.abs(scores.sum(axis=1) - 1.0) > _SUM_TOLERANCE):
            raise self.invalid(model.scores, 'has rows that do not sum to 1; logits are named by scale = "logits"')
        top = np.partition(scores, -2, axis=1)
        return ModelAnswers(
            label=np.argmax(scores, axis=1).astype(np.int64),
            certainty=(top[:, -1] - top[:, -2]).astype(np.float32),
            scores=scores.astype(np.float16) if keep_scores else None,
            provenance=origin,
        )


def _read_npz(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with path.open("rb") as file:
            if not zipfile.is_zipfile(file):
                raise InvalidArtefact("is neither an .npz file nor named .csv", path=path)
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except OSError as error:
        raise InvalidArtefact(f"cannot be read ({error.strerror}); check the path", path=path) from error
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, SyntaxError, NotImplementedError) as error:
        raise InvalidArtefact(f"is no .npz file of plain arrays ({error})", path=path) from error


def _read_csv(path: Path) -> dict[str, NDArray[Any]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            lines = csv.reader(file, strict=True)
            names = next(lines, [])
            rows = [line for line in lines if line]
    except OSError as error:
        raise InvalidArtefact(f"cannot be read ({error.strerror}); check the path", path=path) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InvalidArtefact(f"is no .csv file in UTF-8 ({error})", path=path) from error
    if len(set(names)) != len(names):
        raise InvalidArtefact("has two columns of one name", path=path)
    if not rows:
        raise InvalidArtefact("has no rows below its header line", path=path)
    for number, row in enumerate(rows):
        if len(row) != len(names):
            raise InvalidArtefact(f"has {len(row)} cells in row {number}, but {len(names)} columns", path=path)
    return {name: np.array(cells) for name, cells in zip(names, zip(*rows, strict=True), strict=False)}
