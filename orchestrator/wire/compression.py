"""Compressed HTTP responses, for clients that say they take them."""

from __future__ import annotations

import asyncio
import gzip
import zlib
from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orchestrator.wire.exchange import Answer

# A shorter body gains nothing that its client would notice: it fits into one packet as it is.
MIN_BYTES = 1024
# From here on compressing would hold up the other requests; zlib works in another thread at the same time.
_MIN_THREAD_BYTES = 1 << 16
# the fastest: what is saved beyond it is small, what it costs is not
_LEVEL = 1


async def compressed(answer: Answer, accept_encoding: str) -> Answer:
    """Compress a body if it is worth it and the header `Accept-Encoding` names a way."""
    encoding = chosen_encoding(accept_encoding)
    if encoding is None or len(answer.body) < MIN_BYTES:
        return answer
    if len(answer.body) < _MIN_THREAD_BYTES:
        answer.body = _compress(answer.body, encoding)
    else:
        answer.body = await asyncio.to_thread(_compress, answer.body, encoding)
    answer.headers["Content-Encoding"] = encoding
    return answer


@lru_cache(maxsize=256)
def chosen_encoding(accept_encoding: str) -> str | None:
    """Choose gzip or deflate as Triton does: what is liked most, of equals the first; None for neither."""
    best, best_weight = None, 0.0
    for part in accept_encoding.split(","):
        name, _, parameters = part.partition(";")
        weight = _weight(parameters)
        if name.strip().lower() in ("gzip", "deflate") and weight > best_weight:
            best, best_weight = name.strip().lower(), weight
    return best


def _weight(parameters: str) -> float:
    key, _, value = parameters.partition("=")
    if key.strip().lower() != "q":
        return 1.0
    try:
        return float(value)
    except ValueError:
        return 0.0


def _compress(body: bytes, encoding: str) -> bytes:
    if encoding == "gzip":
        return gzip.compress(body, _LEVEL, mtime=0)
    return zlib.compress(body, _LEVEL)
