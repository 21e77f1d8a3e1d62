"""NaN, Infinity and -Infinity in JSON: no JSON, but what Triton reads and Python's clients write.

The fast parsers refuse these words. So they are written as something else, read, and found again; the standard library
reads them, at six times the cost, where that cannot be done.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import simdjson

from cascadeserve.errors import RequestTooLarge
from orchestrator.wire.limits import MAX_LISTED_ELEMENTS

if TYPE_CHECKING:
    from orchestrator.wire.tensors import Array

_NAN, _INFINITY, _MINUS_INFINITY = b"NaN", b"Infinity", b"-Infinity"
# A list can stand where a value can, and nothing but data may be one; nobody writes these.
_MARK = b"[0E-0"
_MARKS = ((_MINUS_INFINITY, _MARK + b"3]"), (_INFINITY, _MARK + b"2]"), (_NAN, _MARK + b"1]"))
# values, or lists, that the standard library reads as fast as the others read `MAX_LISTED_ELEMENTS`
_MAX_SLOW = MAX_LISTED_ELEMENTS // 8


def names_not_finite(text: bytes) -> bool:
    """Whether NaN or Infinity stand there, be it in a string."""
    return _NAN in text or _INFINITY in text


def marked(text: bytes) -> bytes | None:
    """Write JSON with marks for these words, but for those in strings; None where that takes a closer look."""
    if b"\\" in text or _MARK in text:
        return None
    # no quote is escaped: every second part is a string
    parts = text.split(b'"')
    for at in range(0, len(parts), 2):
        part = parts[at]
        if names_not_finite(part):
            for word, mark in _MARKS:
                part = part.replace(word, mark)
            parts[at] = part
    return b'"'.join(parts)


def unmarked(text: bytes) -> bytes:
    """Write the words again where the marks are."""
    if _MARK in text:
        for word, mark in _MARKS:
            text = text.replace(mark, word)
    return text


def read_numbers(text: bytes | memoryview) -> Array | None:
    """Read an array of numbers and these words, nested or not, as it stands there; None if there is anything else."""
    plain = _plain_numbers(text)
    if plain is not None:
        return plain
    text = bytes(text)
    if not names_not_finite(text):
        return None
    # Read twice, with other numbers for the words: where the two differ, there they are.
    read = _plain_numbers(text.replace(_NAN, b"0").replace(_INFINITY, b"0"))
    found = _plain_numbers(text.replace(_NAN, b"1").replace(_INFINITY, b"2"))
    if read is None or found is None:
        return None
    (where,) = np.nonzero(read != found)
    which = found[where]
    if read[where].any() or not np.isin(which, (1, 2, -2)).all():
        # a word within a number
        return None
    read = read.copy()
    read[where] = np.where(which == 1, np.nan, np.copysign(np.inf, which))
    return read


def _plain_numbers(text: bytes | memoryview) -> Array | None:
    """Read numbers without an object for each: in half the time."""
    try:
        listed = simdjson.Parser().parse(text)
        return np.frombuffer(listed.as_buffer(of_type="d")) if isinstance(listed, simdjson.Array) else None
    except (ValueError, TypeError, RuntimeError):
        return None


def check_slow(text: bytes) -> None:
    """Refuse what would be read for too long value by value."""
    if len(text) <= _MAX_SLOW:
        return
    if text.count(b"[") >= _MAX_SLOW:
        raise RequestTooLarge(
            f"the request JSON has more than {_MAX_SLOW} lists of what is not plain numbers; send binary data or fewer "
            f"rows"
        )
    if names_not_finite(text) and text.count(b",") >= _MAX_SLOW:
        raise RequestTooLarge(
            f"the request JSON has more than {_MAX_SLOW} values, and NaN or Infinity beside what is not plain numbers; "
            f"send binary data or fewer rows"
        )
