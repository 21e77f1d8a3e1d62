"""Tensor data as JSON: the `data` of an input and of an output.

Inputs are read as Triton reads them: flat or nested in any way, as long as the elements add up to the shape. Element
types are strict: a float is no integer, 1 is no bool, and a number outside its datatype is refused, not wrapped.
"""

from __future__ import annotations

import contextlib
import json
from functools import cache
from itertools import chain
from typing import TYPE_CHECKING, Annotated, Any

import msgspec
import numpy as np

from cascadeserve.errors import InvalidRequest, RequestTooLarge
from orchestrator.wire.datatypes import DTYPES, bytes_array, check_tensor, checked_output, shaped, shown_shape
from orchestrator.wire.json_numbers import check_length, names_not_finite, read_numbers
from orchestrator.wire.not_finite import MAX_SLOW_BYTES, check_slow, read_slowly

if TYPE_CHECKING:
    from collections.abc import Sequence

    from orchestrator.wire.tensors import Array, Tensor

# What msgspec and the standard library raise on bytes that are not the JSON asked for.
JSON_ERRORS = (msgspec.DecodeError, ValueError, RecursionError)

_NO_JSON_FORM = ("FP16", "BF16")
# Deeper nesting has no shape that numpy could hold.
_MAX_NESTING = 32
_TOO_DEEP = b"[" * (_MAX_NESTING + 1)
# what stays in a cache
_PIECE_BYTES = 1 << 18
_OPENING, _CLOSING, _QUOTE = b'[]"'


def _element_type(datatype: str) -> Any:  # noqa: ANN401 - a type made at run time
    """Return the type of one JSON element, for msgspec."""
    dtype = DTYPES[datatype]
    if datatype == "BYTES":
        return str
    if dtype.kind == "b":
        return bool
    if dtype.kind == "f":
        return float
    if datatype == "UINT64":
        # msgspec bounds end at 2**63 - 1; numpy refuses what is above 2**64 - 1.
        return Annotated[int, msgspec.Meta(ge=0)]
    limits = np.iinfo(dtype)
    return Annotated[int, msgspec.Meta(ge=int(limits.min), le=int(limits.max))]


_LIST_TYPES: dict[str, Any] = {name: list[_element_type(name)] for name in DTYPES if name not in _NO_JSON_FORM}  # type: ignore[misc]
_FLAT_DECODERS = {name: msgspec.json.Decoder(kind) for name, kind in _LIST_TYPES.items()}


def array_from_json(name: str, datatype: str, shape: Sequence[int], data: bytes | memoryview) -> Array:
    """Read the JSON text of an input's `data`."""
    count = check_tensor(name, datatype, shape)
    if datatype in _NO_JSON_FORM:
        raise InvalidRequest(
            f"receiving {datatype} data via JSON is not supported; use the binary data format for input '{name}'"
        )
    if datatype != "BYTES":
        check_length(name, data, count)
    numbers = read_numbers(bytes(data)) if DTYPES[datatype].kind == "f" else None
    elements = _elements(name, datatype, data) if numbers is None else numbers
    if len(elements) != count:
        raise InvalidRequest(
            f"the 'data' of input '{name}' has {len(elements)} elements but its shape {shown_shape(shape)} has {count}"
        )
    return shaped(name, _flat_array(name, datatype, elements), shape)


@cache
def _nested_decoder(datatype: str) -> msgspec.json.Decoder[Any]:
    """Make what stops at the first that is neither an element nor a list, up to the deepest level."""
    element: Any = _element_type(datatype)
    kind: Any = list.__class_getitem__(element)
    for _ in range(_MAX_NESTING - 1):
        kind = list.__class_getitem__(element | kind)
    return msgspec.json.Decoder(kind)


def _elements(name: str, datatype: str, data: bytes | memoryview) -> list[Any]:
    """Decode `data` to one flat list with elements of the datatype's JSON type."""
    if DTYPES[datatype].kind == "f" and len(data) > MAX_SLOW_BYTES:
        raise RequestTooLarge(
            f"the 'data' of input '{name}' holds what is not plain numbers, or empty lists, and is longer than "
            f"{MAX_SLOW_BYTES} bytes; send binary data or fewer rows"
        )
    try:
        try:
            flat: list[Any] = _FLAT_DECODERS[datatype].decode(data)
        except msgspec.DecodeError:
            # Nested, not finite or wrong: the slower ways find out.
            text = bytes(data)
            unfolded = _unfolded(datatype, text)
            flat = _looked_at(name, datatype, text) if unfolded is None else unfolded
    except JSON_ERRORS as error:
        sentence = str(error).replace(" | array", "")
        raise InvalidRequest(f"cannot read the 'data' of input '{name}' as {datatype}: {sentence}") from None
    return flat


def _unfolded(datatype: str, text: bytes) -> list[Any] | None:
    """Read nested data by leaving out what nests it; None where that takes a closer look."""
    if not text.startswith(b"[") or _TOO_DEEP in text or b"\\" in text:
        return None
    # No quote is escaped: what stands behind an odd number of them is part of a string.
    num_quotes = 0
    for at in range(0, len(text), _PIECE_BYTES):
        piece = np.frombuffer(text[at : at + _PIECE_BYTES], np.uint8)
        quotes = np.flatnonzero(piece == _QUOTE)
        brackets = np.flatnonzero((piece == _OPENING) | (piece == _CLOSING))
        if (np.searchsorted(quotes, brackets) + num_quotes & 1).any():
            return None
        num_quotes += quotes.size
    with contextlib.suppress(msgspec.DecodeError):
        return _FLAT_DECODERS[datatype].decode(b"[" + text.translate(None, b"[]") + b"]")  # type: ignore[no-any-return]
    return None


def _looked_at(name: str, datatype: str, text: bytes) -> list[Any]:
    if datatype != "BYTES" and names_not_finite(text):
        return msgspec.convert(flattened(name, read_slowly(text)), _LIST_TYPES[datatype])  # type: ignore[no-any-return]
    check_slow(text)
    try:
        return flattened(name, _nested_decoder(datatype).decode(text))  # type: ignore[no-any-return]
    except msgspec.ValidationError as error:
        # anywhere else there may be one
        raise (_too_deep(name) if "got `array`" in str(error) else error) from None


def flattened(name: str, data: Any) -> Any:  # noqa: ANN401 - any JSON value
    """Take nesting away; what is not a list stays for the type check to refuse."""
    if not isinstance(data, list):
        return data
    level = 1
    # Arrays, the fast way: all items of a level are lists, or none is.
    while level <= _MAX_NESTING and set(map(type, data)) == {list}:
        data = list(chain.from_iterable(data))
        level += 1
    flat: list[Any] = []
    _gather(name, data, level, flat)
    return flat


def _gather(name: str, items: list[Any], level: int, flat: list[Any]) -> None:
    """Put what stands in nested lists behind each other into `flat`, so that each list is gone through once."""
    if level > _MAX_NESTING:
        raise _too_deep(name)
    if list not in map(type, items):
        flat += items
        return
    for item in items:
        if type(item) is list:
            _gather(name, item, level + 1, flat)
        else:
            flat.append(item)


def _too_deep(name: str) -> InvalidRequest:
    return InvalidRequest(f"the 'data' of input '{name}' is nested more than {_MAX_NESTING} levels deep")


def _flat_array(name: str, datatype: str, elements: Sequence[Any] | Array) -> Array:
    if datatype == "BYTES":
        try:
            return bytes_array([text.encode() for text in elements])
        except UnicodeEncodeError:
            # Python's `json` lets half of a surrogate pair in.
            raise InvalidRequest(f"the 'data' of input '{name}' holds text that is no Unicode") from None
    dtype = DTYPES[datatype]
    if dtype.kind == "f":
        exact = np.asarray(elements, dtype=np.float64)
        if datatype == "FP64":
            return exact
        with np.errstate(over="ignore"):
            array = exact.astype(dtype)
        infinite = np.isinf(array)
        if infinite.any() and np.isfinite(exact[infinite]).any():
            raise InvalidRequest(f"the 'data' of input '{name}' holds a number outside the range of FP32")
        return array
    try:
        return np.array(elements, dtype=dtype)
    except OverflowError:
        raise InvalidRequest(f"the 'data' of input '{name}' holds a number outside the range of {datatype}") from None


def json_from_tensor(tensor: Tensor) -> msgspec.Raw:
    """Render an output's `data` as flat JSON text."""
    array = checked_output(tensor)
    if tensor.datatype in _NO_JSON_FORM:
        raise InvalidRequest(
            f"sending {tensor.datatype} data via JSON is not supported; ask for output '{tensor.name}' with binary_data"
        )
    elements = array.ravel().tolist()
    if tensor.datatype == "BYTES":
        try:
            elements = [element.decode() for element in elements]
        except UnicodeDecodeError:
            raise InvalidRequest(
                f"output '{tensor.name}' holds bytes that are not UTF-8; ask for it with binary_data"
            ) from None
    elif array.dtype.kind == "f" and not np.isfinite(array).all():
        # Bare NaN and Infinity are not JSON, but what Triton writes and its clients read; msgspec would write null.
        return msgspec.Raw(json.dumps(elements, separators=(",", ":")).encode())
    return msgspec.Raw(msgspec.json.encode(elements))
