"""What goes over the wire, independent of the transport: raw tensor bytes per row, and the model's signature."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cascadeserve.datatypes import FIXED_SIZE
from cascadeserve.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from cascadeserve.replay.rows import Rows

_REQUIRED_OUTPUT = "label"
_OPTIONAL_OUTPUTS = ("stage", "certainty")


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
    """The raw bytes of one input of all rows, little-endian and row-major, `row_bytes` for each row."""

    name: str
    datatype: str
    row_shape: tuple[int, ...]
    row_bytes: int
    data: memoryview

    def chunk(self, rows: list[int]) -> bytes | memoryview:
        """Raw tensor of these rows, in their order."""
        size = self.row_bytes
        if len(rows) == 1:
            start = rows[0] * size
            return self.data[start : start + size]
        return b"".join([self.data[row * size : (row + 1) * size] for row in rows])


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


def _datatype_of(array: NDArray[np.generic]) -> str:
    little = array.dtype.newbyteorder("<")
    return next((name for name, dtype in FIXED_SIZE.items() if dtype == little), str(array.dtype))


def encode_rows(name: str, array: NDArray[np.generic], datatype: str | None = None) -> InputRows:
    """Lay the rows of an input, [rows, ...], out as bytes once, so that sending only copies them."""
    datatype = datatype or _datatype_of(array)
    little = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    row_bytes = little.nbytes // len(little)
    data = memoryview(little.reshape(-1).view(np.uint8).data)
    return InputRows(name, datatype, tuple(array.shape[1:]), row_bytes, data)


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
        if FIXED_SIZE.get(tensor.datatype) != array.dtype.newbyteorder("<"):
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
