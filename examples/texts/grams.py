"""Preprocessing of `texts_grams`: which runs of characters a text has, hashed.

It runs in Triton: numpy and the standard library.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

BUCKETS = 4096
_LENGTHS = (3, 4, 5, 6)
_SHIFT = np.uint64(64 - 12)  # BUCKETS is 2 ** 12
# odd and without pattern, as in multiplicative hashing
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_STEP = np.uint64(0x100000001B3)


def preprocess(inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.generic]]:
    """`text` [n, 1] of bytes to `counts` float32 [n, BUCKETS]: logarithms of one plus how often."""
    counts = np.zeros((len(inputs["text"]), BUCKETS), np.float32)
    for row, text in enumerate(inputs["text"][:, 0]):
        characters = np.frombuffer(text, np.uint8).astype(np.uint64)
        grams = np.full(len(characters), 1, np.uint64)
        for length in range(1, _LENGTHS[-1] + 1):
            if len(characters) < length:
                break
            # of the run of this length that begins at each character
            grams = grams[: len(characters) - length + 1] * _STEP + characters[length - 1 :]
            if length in _LENGTHS:
                counts[row] += np.bincount((grams * _FACTOR >> _SHIFT).astype(np.int64), minlength=BUCKETS)
    return {"counts": np.log1p(counts)}
