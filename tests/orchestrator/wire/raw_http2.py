"""As much of HTTP/2 as clients need that do not do their part (RFC 9113)."""

from __future__ import annotations

import asyncio

_DATA, _HEADERS, _SETTINGS = 0, 1, 4
_END_STREAM, _END_HEADERS, _ACK = 1, 4, 1
_INITIAL_WINDOW_SIZE = 4
SERVICE = "inference.GRPCInferenceService"


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def _header(name: bytes, value: bytes) -> bytes:
    return b"\0" + bytes([len(name)]) + name + bytes([len(value)]) + value


class RawConnection:
    """Makes gRPC calls, and says how much it takes of their answers."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self._writer = writer
        self._next = 1

    def call(self, method: str, data: bytes = b"", *, length: int | None = None, ends: bool = True) -> None:
        """Call `SERVICE/method` with a message of `length` bytes, of which come those that are given."""
        stream, self._next = self._next, self._next + 2
        head = {
            b":method": b"POST",
            b":scheme": b"http",
            b":path": f"/{method}".encode(),
            b":authority": b"a",
            b"content-type": b"application/grpc",
            b"te": b"trailers",
        }
        self._writer.write(_frame(_HEADERS, _END_HEADERS, stream, b"".join(_header(*pair) for pair in head.items())))
        if data:
            length = len(data) if length is None else length
            message = b"\0" + length.to_bytes(4, "big") + data
            self._writer.write(_frame(_DATA, _END_STREAM if ends else 0, stream, message))

    async def closed(self) -> None:
        """Wait until the server has closed it."""
        async with asyncio.timeout(10):
            try:
                while await self.reader.read(1 << 16):
                    pass
            except ConnectionError:
                pass

    def close(self) -> None:
        self._writer.close()


async def raw_connection(address: str, window_bytes: int = 65535) -> RawConnection:
    """Connect; so much of an answer is taken, and no more."""
    host, _, port = address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    settings = _INITIAL_WINDOW_SIZE.to_bytes(2, "big") + window_bytes.to_bytes(4, "big")
    writer.write(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
    writer.write(_frame(_SETTINGS, 0, 0, settings) + _frame(_SETTINGS, _ACK, 0, b""))
    return RawConnection(reader, writer)
