"""Counts the entries of a serialised ModelInferRequest: to read an empty one takes 25 times its two bytes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tritonclient.grpc import service_pb2

from cascadeserve.errors import InvalidRequest, RequestTooLarge
from orchestrator.wire.datatypes import MAX_DIMS
from orchestrator.wire.limits import MAX_ENTRIES, MAX_LISTED_ELEMENTS

if TYPE_CHECKING:
    from collections.abc import Iterator

# a message as short as that holds too few to matter
_SHORT_BYTES = 1 << 16
# Inputs, outputs, parameters and raw contents, and what inputs and outputs consist of: at most seven fields for an
# input of two parameters, four for an output, and one each for the others make 13.
_MAX_FIELDS = 16 * MAX_ENTRIES
_MAX_SHORT = 0x7F
_LENGTH_DELIMITED = 2
_FIXED_BYTES = {1: 8, 5: 4}


def _tag(message: str, field: str) -> int:
    number: int = service_pb2.DESCRIPTOR.message_types_by_name[message].fields_by_name[field].number
    return number << 3 | _LENGTH_DELIMITED


_REQUEST = "ModelInferRequest"
_PARTS = (_tag(_REQUEST, "inputs"), _tag(_REQUEST, "outputs"))
_INPUT = service_pb2.ModelInferRequest.InferInputTensor.DESCRIPTOR
_CONTENTS = _INPUT.fields_by_name["contents"].number << 3 | _LENGTH_DELIMITED
_SHAPE = _INPUT.fields_by_name["shape"].number << 3 | _LENGTH_DELIMITED
# as protobuf writes them, ten bytes each at most
_MAX_SHAPE_BYTES = 10 * MAX_DIMS
_TEXT = _tag("InferTensorContents", "bytes_contents")
# of a number in typed contents, with its tag where they are not packed
_MAX_NUMBER_BYTES = 11


def check_message(data: bytes, max_listed_elements: int = MAX_LISTED_ELEMENTS) -> None:
    """Refuse a ModelInferRequest of far more fields than an honest one has, before it is read.

    What is no message is left for protobuf to refuse.

    Raises:
        InvalidRequest: an input has too many dimensions.
        RequestTooLarge: it has too many fields, or typed contents of too many texts or numbers.

    """
    if len(data) >= _SHORT_BYTES:
        _Scan(data, max_listed_elements).request()


class _Scan:
    def __init__(self, data: bytes, max_listed_elements: int) -> None:
        self._data = data
        self._max_listed_elements = max_listed_elements
        self._fields = 0
        self._texts = 0
        self._typed_bytes = self._numbers_bytes = 0

    def request(self) -> None:
        for tag, start, end in self._walk(0, len(self._data)):
            if tag in _PARTS:
                for part, first, last in self._walk(start, end):
                    if tag != _PARTS[0]:
                        continue
                    if part == _CONTENTS:
                        self._contents(first, last)
                    elif part == _SHAPE and last - first > _MAX_SHAPE_BYTES:
                        raise InvalidRequest(f"an input has a shape of too many dimensions; there may be {MAX_DIMS}")

    def _contents(self, start: int, end: int) -> None:
        data = self._data
        most_bytes = _MAX_NUMBER_BYTES * self._max_listed_elements
        self._typed_bytes += end - start
        # There are no more texts than bytes that look like the beginning of one, and these are counted fast.
        most = data.count(_TEXT, start, end)
        if self._typed_bytes <= most_bytes and self._texts + most <= self._max_listed_elements:
            self._texts += most
            return
        at = start
        while at < end:
            # without a call for each: texts of less than 16 KiB
            if data[at] == _TEXT and at + 2 < end and data[at + 1] <= _MAX_SHORT:
                at += 2 + data[at + 1]
            elif data[at] == _TEXT and at + 2 < end and data[at + 2] <= _MAX_SHORT:
                at += 3 + (data[at + 1] & _MAX_SHORT) + (data[at + 2] << 7)
            else:
                tag, _, last = next(self._walk(at, end))
                if tag != _TEXT:
                    self._numbers_bytes += last - at
                at = last
            self._texts += 1
            if self._texts > self._max_listed_elements or self._numbers_bytes > most_bytes:
                raise RequestTooLarge(
                    f"the request lists more than {self._max_listed_elements} elements; send raw data or fewer rows"
                )

    def _walk(self, start: int, end: int) -> Iterator[tuple[int, int, int]]:
        for field in _fields(self._data, start, end):
            self._fields += 1
            if self._fields > _MAX_FIELDS:
                raise RequestTooLarge(
                    f"the request has too many fields; there may be {MAX_ENTRIES} inputs, outputs and parameters"
                )
            yield field


def _fields(data: bytes, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Tag, beginning and end of the value of each field, up to the end or to what is no field."""
    at = start
    while at < end:
        tag, at = _varint(data, at, end)
        kind = tag & 7
        length = 0
        if kind == _LENGTH_DELIMITED:
            length, at = _varint(data, at, end)
        elif kind == 0:
            _, at = _varint(data, at, end)
        else:
            # those of groups have no value; their fields are counted as they come
            length = _FIXED_BYTES.get(kind, 0)
        yield tag, at, min(at + length, end)
        at += length


def _varint(data: bytes, at: int, end: int) -> tuple[int, int]:
    value = shift = 0
    while at < end:
        byte = data[at]
        at += 1
        value |= (byte & _MAX_SHORT) << shift
        shift += 7
        # protobuf takes no more than ten bytes
        if byte <= _MAX_SHORT or shift >= 70:  # noqa: PLR2004
            break
    return value, at
