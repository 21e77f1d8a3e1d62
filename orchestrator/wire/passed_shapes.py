"""Requests that are not passed on: some tritonservers (2.51) end when the elements of a shape overflow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from cascadeserve.errors import InvalidRequest
from orchestrator.wire.codec_http import parse_header_length

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from orchestrator.wire.exchange import Call

# more than any request can hold
_MOST_ELEMENTS = 1 << 31


class _Input(msgspec.Struct, gc=False):
    shape: list[int] = []


class _Head(msgspec.Struct, gc=False):
    inputs: list[_Input] = []


_decode = msgspec.json.Decoder(_Head).decode


def check_http(call: Call) -> None:
    """Refuse a request for inference with such a shape; what cannot be read is the server's to refuse.

    Raises:
        InvalidRequest: it has one.

    """
    try:
        length = parse_header_length(call.header_length, len(call.body))
        head = _decode(call.body if length is None else memoryview(call.body)[:length])
    except (InvalidRequest, msgspec.DecodeError, ValueError, RecursionError):
        return
    _check(each.shape for each in head.inputs)


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
