"""Preprocessing of `texts_words`: which words a text has, hashed. It runs in Triton: numpy and the standard library."""

from __future__ import annotations

import re
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

BUCKETS = 512
_WORD = re.compile(rb"[A-Za-z_]+|[^\sA-Za-z_]")


def preprocess(inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[np.generic]]:
    """`text` [n, 1] of bytes to `counts` float32 [n, BUCKETS]: logarithms of one plus how often."""
    counts = np.zeros((len(inputs["text"]), BUCKETS), np.float32)
    for row, text in enumerate(inputs["text"][:, 0]):
        buckets = [zlib.crc32(word) % BUCKETS for word in _WORD.findall(text)]
        counts[row] = np.bincount(buckets, minlength=BUCKETS) if buckets else 0
    return {"counts": np.log1p(counts)}
