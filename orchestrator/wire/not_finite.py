"""NaN, Infinity and -Infinity in JSON: no JSON, but what Triton reads and Python's clients write.

The fast parsers refuse these words. So they are written as something else, read, and found again; the standard library
reads them, at six times the cost, where that cannot be done.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np

from cascadeserve.errors import RequestTooLarge
from orchestrator.wire.json_numbers import INFINITY, NAN, names_not_finite
from orchestrator.wire.limits import MAX_LISTED_ELEMENTS

# A list can stand where a value can, and nothing but data may be one; nobody writes these.
_MARK = b"[0E-0"
_MARKS = ((b"-" + INFINITY, _MARK + b"3]"), (INFINITY, _MARK + b"2]"), (NAN, _MARK + b"1]"))
# It is written and read several times over. The most numbers that there may be take no more, written in full.
_MAX_BYTES = 1 << 25
# values, or lists, that the standard library reads as fast as the others read `MAX_LISTED_ELEMENTS`
_MAX_SLOW = MAX_LISTED_ELEMENTS // 8
# what it reads in 0.2 s, whatever stands there but for long integers, and the digits of these that a double may have
MAX_SLOW_BYTES = 1 << 22
_MAX_DIGITS = 310
# Escapes with a backslash or a quote, and bytes that stand nowhere in UTF-8. A backslash first: it may stand before a
# quote that ends its string.
_ESCAPES = ((b"\\\\", b"\xff\xff"), (b'\\"', b"\xfe\xfe"))
_NO_UTF8 = (b"\xff", b"\xfe")
_BACKSLASH = ord("\\")


def marked(text: bytes) -> bytes | None:
    """Write JSON with marks for these words, but for those in strings; None where that takes a closer look.

    Raises:
        RequestTooLarge: it is longer than the most numbers that there may be.

    """
    if len(text) > _MAX_BYTES:
        raise RequestTooLarge(
            f"the request JSON holds NaN or Infinity and is longer than {_MAX_BYTES} bytes; send binary data or fewer "
            f"rows"
        )
    if _MARK in text:
        return None
    if b"\\" not in text:
        return _marked(text)
    num_escapes = np.count_nonzero(np.frombuffer(text, np.uint8) == _BACKSLASH)
    if num_escapes > MAX_LISTED_ELEMENTS or any(part in text for part in _NO_UTF8):
        return None
    for escape, stand_in in _ESCAPES:
        text = text.replace(escape, stand_in)
    text = _marked(text)
    for escape, stand_in in _ESCAPES:
        text = text.replace(stand_in, escape)
    return text


def _marked(text: bytes) -> bytes:
    # no quote is escaped: every second part is a string
    parts = text.split(b'"')
    for at in range(0, len(parts), 2):
        part = parts[at]
        if names_not_finite(part):
            for word, mark in _MARKS if INFINITY in part else _MARKS[-1:]:
                part = part.replace(word, mark)
            parts[at] = part
    return b'"'.join(parts)


def unmarked(text: bytes) -> bytes:
    """Write the words again where the marks are."""
    if _MARK in text:
        for word, mark in _MARKS:
            text = text.replace(mark, word)
    return text


def check_slow(text: bytes) -> None:
    """Refuse what has more lists than can be gone through one by one."""
    if len(text) > _MAX_SLOW and text.count(b"[") >= _MAX_SLOW:
        raise RequestTooLarge(
            f"the request JSON has more than {_MAX_SLOW} lists of what is not plain numbers; send binary data or fewer "
            f"rows"
        )


def read_slowly(text: bytes) -> Any:  # noqa: ANN401 - any JSON value
    """Read JSON with these words as the standard library does, in its time.

    Raises:
        RequestTooLarge: that would take too long.
        ValueError: it is no JSON.

    """
    check_slow(text)
    if len(text) > MAX_SLOW_BYTES or (len(text) > _MAX_SLOW and text.count(b",") >= _MAX_SLOW):
        raise RequestTooLarge(
            f"the request JSON has more than {_MAX_SLOW} values or {MAX_SLOW_BYTES} bytes, and NaN or Infinity beside "
            f"what is not plain numbers; send binary data or fewer rows"
        )
    return json.loads(text.decode(), parse_int=_integer)


def _integer(digits: str) -> int:
    # the time that it takes grows with the square of them
    if len(digits) > _MAX_DIGITS:
        raise ValueError(f"an integer has {len(digits)} digits, which is outside the range of every datatype")
    return int(digits)
