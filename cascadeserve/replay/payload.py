"""What goes over the wire, independent of the transport: raw tensor bytes per row, and the model's signature."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

import numpy as np

from cascadeserve.datatypes import FIXED_SIZE
from cascadeserve.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from cascadeserve.replay.rows import Rows

_REQUIRED_OUTPUT = "label"
_OPTIONAL_OUTPUTS = ("stage", "certainty")
_LENGTH = struct.Struct("<I")


@dataclass(frozen=True)
class TensorSignature:
    """Name, KServe datatype and shape (batch axis first, -1 where variable) of an input."""

    name: str
    datatype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ModelSignature:
    """What a server says about a model: its inputs and the names of its outputs."""

    inputs: tuple[TensorSignature, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class InputRows:
    """The raw bytes of one input of all rows, little-endian and row-major: row i is `data[bounds[i]:bounds[i + 1]]`."""

    name: str
    datatype: str
    row_shape: tuple[int, ...]
    bounds: Sequence[int]
    data: memoryview

    def chunk(self, rows: list[int]) -> bytes | memoryview:
        """Raw tensor of these rows, in their order."""
        bounds = self.bounds
        if len(rows) == 1:
            return self.data[bounds[rows[0]] : bounds[rows[0] + 1]]
        return b"".join([self.data[bounds[row] : bounds[row + 1]] for row in rows])


@dataclass(frozen=True)
class Question:
    """What is the same for all requests of a run.

    `timeout_s` travels as the request parameter `timeout`, in whole microseconds.
    """

    model: str
    inputs: tuple[InputRows, ...]
    outputs: tuple[str, ...]
    timeout_s: float

    @property
    def timeout_us(self) -> int:
        """Deadline of a request in microseconds, as Triton wants it."""
        return round(self.timeout_s * 1e6)


def _is_text(array: NDArray[np.generic]) -> bool:
    return array.dtype.kind in "SU"


def _datatype_of(array: NDArray[np.generic]) -> str:
    if _is_text(array):
        return "BYTES"
    little = array.dtype.newbyteorder("<")
    return next((name for name, dtype in FIXED_SIZE.items() if dtype == little), str(array.dtype))


def encode_rows(name: str, array: NDArray[np.generic], datatype: str | None = None) -> InputRows:
    """Lay the rows of an input, [rows, ...], out as bytes once, so that sending only copies them."""
    datatype = datatype or _datatype_of(array)
    if datatype == "BYTES":
        return _encode_text(name, array)
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    size = little.nbytes // len(little)
    bounds = range(0, little.nbytes + 1, size)
    data = memoryview(little.reshape(-1).view(np.uint8).data)
    return InputRows(name, datatype, tuple(array.shape[1:]), bounds, data)


def _encode_text(name: str, array: NDArray[np.generic]) -> InputRows:
    """Elements one after the other, each its length and its bytes; text in UTF-8, as Triton has it in JSON too."""
    encoded = np.char.encode(array.astype(np.str_), "utf-8") if array.dtype.kind == "U" else array
    rows = [
        b"".join([_LENGTH.pack(len(element)) + element for element in row])
        for row in encoded.reshape(len(encoded), -1).tolist()
    ]
    bounds = list(accumulate(map(len, rows), initial=0))
    return InputRows(name, "BYTES", tuple(array.shape[1:]), bounds, memoryview(b"".join(rows)))


def match_inputs(rows: Rows, signature: ModelSignature) -> tuple[InputRows, ...]:
    """Encode the rows as the model's inputs.

    Raises:
        UsageError: names, datatypes or shapes differ.

    """
    wanted = {tensor.name: tensor for tensor in signature.inputs}
    if set(wanted) != set(rows.inputs):
        have, need = ", ".join(sorted(rows.inputs)), ", ".join(sorted(wanted))
        raise UsageError(f"the rows hold the inputs {have}, the model wants {need}; rename the arrays of the rows file")
    encoded = []
    for tensor in signature.inputs:
        array = rows.inputs[tensor.name]
        little = array.dtype.newbyteorder("<")
        if not (_is_text(array) if tensor.datatype == "BYTES" else FIXED_SIZE.get(tensor.datatype) == little):
            raise UsageError(
                f"input {tensor.name}: the rows are {array.dtype}, the model wants {tensor.datatype}; convert the rows"
            )
        shape = tensor.shape[1:]
        fits = len(shape) == array.ndim - 1 and all(
            want in (-1, have) for want, have in zip(shape, array.shape[1:], strict=True)
        )
        if not fits:
            raise UsageError(
                f"input {tensor.name}: one row has shape {list(array.shape[1:])}, the model wants {list(shape)}"
            )
        encoded.append(encode_rows(tensor.name, array, tensor.datatype))
    return tuple(encoded)


def choose_outputs(signature: ModelSignature) -> tuple[str, ...]:
    """`label`, and of `stage` and `certainty` those that the model has.

    Raises:
        UsageError: the model has no `label`.

    """
    if _REQUIRED_OUTPUT not in signature.outputs:
        listed = ", ".join(signature.outputs)
        raise UsageError(f"the model has no output `{_REQUIRED_OUTPUT}` (it has {listed}), so answers cannot be judged")
    return (_REQUIRED_OUTPUT, *(name for name in _OPTIONAL_OUTPUTS if name in signature.outputs))
