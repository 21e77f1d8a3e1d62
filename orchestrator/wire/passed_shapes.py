"""Requests that are not passed on: some tritonservers (2.51) end when the elements of a shape overflow."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from cascadeserve.errors import InvalidRequest, RequestTooLarge
from orchestrator.wire.codec_http import parse_header_length
from orchestrator.wire.limits import MAX_ENTRIES

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from orchestrator.wire.exchange import Call

# more than any request can hold
_MOST_ELEMENTS = 1 << 31
# 32 dimensions take 650
_MAX_SHAPE_BYTES = 1 << 12
# Found in the text, wherever they stand: Triton's reader takes more than others (NaN, a byte order mark, a key twice,
# of which it takes the first), and what it takes must not pass unseen. Within a text the quotes would be escaped.
_SHAPE = re.compile(rb'"shape"[ \t\r\n]*:[ \t\r\n]*\[([^\]]*)')
_DIM = re.compile(rb"[0-9]+")
# the letters of that key as no client writes them
_ESCAPED = [b"\\u%04x" % letter for letter in b"shape"]


def check_http(call: Call) -> None:
    """Refuse a request for inference with such a shape; what else is wrong with it is the server's to refuse.

    Raises:
        InvalidRequest: it has one, or one that cannot be found.
        RequestTooLarge: it has too many shapes.

    """
    try:
        end = parse_header_length(call.header_length, len(call.body))
    except InvalidRequest:
        end = None  # the server may read another number
    end = len(call.body) if end is None else end
    if any(call.body.find(escaped, 0, end) >= 0 for escaped in _ESCAPED):
        raise InvalidRequest("the request JSON has letters of 'shape' written as escapes; write them as they are")
    for number, found in enumerate(_SHAPE.finditer(call.body, 0, end)):
        if number >= MAX_ENTRIES:
            raise RequestTooLarge(f"the request has too many shapes; there may be {MAX_ENTRIES} inputs")
        if len(found[1]) > _MAX_SHAPE_BYTES:
            raise InvalidRequest("an input has a shape of too many dimensions; send its own shape")
        # a longer number is too large, and takes long to read
        _check([[int(dim[:20]) for dim in _DIM.findall(found[1])]])


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
