"""Compressed HTTP bodies: requests as they come, responses for clients that say they take them."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import TYPE_CHECKING

from cascadeserve.errors import InvalidRequest, NotSupported, RequestTooLarge

if TYPE_CHECKING:
    from collections.abc import Iterator

    from orchestrator.wire.exchange import Answer

# A shorter body gains nothing that its client would notice: it fits into one packet as it is.
MIN_BYTES = 1024
# From here on compressing would hold up the other requests; zlib works in another thread at the same time.
_MIN_THREAD_BYTES = 1 << 16
# the fastest: what is saved beyond it is small, what it costs is not
_LEVEL = 1
# zlib's window bits of gzip, zlib and bare data; and how zlib data begins
_GZIP, _ZLIB, _BARE = 31, 15, -15
_DEFLATED = 8


# Little may unfold to very much. One at a time and in a thread: whatever comes leaves half of one core to the others.
_UNFOLDER = ThreadPoolExecutor(1, "unfold")
# What is no more than this is done before a thread would have begun.
_INLINE_BYTES = 1 << 17
# zlib gathers what it unfolds in one call into one piece, and nothing else runs meanwhile: 40 ms for 64 MiB.
_PORTION_BYTES = 1 << 16
# Each costs some microseconds, however little it holds.
_MAX_MEMBERS = 100


async def unfolded(body: bytes, encoding: str, limit_bytes: int) -> bytes:
    """Decompress the body of a request, up to `limit_bytes`; `encoding` is its header Content-Encoding."""
    if encoding in ("", "identity"):
        return body
    if encoding not in ("gzip", "deflate"):
        raise NotSupported(f"Unsupported compression type '{encoding}'; use gzip, deflate or none")
    if len(body) <= _INLINE_BYTES:
        with contextlib.suppress(RequestTooLarge):
            return _unfold(body, encoding, min(limit_bytes, _INLINE_BYTES))
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(_UNFOLDER, _unfold, body, encoding, limit_bytes)


def _unfold(body: bytes, encoding: str, limit_bytes: int) -> bytes:
    # What HTTP calls deflate is zlib's format, but some send the bare one.
    deflate = _ZLIB if body and body[0] & 0x0F == _DEFLATED else _BARE
    parts: list[bytes] = []
    room = limit_bytes
    try:
        for part in _portions(body, _GZIP if encoding == "gzip" else deflate, encoding):
            parts.append(part)
            room -= len(part)
            if room < 0:
                raise RequestTooLarge(
                    f"the request body is larger than the limit of {limit_bytes} bytes as it unfolds; send fewer rows"
                )
    except zlib.error:
        raise InvalidRequest(f"the request body cannot be read as {encoding}; it is broken") from None
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _portions(body: bytes, window: int, encoding: str) -> Iterator[bytes]:
    """Unfold piece by piece; gzip may have several members."""
    packed = memoryview(body)
    at = members = 0
    while at < len(body) or not members:
        members += 1
        if members > _MAX_MEMBERS:
            raise InvalidRequest(f"the request body has more than {_MAX_MEMBERS} gzip members; send it as one")
        unpacker = zlib.decompressobj(window)
        rest: bytes | memoryview = b""
        while not unpacker.eof:
            if not rest:
                # in pieces too, since zlib copies what it leaves
                rest = packed[at : at + _PORTION_BYTES]
                at += len(rest)
            part = unpacker.decompress(rest, _PORTION_BYTES)
            rest = unpacker.unconsumed_tail
            if part:
                yield part
            elif at == len(body) and not rest and not unpacker.eof:
                raise InvalidRequest(f"the request body is cut short; it is no complete {encoding}")
        at -= len(unpacker.unused_data)


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
