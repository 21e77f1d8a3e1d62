"""Probe rows: a few of the rows that a certificate was made from, and what each model answered to them when recorded.

A plan carries them, so that whoever serves it can see whether the models that stand are those that were certified.
"""

from __future__ import annotations

import io
import zipfile
import zlib
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from msgspec import Meta

from cascadeserve.artefacts import Artefact
from cascadeserve.datatypes import FIXED_SIZE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from cascadeserve.gear_plan import TensorSpec

# By which a certainty may differ from the recorded one, relative where that is beyond 1. Batches of another size sum in
# another order, and devices of another kind compute otherwise: `export` and `verify` hold probabilities to 1e-4 in
# FP32, and to 0.005 in the mean in FP16. Retrained weights move an uncertain row by far more.
TOLERANCE = 0.005


class ProbeAnswers(Artefact, frozen=True, kw_only=True):
    """What a model answered to the probe rows, in their order."""

    label: Annotated[tuple[Annotated[int, Meta(ge=0)], ...], Meta(min_length=1)]
    certainty: tuple[float, ...]

    def __post_init__(self) -> None:
        """Check that there is a certainty per label."""
        if len(self.label) != len(self.certainty):
            raise ValueError(f"has {len(self.label)} labels, but {len(self.certainty)} certainties")

    def differing(self, label: NDArray[np.int64], certainty: NDArray[np.float32]) -> NDArray[np.intp]:
        """Rows that are answered with another label or certainty than here; all arrays are [rows]."""
        wanted = np.array(self.certainty)
        near = np.abs(certainty - wanted) <= TOLERANCE * np.maximum(1.0, np.abs(wanted))
        return np.flatnonzero((label != np.array(self.label)) | ~near)


class Probes(Artefact, frozen=True, kw_only=True):
    """Probe rows of a family.

    `inputs` is an .npz file with an array [rows, ...] per input of the family, text as UTF-8.
    """

    inputs: bytes
    # by model
    answers: Annotated[dict[str, ProbeAnswers], Meta(min_length=1)]

    def tensors(self, specs: Sequence[TensorSpec]) -> list[NDArray[Any]]:
        """Arrays [rows, ...] for inputs of the family, in their order.

        Raises:
            ValueError: saying what is wrong with the probe rows.

        """
        arrays = self._unpacked()
        if arrays.keys() != {spec.name for spec in specs}:
            raise ValueError(f"holds the inputs {', '.join(sorted(arrays))}, which are not those of the family")
        for spec in specs:
            array = arrays[spec.name]
            fits = array.dtype.kind == "S" if spec.datatype == "BYTES" else array.dtype == FIXED_SIZE[spec.datatype]
            fits = fits and array.ndim == 1 + len(spec.shape)
            fits = fits and all(want in (-1, have) for want, have in zip(spec.shape, array.shape[1:], strict=True))
            if not fits:
                raise ValueError(
                    f"input {spec.name!r} is {array.dtype} of shape {list(array.shape)}, "
                    f"but the family's is {spec.datatype} of {[-1, *spec.shape]}"
                )
            if any(len(array) != len(answers.label) for answers in self.answers.values()):
                raise ValueError(f"input {spec.name!r} has {len(array)} rows, but a model has more or fewer answers")
        return [arrays[spec.name] for spec in specs]

    def _unpacked(self) -> dict[str, NDArray[Any]]:
        try:
            with zipfile.ZipFile(io.BytesIO(self.inputs)), np.load(io.BytesIO(self.inputs), allow_pickle=False) as file:
                return {name: file[name] for name in file.files}
        # whatever a damaged archive makes zipfile, zlib and numpy's header parser raise
        except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, SyntaxError, NotImplementedError) as error:
            raise ValueError(f"is no .npz file of plain arrays ({error})") from error


def pack_inputs(inputs: Mapping[str, NDArray[np.generic]]) -> bytes:
    """`Probes.inputs` of arrays [rows, ...] by name of the input; the same arrays give the same bytes."""
    file = io.BytesIO()
    packed: dict[str, NDArray[Any]] = {
        name: np.char.encode(array.astype(np.str_), "utf-8")
        if array.dtype.kind == "U"
        else np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        for name, array in inputs.items()
    }
    np.savez_compressed(file, **packed)
    return file.getvalue()
