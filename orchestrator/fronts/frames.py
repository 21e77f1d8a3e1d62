"""What front processes and the dispatcher say to each other, and how it travels over the socket between them.

A frame is the length of a message (4 bytes, little-endian) and the message as MessagePack. Requests and answers are
encoded from the fields of their classes in `wire.tensors`, so that a field added there travels along; an array is its
numpy dtype, its shape and its raw buffer. Both processes run the same code: there is no version to agree on.
"""

from __future__ import annotations

import asyncio
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec
import numpy as np

from orchestrator.entry import Ahead
from orchestrator.front_door import ServeSettings
from orchestrator.wire.datatypes import bytes_array
from orchestrator.wire.descriptions import ModelConfig, ModelStatistics
from orchestrator.wire.tensors import InferRequest, InferResponse, ModelMetadata, ServerMetadata

if TYPE_CHECKING:
    from collections.abc import Callable

    from orchestrator.wire.tensors import Array

_LENGTH = struct.Struct("<I")
# More than this unsent, and a sender that can wait should.
_HIGH_WATER_BYTES = 1 << 20


class _Message(msgspec.Struct, array_like=True, tag=True, frozen=True, gc=False):
    """Messages are told apart by the names of their classes."""


# -- from a front process -----------------------------------------------------------------------------------------


class Listening(_Message, frozen=True):
    """The ports are open."""


class Infer(_Message, frozen=True):
    """A request; `number` is the front's own and comes back with the answer."""

    number: int
    request: InferRequest


class Cancel(_Message, frozen=True):
    """Nobody waits for the answer to `number` any more."""

    number: int


class Refused(_Message, frozen=True):
    """Requests were refused before they got here since the last time that was said; `outcome` as in the metrics."""

    model: str
    outcome: str
    requests: int
    # how many they had, or are taken to have had, all together; 0: no demand, for they were wrong
    rows: float


class ShowMetrics(_Message, frozen=True):
    """`GET /metrics`."""

    number: int


class ShowStatistics(_Message, frozen=True):
    """What was asked of a model, or of all if `name` is empty."""

    number: int
    name: str
    version: str


FromFront = Listening | Infer | Cancel | Refused | ShowMetrics | ShowStatistics


# -- from the dispatcher ------------------------------------------------------------------------------------------


class Welcome(_Message, frozen=True):
    """The first message: where to listen and what to allow."""

    settings: ServeSettings


class Service(_Message, frozen=True):
    """What is served, and what of it can be asked now; sent at the beginning and whenever it changes."""

    ready: bool
    server: ServerMetadata
    models: dict[str, ModelMetadata]
    configs: dict[str, ModelConfig]
    models_ready: list[str]
    # models of the Tritons that are no cascades
    others: list[str]


class Waiting(_Message, frozen=True):
    """What is ahead of a request of each family, by its name; sent at every look of the entry."""

    queues: dict[str, Ahead]


class Answer(_Message, frozen=True):
    """The answer to a request."""

    number: int
    response: InferResponse


class Failed(_Message, frozen=True):
    """A request ended in an error: the name of its class, its sentence, and what else it carries."""

    number: int
    kind: str
    sentence: str
    attributes: dict[str, Any]


class Metrics(_Message, frozen=True):
    """The answer to `ShowMetrics`."""

    number: int
    body: bytes
    content_type: str


class Counted(_Message, frozen=True):
    """The answer to `ShowStatistics`."""

    number: int
    models: list[ModelStatistics]


FromDispatcher = Welcome | Service | Waiting | Answer | Failed | Metrics | Counted


# -- the socket ---------------------------------------------------------------------------------------------------


def _to_plain(value: object) -> Any:  # noqa: ANN401 - what msgspec encodes
    if isinstance(value, Path):
        return str(value)
    if not isinstance(value, np.ndarray):
        raise NotImplementedError(f"cannot send a {type(value).__name__}")
    data = value.ravel().tolist() if value.dtype == object else np.ascontiguousarray(value).data
    return value.dtype.str, value.shape, data


def _from_plain(kind: object, value: Any) -> Array | Path:  # noqa: ANN401 - what msgspec decoded
    if kind is Path:
        return Path(value)
    dtype, shape, data = value
    if isinstance(data, list):
        return bytes_array(data).reshape(shape)
    if not data:  # np.frombuffer refuses an empty buffer
        return np.empty(shape, dtype)
    return np.frombuffer(data, dtype).reshape(shape)


_encode = msgspec.msgpack.Encoder(enc_hook=_to_plain).encode


class Link(asyncio.Protocol):
    """One end of the socket: sends messages and hands on those that come."""

    def __init__(self, kind: Any, on_message: Callable[[Any], None], on_lost: Callable[[], None]) -> None:  # noqa: ANN401
        """`kind` is what the other end sends, FromFront or FromDispatcher; `on_lost` is called once, at its end."""
        self._decode = msgspec.msgpack.Decoder(kind, dec_hook=_from_plain).decode
        self._on_message = on_message
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        # what was received and makes no frame yet, its length, and the length from which on there is something to do
        self._chunks: list[bytes] = []
        self._size = 0
        self._needed = _LENGTH.size
        self._unsent: list[bytes] = []
        self._writable = asyncio.Event()
        self._writable.set()

    def send(self, message: FromFront | FromDispatcher) -> None:
        """Send a message; once the other end is gone, nothing happens."""
        data = _encode(message)
        if not self._unsent:
            # What one round of the loop has to say, such as the answers of a batch, leaves by one call of the kernel.
            self._loop.call_soon(self._flush)
        self._unsent += (_LENGTH.pack(len(data)), data)

    async def writable(self) -> None:
        """Wait while much is unsent because the other end does not keep up."""
        await self._writable.wait()

    def close(self) -> None:
        """Send what is left and close."""
        self._flush()
        self._transport.close()

    def _flush(self) -> None:
        frames, self._unsent = self._unsent, []
        if frames and not self._transport.is_closing():
            self._transport.writelines(frames)

    # -- called by asyncio --------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=_HIGH_WATER_BYTES)

    def data_received(self, data: bytes) -> None:
        """Hand on every message that is complete."""
        self._chunks.append(data)
        self._size += len(data)
        if self._size < self._needed:
            return
        received = memoryview(data if len(self._chunks) == 1 else b"".join(self._chunks))
        start, self._needed = 0, _LENGTH.size
        while len(received) - start >= _LENGTH.size:
            end = start + _LENGTH.size + _LENGTH.unpack_from(received, start)[0]
            if end > len(received):
                self._needed = end - start
                break
            # Decoded arrays have memory of their own: none of them keeps the others' alive.
            self._on_message(self._decode(received[start + _LENGTH.size : end]))
            start = end
        self._chunks = [bytes(received[start:])] if start < len(received) else []
        self._size = len(received) - start

    def pause_writing(self) -> None:
        """The other end does not keep up."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """It does again."""
        self._writable.set()

    def connection_lost(self, _error: Exception | None) -> None:
        """Say so; whoever waits to send need not wait any more."""
        self._writable.set()
        self._on_lost()
