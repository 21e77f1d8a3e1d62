"""Records: what every model of a family answered, how certain it was, and what was right, row by row.

Search and calibration records are different types on purpose: everything is chosen on the first, and the second is
looked at once, by the certificate. No function that chooses anything accepts CalibrationRecords.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated

import msgspec
import numpy as np

from cascadeserve.artefacts import Artefact

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any, Self

    from numpy.typing import NDArray


class Provenance(Artefact, frozen=True, kw_only=True):
    """What a model's answers were recorded with; an empty text stands for "not known"."""

    # sha256:<hex> of the version's files
    digest: str = ""
    # onnxruntime, tensorrt, ...; "import" for answers that were not recorded through Triton
    backend: str = ""
    server_version: str = ""
    device_kind: str = ""
    # 0: not known
    version: Annotated[int, msgspec.Meta(ge=0)] = 0


@dataclass(frozen=True, eq=False)
class ModelAnswers:
    """One model's answers to n rows: label int64 [n], certainty float32 [n], scores float16 [n, classes] if kept."""

    label: NDArray[np.int64]
    certainty: NDArray[np.float32]
    scores: NDArray[np.float16] | None = None
    provenance: Provenance = field(default_factory=Provenance)

    def take(self, rows: NDArray[np.integer[Any]] | NDArray[np.bool_]) -> ModelAnswers:
        """Answers to some rows, by index (repeats allowed) or mask."""
        scores = None if self.scores is None else self.scores[rows]
        return replace(self, label=self.label[rows], certainty=self.certainty[rows], scores=scores)


@dataclass(frozen=True, eq=False)
class Records:
    """Answers of all models, by name from cheap to dear, to the same n rows.

    `truth` is int64 [n], the right labels; `group_id` int64 [n] is equal for rows that are not independent of each
    other (all different where rows were drawn independently).
    """

    family: str
    models: dict[str, ModelAnswers]
    truth: NDArray[np.int64]
    group_id: NDArray[np.int64]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.truth)

    def take(self, rows: NDArray[np.integer[Any]] | NDArray[np.bool_]) -> Self:
        """Records of some rows, by index (repeats allowed) or mask; they keep their type and their group ids."""
        models = {name: answers.take(rows) for name, answers in self.models.items()}
        return replace(self, models=models, truth=self.truth[rows], group_id=self.group_id[rows])

    def digest(self) -> str:
        """Digest `sha256:<hex>` of the content, whatever file or compression it lies in."""
        total = hashlib.sha256(b"cascadeserve records 1\0")
        for name, array in arrays(self):
            total.update(f"{name}\0{array.dtype.str}\0{array.shape}\0".encode())
            total.update(np.ascontiguousarray(array).data)
        # without the version, which the digest of its files knows: records from before it was kept keep theirs
        fields = ("digest", "backend", "server_version", "device_kind")
        origins = {
            name: {field: getattr(answers.provenance, field) for field in fields}
            for name, answers in self.models.items()
        }
        total.update(msgspec.json.encode([type(self).__name__, self.family, origins]))
        return f"sha256:{total.hexdigest()}"


@dataclass(frozen=True, eq=False)
class SearchRecords(Records):
    """Rows on which everything is chosen: reference model, ladder, thresholds."""


@dataclass(frozen=True, eq=False)
class CalibrationRecords(Records):
    """Rows that the certificate looks at, once, after the ladder is frozen."""


@dataclass(frozen=True, eq=False)
class HeldOutRecords(Records):
    """Rows (the test split) that only show afterwards whether predictions and bounds were true."""


def arrays(records: Records) -> Iterator[tuple[str, NDArray[np.generic]]]:
    """All arrays under the names they have in a records file: `truth`, `group_id`, `<model>/label`, ..."""
    yield "truth", records.truth
    yield "group_id", records.group_id
    for model, answers in records.models.items():
        yield f"{model}/label", answers.label
        yield f"{model}/certainty", answers.certainty
        if answers.scores is not None:
            yield f"{model}/scores", answers.scores


DTYPES = {"truth": "int64", "group_id": "int64", "label": "int64", "certainty": "float32", "scores": "float16"}


def problems(records: Records) -> Iterator[tuple[str, str]]:
    """What is wrong with records, as (name of the array, sentence); nothing if they can be used."""
    if not records.models:
        yield "models", "is empty; records need the answers of at least one model"
    if records.truth.size == 0:
        yield "truth", "is empty; records need at least one row"
        return
    for name, array in arrays(records):
        kind = name.rpartition("/")[2]
        axes = 2 if kind == "scores" else 1
        if array.dtype != DTYPES[kind]:
            yield name, f"is {array.dtype}, but must be {DTYPES[kind]}"
        elif array.ndim != axes:
            yield name, f"has {array.ndim} axes, but must have {axes}"
        elif len(array) != records.truth.size:
            yield name, f"has {len(array)} rows, but truth has {records.truth.size}; all arrays describe the same rows"
        elif kind in {"truth", "label"} and (bad := np.flatnonzero(np.less(array, 0))).size:
            yield name, f"is negative in {bad.size} rows, first in row {bad[0]}; labels count from 0"
        elif kind == "certainty" and (bad := np.flatnonzero(~np.isfinite(array.astype(np.float32)))).size:
            problem = f"is NaN or infinite in {bad.size} rows, first in row {bad[0]}; drop these rows from all arrays"
            yield name, problem
