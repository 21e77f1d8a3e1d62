"""The KServe datatypes, and raw buffers to arrays and back.

A raw buffer is row-major and little-endian. Each BYTES element is a 4-byte length and then that many bytes. BF16 has
no numpy type: its 16-bit words travel as uint16.
"""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING, Any

import numpy as np

from cascadeserve.datatypes import FIXED_SIZE
from cascadeserve.errors import InternalError, InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from orchestrator.wire.tensors import Array, Tensor

    Buffer = bytes | memoryview

DTYPES: dict[str, np.dtype[Any]] = FIXED_SIZE | {"BYTES": np.dtype(object)}

MAX_DIM = 2**63 - 1
# what any version of numpy holds
MAX_DIMS = 32
_LENGTH = struct.Struct("<I")


def check_tensor(name: str, datatype: str, shape: Sequence[int]) -> int:
    """Return the number of elements of an input; refuse an unknown datatype or a shape that cannot be."""
    if datatype not in DTYPES:
        raise InvalidRequest(
            f"invalid datatype for input {name}: unknown datatype '{datatype}'; use one of {', '.join(DTYPES)}"
        )
    check_dims(name, shape)
    # min() before prod(): two negative dimensions make a positive product
    if shape and min(shape) < 0:
        raise InvalidRequest(f"input '{name}' has the shape {shown_shape(shape)} with a negative dimension")
    # Python's integers do not overflow: a huge shape gives a huge count, which fits no buffer. Shorter is as huge.
    return min(math.prod(shape), MAX_DIM)


def check_dims(name: str, shape: Sequence[int]) -> None:
    """Refuse a shape of so many dimensions that to multiply or to show them takes long."""
    if len(shape) > MAX_DIMS:
        raise InvalidRequest(
            f"input '{name}' has a shape of too many dimensions: {len(shape)}; there may be {MAX_DIMS}"
        )


def array_from_raw(name: str, datatype: str, shape: Sequence[int], buffer: Buffer) -> Array:
    """View a raw buffer as an array of `shape`; nothing is copied, so the array may be read-only and unaligned."""
    count = check_tensor(name, datatype, shape)
    if datatype == "BYTES":
        return shaped(name, _bytes_elements(name, buffer, count), shape)
    dtype = DTYPES[datatype]
    if len(buffer) != count * dtype.itemsize:
        raise InvalidRequest(
            f"input '{name}' of datatype {datatype} and shape {shown_shape(shape)} needs "
            f"{count * dtype.itemsize} bytes of data but got {len(buffer)}"
        )
    if not count:  # np.frombuffer refuses an empty buffer
        return shaped(name, np.empty(0, dtype), shape)
    if datatype == "BOOL":
        # A numpy bool that is neither 0 nor 1 breaks what is computed from it.
        words = np.frombuffer(buffer, np.uint8)
        if words.max() > 1:
            raise InvalidRequest(f"input '{name}' of datatype BOOL holds a byte that is neither 0 nor 1")
        return shaped(name, words.view(dtype), shape)
    return shaped(name, np.frombuffer(buffer, dtype), shape)


def shaped(name: str, flat: Array, shape: Sequence[int]) -> Array:
    """Give a flat array of the right length its shape."""
    try:
        return flat.reshape(shape)
    except (ValueError, OverflowError):
        # numpy's own limits: the number of dimensions, and [0, 2**62] counts as too large although it is empty
        raise InvalidRequest(f"input '{name}' has a shape of too many or too large dimensions") from None


def raw_from_tensor(tensor: Tensor) -> bytes:
    """Render an output as a raw buffer."""
    return array_to_bytes(checked_output(tensor), tensor.datatype)


def array_to_bytes(array: Array, datatype: str) -> bytes:
    """Render an array of the datatype's dtype as a raw buffer."""
    if datatype != "BYTES":
        return array.tobytes()
    elements: list[bytes] = array.ravel().tolist()
    lengths = list(map(len, elements))
    packed = {length: _LENGTH.pack(length) for length in set(lengths)}
    pieces = [b""] * (2 * len(elements))
    pieces[::2] = map(packed.__getitem__, lengths)
    pieces[1::2] = elements
    return b"".join(pieces)


def checked_output(tensor: Tensor) -> Array:
    """Return the array of an output, or say that the data plane broke its contract."""
    dtype = DTYPES.get(tensor.datatype)
    if dtype is None or tensor.array.dtype != dtype:
        raise InternalError(
            f"output '{tensor.name}' is declared as {tensor.datatype} but holds {tensor.array.dtype.name}"
        )
    return tensor.array


def shown_shape(shape: Sequence[int]) -> str:
    """Write a shape as clients write it, shortened where it is absurd."""
    text = str(list(shape))
    limit = 100
    return text if len(text) <= limit else f"{text[:limit]}..."


def _bytes_elements(name: str, buffer: Buffer, count: int) -> Array:
    """Cut a buffer of length-prefixed elements into a flat array of `bytes`."""
    # Checked first, so that a huge shape costs nothing: every element takes at least its length.
    if count * _LENGTH.size > len(buffer):
        raise InvalidRequest(f"input '{name}' of datatype BYTES holds fewer than the {count} elements of its shape")
    data = bytes(buffer)
    elements = _equally_long(data, count)
    if elements is None:
        elements = _any_length(name, data, count)
    return bytes_array(elements)


def _equally_long(data: bytes, count: int) -> list[bytes] | None:
    """Cut elements that are all equally long, in a third of the time; None where they are not."""
    if not count:
        return None
    length = _LENGTH.unpack_from(data)[0]
    if count * (_LENGTH.size + length) != len(data):
        return None
    rows = np.frombuffer(data, np.dtype([("length", "<u4"), ("element", f"V{length}")]))
    if (rows["length"] != length).any():
        return None
    cut: list[bytes] = rows["element"].tolist() if length else [b""] * count
    return cut


def _any_length(name: str, data: bytes, count: int) -> list[bytes]:
    elements: list[bytes] = []
    end = len(data)
    offset, start = 0, _LENGTH.size
    # local names: this runs up to a million times
    add, length_at = elements.append, _LENGTH.unpack_from
    try:
        for _ in range(count):
            (length,) = length_at(data, offset)
            offset = start + length
            # one that ends too late is cut short here, and found afterwards
            add(data[start:offset])
            start = offset + _LENGTH.size
    except struct.error:
        if offset <= end:
            raise InvalidRequest(f"input '{name}' of datatype BYTES ends within the length of an element") from None
    if offset > end:
        raise InvalidRequest(f"input '{name}' of datatype BYTES ends within an element")
    if offset != end:
        raise InvalidRequest(
            f"input '{name}' of datatype BYTES holds {end - offset} bytes after the {count} elements of its shape"
        )
    return elements


def bytes_array(elements: list[bytes]) -> Array:
    """Make a flat object array of `bytes`."""
    array = np.empty(len(elements), dtype=object)
    array[:] = elements
    return array
