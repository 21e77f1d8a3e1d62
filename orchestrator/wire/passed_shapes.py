"""Requests that are not passed on: some tritonservers (2.51) end when the elements of a shape overflow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from cascadeserve.errors import InvalidRequest, RequestTooLarge
from orchestrator.wire.codec_http import parse_header_length

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from orchestrator.wire.exchange import Call

# more than any request can hold
_MOST_ELEMENTS = 1 << 31


# 32 dimensions take 650; a list of millions of them takes seconds to read
_MAX_SHAPE_BYTES = 1 << 12
# what may be inputs, or stand in their texts: a second for each two million
_MAX_OBJECTS = 1 << 20


class _Input(msgspec.Struct, gc=False):
    # unread, until it is known to be short
    shape: msgspec.Raw = msgspec.Raw(b"[]")


class _Head(msgspec.Struct, gc=False):
    inputs: list[_Input] = []


_decode = msgspec.json.Decoder(_Head).decode
_decode_shape = msgspec.json.Decoder(list[int]).decode


def check_http(call: Call) -> None:
    """Refuse a request for inference with such a shape; what cannot be read is the server's to refuse.

    Raises:
        InvalidRequest: it has one.
        RequestTooLarge: it has far too many inputs to look at.

    """
    try:
        length = parse_header_length(call.header_length, len(call.body))
    except InvalidRequest:
        return
    if call.body.count(b"{", 0, length) > _MAX_OBJECTS:
        raise RequestTooLarge(f"the request JSON has more than {_MAX_OBJECTS} objects; send binary data or fewer rows")
    try:
        shapes = [memoryview(each.shape) for each in _decode(memoryview(call.body)[:length]).inputs]
        if any(len(shape) > _MAX_SHAPE_BYTES for shape in shapes):
            raise InvalidRequest("an input has a shape of too many dimensions; send its own shape")
        _check(map(_decode_shape, shapes))
    except (msgspec.DecodeError, ValueError, RecursionError):
        return


def check_rpc(request: Any) -> None:  # noqa: ANN401 - an untyped message
    """The same for a ModelInferRequest."""
    _check(each.shape for each in request.inputs)


def _check(shapes: Iterable[Sequence[int]]) -> None:
    for shape in shapes:
        elements = 1
        for dim in shape:
            elements *= max(abs(dim), 1)
            if elements > _MOST_ELEMENTS:
                raise InvalidRequest("an input's shape has more elements than a request can hold; send its own shape")
