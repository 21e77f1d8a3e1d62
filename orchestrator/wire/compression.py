"""Compressed HTTP bodies: requests as they come, responses for clients that say they take them."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import gzip
import io
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from cascadeserve.errors import InvalidRequest, NotSupported, RequestTooLarge
from orchestrator.wire.turns import Turns

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
_THREAD = ThreadPoolExecutor(1, "unfold")
# What is no more than this is done before a thread would have begun.
_INLINE_BYTES = 1 << 17
# zlib gathers what it unfolds in one call into one piece, and nothing else runs meanwhile: 40 ms for 64 MiB.
_PORTION_BYTES = 1 << 16
# How much it is given at once: blocks that hold nothing take 100 ns a byte, and what was taken is seen afterwards.
_TAKEN_BYTES = 1 << 14
# Processor time that is no reason to refuse: honest bodies take 3 ns for each byte that comes or that it becomes. One
# that takes more than the first of these goes to the thread; one that takes more than the second is refused.
_INLINE_S, _THREAD_S = 1e-3, 0.1
_S_PER_BYTE = 20e-9
# Each costs some microseconds, however little it holds.
_MAX_MEMBERS = 100


class Unfolder:
    """Decompresses the bodies of requests."""

    def __init__(self) -> None:
        """Nothing waits yet."""
        self._turns = Turns("too many compressed requests wait to be unfolded; send them as they are")

    async def unfold(
        self, body: bytes, encoding: str, limit_bytes: int, deadline_s: float | None = None
    ) -> tuple[bytes, float]:
        """Decompress a body, up to `limit_bytes`; `encoding` is its header Content-Encoding.

        `deadline_s` is how long its answer is worth waiting for, if that is known.

        Returns it, and the seconds for which it has waited.
        """
        if encoding in ("", "identity"):
            return body, 0.0
        if encoding not in ("gzip", "deflate"):
            raise NotSupported(f"Unsupported compression type '{encoding}'; use gzip, deflate or none")
        if len(body) <= _INLINE_BYTES:
            with contextlib.suppress(RequestTooLarge, _TooSlow):
                return _unfold(body, encoding, min(limit_bytes, _INLINE_BYTES), _INLINE_S), 0.0
        try:
            work = functools.partial(_unfold, body, encoding, limit_bytes, _THREAD_S)
            return await self._turns.run_in(_THREAD, work, deadline_s)
        except _TooSlow:
            raise InvalidRequest(
                f"the request body takes many times longer to unfold than {encoding} of its size; compress it anew"
            ) from None


class _TooSlow(Exception):  # noqa: N818 - named by what happened
    """Little input of blocks that hold next to nothing takes very long."""


def _unfold(body: bytes, encoding: str, limit_bytes: int, grace_s: float) -> bytes:
    # What HTTP calls deflate is zlib's format, but some send the bare one.
    deflate = _ZLIB if body and body[0] & 0x0F == _DEFLATED else _BARE
    # It gives what was written without a copy of the whole, which would take as long as all the rest waits.
    unfolded = io.BytesIO()
    try:
        for part in _portions(body, _GZIP if encoding == "gzip" else deflate, encoding, grace_s):
            if unfolded.tell() + len(part) > limit_bytes:
                raise RequestTooLarge(
                    f"the request body is larger than the limit of {limit_bytes} bytes as it unfolds; send fewer rows"
                )
            unfolded.write(part)
    except zlib.error:
        raise InvalidRequest(f"the request body cannot be read as {encoding}; it is broken") from None
    return unfolded.getvalue()


def _portions(body: bytes, window: int, encoding: str, grace_s: float) -> Iterator[bytes]:
    """Unfold piece by piece; gzip may have several members."""
    packed = memoryview(body)
    at = members = unfolded_bytes = 0
    # of this thread alone, so that nobody is blamed for what else runs
    begun_s = time.thread_time()
    while at < len(body) or not members:
        members += 1
        if members > _MAX_MEMBERS:
            raise InvalidRequest(
                f"the request body is more than {_MAX_MEMBERS} pieces of {encoding} in a row; send it as one"
            )
        unpacker = zlib.decompressobj(window)
        rest: bytes | memoryview = b""
        while not unpacker.eof:
            if not rest:
                # in pieces too, since zlib copies what it leaves
                rest = packed[at : at + _TAKEN_BYTES]
                at += len(rest)
            part = unpacker.decompress(rest, _PORTION_BYTES)
            rest = unpacker.unconsumed_tail
            unfolded_bytes += len(part)
            if time.thread_time() - begun_s > grace_s + _S_PER_BYTE * (at + unfolded_bytes):
                raise _TooSlow
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


@functools.lru_cache(maxsize=256)
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
