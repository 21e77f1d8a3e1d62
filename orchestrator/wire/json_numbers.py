"""The numbers of large JSON, read without an object for each, within bounds of what they may take.

A number of more than 19 digits may take ten times as long to read as an honest one, and one of thousands of digits a
thousand times. Neither is worth a limit of its own: what all of them may take together is.
"""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import simdjson

from cascadeserve.errors import RequestTooLarge

if TYPE_CHECKING:
    from orchestrator.wire.tensors import Array

# a number in full takes 24 characters, and one a line, indented, more white space
_BYTES_PER_NUMBER = 32
_SPARE_BYTES = 1 << 20
# what is read at once: it stays in a cache, and how long it took is looked at afterwards
_PIECE_BYTES = 1 << 20
# Processor time that is no reason to refuse, five times what honest numbers take.
_GRACE_S, _S_PER_NUMBER, _S_PER_BYTE = 0.05, 150e-9, 5e-9
NAN, INFINITY = b"NaN", b"Infinity"
_COMMA, _BLANK = b", "
_FLOATS = msgspec.json.Decoder(list[float])


def check_length(name: str, data: bytes | memoryview, count: int) -> None:
    """Refuse an input of `count` elements whose `data` is far longer than so many numbers are; white space is free."""
    if len(data) <= _SPARE_BYTES:
        return
    text = np.frombuffer(data, np.uint8)
    commas = filled = 0
    for at in range(0, text.size, _PIECE_BYTES):
        piece = text[at : at + _PIECE_BYTES]
        commas += np.count_nonzero(piece == _COMMA)
        filled += np.count_nonzero(piece > _BLANK)
    # a shape claims what it likes
    if filled > _SPARE_BYTES + _BYTES_PER_NUMBER * min(count, commas + 1):
        raise RequestTooLarge(
            f"the 'data' of input '{name}' is longer than {_BYTES_PER_NUMBER} bytes a number; write them shorter, or "
            f"send binary data"
        )


def names_not_finite(text: bytes) -> bool:
    """Whether NaN or Infinity stand there, be it in a string."""
    return NAN in text or INFINITY in text


def read_numbers(text: bytes) -> Array | None:
    """Read an array of numbers, NaN and Infinity, nested or not, as it stands there; None if there is anything else.

    But for these words, `text` is valid JSON if it is longer than a megabyte.

    Raises:
        RequestTooLarge: that takes many times as long as numbers do.

    """
    if len(text) <= _PIECE_BYTES:
        read = _read_plain(text)
        return _read_words(text) if read is None else read
    if not text.startswith(b"["):
        return None
    begun_s = time.thread_time()
    pieces: list[Array] = []
    at = num_numbers = 0
    while at < len(text):
        end = text.find(b",", at + _PIECE_BYTES)
        if end < 0:
            end = len(text)
        # The brackets of valid JSON say nothing but where what is nested begins and ends; an empty list is found by
        # the two commas beside it, a text that is cut by its one quote.
        flat = b"[" + text[at:end].translate(None, b"[]") + b"]"
        piece = _read_plain(flat)
        num_numbers += flat.count(b",") + 1
        if piece is None:
            piece = _read_words(flat)
            # read twice
            num_numbers += flat.count(b",") + 1
        if piece is None:
            return None
        pieces.append(piece)
        at = end + 1
        if time.thread_time() - begun_s > _GRACE_S + _S_PER_NUMBER * num_numbers + _S_PER_BYTE * at:
            raise RequestTooLarge(
                "the request JSON has numbers that take many times longer to read than others; write them with 17 "
                "digits, or send binary data"
            )
    return np.concatenate(pieces)


def _read_plain(text: bytes) -> Array | None:
    with contextlib.suppress(ValueError, TypeError, RuntimeError):
        listed = simdjson.Parser().parse(text)
        return np.frombuffer(listed.as_buffer(of_type="d")) if isinstance(listed, simdjson.Array) else None
    # It refuses integers of more than 64 bits. With an object for each number it takes twice the time.
    try:
        return np.array(_FLOATS.decode(text))
    except msgspec.DecodeError:
        return None


def _read_words(text: bytes) -> Array | None:
    """Read twice, with other numbers for the words: where the two differ, there they are."""
    if not names_not_finite(text):
        return None
    read = _read_plain(text.replace(NAN, b"0").replace(INFINITY, b"0"))
    found = _read_plain(text.replace(NAN, b"1").replace(INFINITY, b"2"))
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
