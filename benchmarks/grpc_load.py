"""A closed loop of unary gRPC calls from prepared frames: `python -m benchmarks.grpc_load`.

h2load sends one body again and again, and with one row either every request escalates or none. This sends many, and
takes little enough CPU to leave the core to the server: a call is one write of frames that were made before, and of
its answer only the frame headers are read. A call counts as answered if a message came before the end of its stream;
an error ends it without one.
"""

from __future__ import annotations

import asyncio
import itertools
import json
from pathlib import Path
from typing import TYPE_CHECKING, cast

import click
import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterator

_PATH = b"/inference.GRPCInferenceService/ModelInfer"
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _RESET, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_END_STREAM, _ACK, _END_HEADERS = 1, 1, 4
_FRAME_HEAD = 9
_FIRST_WINDOW = 65_535
_LARGEST_WINDOW = 2**31 - 1
# RFC 7541: :method POST and :scheme http of the static table
_STATIC = b"\x83\x86"
_FIRST_DYNAMIC = 62


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3) + bytes((kind, flags)) + stream.to_bytes(4) + payload


def _header_blocks(port: int) -> tuple[bytes, bytes]:
    """Headers of the first call, which enter the server's table, and of all later ones, which are read from it."""
    headers = ((b":path", _PATH), (b":authority", b"127.0.0.1:%d" % port), (b"te", b"trailers"),
               (b"content-type", b"application/grpc"))  # fmt: skip
    first = _STATIC + b"".join(b"\x40" + bytes((len(n),)) + n + bytes((len(v),)) + v for n, v in headers)
    return first, _STATIC + bytes(0x80 | _FIRST_DYNAMIC + place for place in reversed(range(len(headers))))


class _Call:
    """Counts of all connections."""

    def __init__(self) -> None:
        self.answers = 0
        self.errors = 0
        self.latencies_s: list[float] = []
        self.stopped = False


class _Connection(asyncio.Protocol):
    """One call after the other."""

    def __init__(self, messages: Iterator[bytes], blocks: tuple[bytes, bytes], counts: _Call) -> None:
        self._messages = messages
        self._blocks = blocks
        self._counts = counts
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self._buffer = b""
        self._stream = -1
        self._window = _FIRST_WINDOW
        self._waiting = b""
        self._got_message = False
        self._sent_s = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = cast("asyncio.Transport", transport)
        wide = (_LARGEST_WINDOW - _FIRST_WINDOW).to_bytes(4)
        self._transport.write(_PREFACE + _frame(_SETTINGS, 0, 0, b"") + _frame(_WINDOW_UPDATE, 0, 0, wide))
        self._call()

    def data_received(self, data: bytes) -> None:
        """Read frame by frame."""
        self._buffer = buffer = self._buffer + data
        place = 0
        while len(buffer) >= place + _FRAME_HEAD:
            end = place + _FRAME_HEAD + int.from_bytes(buffer[place : place + 3])
            if len(buffer) < end:
                break
            self._take(buffer[place + 3], buffer[place + 4], buffer[place + 5 : place + _FRAME_HEAD],
                       buffer[place + _FRAME_HEAD : end])  # fmt: skip
            place = end
        self._buffer = buffer[place:]

    def connection_lost(self, _error: Exception | None) -> None:
        """Count the call that gets no answer."""
        if not self._counts.stopped:
            self._counts.errors += 1

    def _take(self, kind: int, flags: int, stream: bytes, payload: bytes) -> None:
        if kind == _DATA:
            self._got_message = self._got_message or len(payload) > 0
        elif kind == _WINDOW_UPDATE:
            if int.from_bytes(stream) == 0:
                self._window += int.from_bytes(payload)
                self._send()
        elif kind in (_SETTINGS, _PING) and not flags & _ACK:
            self._transport.write(_frame(kind, _ACK, 0, payload if kind == _PING else b""))
        if (kind in (_DATA, _HEADERS) and flags & _END_STREAM) or kind in (_RESET, _GOAWAY):
            self._end()

    def _call(self) -> None:
        self._stream += 2
        block, message = self._blocks[self._stream > 1], next(self._messages)
        body = _frame(_DATA, _END_STREAM, self._stream, b"\0" + len(message).to_bytes(4) + message)
        self._waiting = _frame(_HEADERS, _END_HEADERS, self._stream, block) + body
        self._got_message = False
        self._sent_s = self._loop.time()
        self._send()

    def _send(self) -> None:
        # a little more than what counts, which is the payload of the DATA frame
        if self._waiting and len(self._waiting) <= self._window:
            self._window -= len(self._waiting)
            self._transport.write(self._waiting)
            self._waiting = b""

    def _end(self) -> None:
        counts = self._counts
        if self._got_message:
            counts.answers += 1
            counts.latencies_s.append(self._loop.time() - self._sent_s)
        else:
            counts.errors += 1
        if not counts.stopped:
            self._call()


async def _run(port: int, connections: int, seconds: float, messages: list[bytes]) -> dict[str, float]:
    loop = asyncio.get_running_loop()
    counts, blocks, cycle = _Call(), _header_blocks(port), itertools.cycle(messages)
    started_s = loop.time()
    opened = [
        (await loop.create_connection(lambda: _Connection(cycle, blocks, counts), "127.0.0.1", port))[0]
        for _ in range(connections)
    ]
    await asyncio.sleep(seconds)
    counts.stopped = True
    took_s = loop.time() - started_s
    for transport in opened:
        transport.abort()
    p50_s, p99_s = np.percentile(counts.latencies_s or [0.0], (50, 99)).tolist()
    return {"answers": counts.answers, "errors": counts.errors, "seconds": took_s, "p50_s": p50_s, "p99_s": p99_s}


@click.command()
@click.option("--port", type=int, required=True)
@click.option("--connections", type=click.IntRange(min=1), required=True)
@click.option("--seconds", type=click.FloatRange(min=0.1), required=True)
@click.option("--messages", type=click.Path(exists=True, path_type=Path), required=True, help=".npy: bytes [n, size].")
def main(port: int, connections: int, seconds: float, messages: Path) -> None:
    """Call for a while; write counts and latencies as one line of JSON."""
    bodies = [body.tobytes() for body in np.load(messages)]
    print(json.dumps(asyncio.run(_run(port, connections, seconds, bodies))))


if __name__ == "__main__":
    main()
