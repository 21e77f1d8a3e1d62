"""Batches to one tritonserver over HTTP/1.1 with the binary tensor extension.

A batch of four images took 385 to 540 microseconds of the orchestrator's core through grpc.aio, and takes about 110
here; that core is what the number of batches per second ends at.
"""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import quote

import msgspec
import numpy as np

from cascadeserve.http_connection import ConnectionClosed, ConnectionPool, HttpAnswer, NotHttp
from orchestrator.backend import (
    BatchAnswer,
    BatchNotTaken,
    CallRejected,
    ConnectionLost,
    EndpointDown,
    NoConnection,
    NotServed,
    StubDead,
)
from orchestrator.wire.codec_http import HEADER_LENGTH
from orchestrator.wire.datatypes import array_to_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from cascadeserve.gear_plan import TensorSpec
    from cascadeserve.http_connection import Connection
    from orchestrator.backend import BackendError, ModelVersion

_OK = 200
_NOT_FOUND = 404
# The server is there but stops, or cannot take work at all; or it says this of a version that it does not serve (2.51).
_UNAVAILABLE = 503
_NOT_SERVED = "is not at ready state"
# What Triton says of a Python-based model whose process has ended; an instance is named <model>_<group>_<number>.
_STUB_DEAD = re.compile(r"Stub process '(.+?)_\d+_\d+' is not healthy")
_JSON_LENGTH = HEADER_LENGTH.lower().encode()
# A server that is there accepts at once.
_CONNECT_LIMIT_S = 2.0


class _BinaryData(msgspec.Struct):
    binary_data_size: Annotated[int, msgspec.Meta(ge=0)]


class _Output(msgspec.Struct):
    name: str
    parameters: _BinaryData


class _InferAnswer(msgspec.Struct):
    outputs: list[_Output]


class _ErrorAnswer(msgspec.Struct):
    error: str


_decode_answer = msgspec.json.Decoder(_InferAnswer).decode
_decode_error = msgspec.json.Decoder(_ErrorAnswer).decode


class _RequestForm:
    """The bytes of a model's requests; shapes and sizes are filled in per batch."""

    def __init__(self, host: str, model: ModelVersion, specs: Sequence[TensorSpec], outputs: Sequence[str]) -> None:
        self._datatypes = [spec.datatype for spec in specs]
        path = f"/v2/models/{quote(model.name, safe='')}/versions/{model.version}/infer".replace("%", "%%")
        self._head = (
            f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/octet-stream\r\n"
            f"{HEADER_LENGTH}: %d\r\nContent-Length: %d\r\n\r\n"
        ).encode()
        inputs = b",".join(
            b'{"name":%b,"datatype":%b,"shape":%%b,"parameters":{"binary_data_size":%%d}}'
            % (_form_of(spec.name), _form_of(spec.datatype))
            for spec in specs
        )
        wanted = _form_of([{"name": name, "parameters": {"binary_data": True}} for name in outputs])
        self._json = b'{"inputs":[%b],"outputs":%b}' % (inputs, wanted)

    def fill(self, inputs: Sequence[NDArray[Any]]) -> bytes:
        """Write the request of one batch."""
        fields: list[bytes | int] = []
        tensors: list[bytes | memoryview] = []
        size = 0
        for datatype, array in zip(self._datatypes, inputs, strict=True):
            tensor = _raw(array, datatype)
            tensors.append(tensor)
            size += len(tensor)
            fields += (msgspec.json.encode(array.shape), len(tensor))
        text = self._json % tuple(fields)
        return b"".join((self._head % (len(text), len(text) + size), text, *tensors))


def _form_of(value: object) -> bytes:
    """JSON that comes out of the % operator as it is."""
    return msgspec.json.encode(value).replace(b"%", b"%%")


def _raw(array: NDArray[Any], datatype: str) -> bytes | memoryview:
    """Render an array as a raw buffer, copied only where it must be: a batch can be hundreds of megabytes."""
    if datatype == "BYTES" or not array.flags.c_contiguous or not array.size:
        return array_to_bytes(array, datatype)
    return array.data.cast("B")


class BatchSender:
    """The HTTP service of a tritonserver at `address` (host:port), for batches.

    There are as many connections as there were batches under way at a time: the dispatcher's slots + 1.
    """

    def __init__(self, address: str) -> None:
        """Connect to nothing yet."""
        self._address = address
        self._pool = ConnectionPool(f"http://{address}")
        self._health_request = f"GET /v2/health/live HTTP/1.1\r\nHost: {self._pool.host_header}\r\n\r\n".encode()
        self._forms: dict[tuple[ModelVersion, tuple[TensorSpec, ...], bool], _RequestForm] = {}

    async def infer(
        self,
        model: ModelVersion,
        specs: Sequence[TensorSpec],
        inputs: Sequence[NDArray[Any]],
        *,
        want_scores: bool,
        timeout_s: float,
    ) -> BatchAnswer:
        """See `Backend.infer`. The batch is sent at most once, whatever happens to its connection.

        Cancelling closes the connection. Triton does not notice while the batch runs or waits (2.51: measured; still so
        in 2026, triton-inference-server/server#7077): it runs the batch to its end and drops the answer. That is safe,
        unlike a cancelled gRPC call, but frees nothing: the device stays busy with it.
        """
        outputs = ("label", "certainty", "scores") if want_scores else ("label", "certainty")
        key = (model, tuple(specs), want_scores)
        form = self._forms.get(key)
        if form is None:
            form = self._forms[key] = _RequestForm(self._pool.host_header, model, specs, outputs)
        request = form.fill(inputs)
        what = f"inference of '{model}' at {self._address}"
        try:
            async with asyncio.timeout(timeout_s):
                got = await self._exchange(request, what)
        except TimeoutError as error:
            raise EndpointDown(f"{what}: no answer within {timeout_s:g} s") from error
        if got.status != _OK:
            raise _error_of(what, got.status, _explain_error(got.body))
        try:
            return _read_answer(got, inputs[0].shape[0], outputs)
        except ValueError as error:
            raise CallRejected(f"{what}: the answer is of no use: {error}") from error

    async def pass_on(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> HttpAnswer:
        """See `Backend.pass_http`."""
        lines = [f"{method} {path} HTTP/1.1", f"Host: {self._pool.host_header}", f"Content-Length: {len(body)}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        head = "\r\n".join((*lines, "", "")).encode("latin-1", "replace")
        return await self._exchange(head + body, f"{method} {path} at {self._address}")

    async def check(self, *, timeout_s: float) -> None:
        """Ask for any answer on a new connection.

        A tritonserver told to stop resets new connections, serves the old ones on as if nothing were, also over gRPC,
        and ends when they are closed or its --exit-timeout-secs have passed (2.51, measured).

        Raises:
            EndpointDown: there was none.

        """
        connection = None
        try:
            async with asyncio.timeout(timeout_s):
                connection = await self._open()
                await connection.exchange(self._health_request)
        except (EndpointDown, TimeoutError, ConnectionClosed, NotHttp) as error:
            raise EndpointDown(f"HTTP at {self._address}: {str(error) or 'no answer'}") from error
        finally:
            if connection is not None:
                self._pool.drop(connection)

    def retire(self) -> None:
        """Give up the connections: those not in use now, the others after their batch."""
        self._pool.retire()

    async def close(self) -> None:
        """Close all connections."""
        await self._pool.close()

    async def _exchange(self, request: bytes, what: str) -> HttpAnswer:
        connection = None
        keep = False
        try:
            connection = self._pool.take_idle() or await self._open()
            got = await connection.exchange(request)
            keep = got.keep_alive
        except ConnectionClosed as error:
            raise ConnectionLost(f"{what}: {error}") from error
        except NotHttp as error:
            raise CallRejected(f"{what}: the answer is no HTTP response: {error}") from error
        finally:
            if connection is not None:
                (self._pool.release if keep else self._pool.drop)(connection)
        return got

    async def _open(self) -> Connection:
        try:
            async with asyncio.timeout(_CONNECT_LIMIT_S):
                return await self._pool.open()
        except OSError as error:
            raise NoConnection(f"cannot connect to {self._address}: {str(error) or 'no answer'}") from error


def _error_of(what: str, status: int, answer: str) -> BackendError:
    text = f"{what}: {status}: {answer}"
    if status == _NOT_FOUND or (status == _UNAVAILABLE and _NOT_SERVED in answer):
        return NotServed(text, answer=answer, status=status)
    if status == _UNAVAILABLE:
        return BatchNotTaken(text)
    if dead := _STUB_DEAD.search(answer):
        return StubDead(text, model=dead[1], answer=answer)
    return CallRejected(text, answer=answer, status=status)


def _explain_error(body: bytes) -> str:
    """Triton's sentence, or what came in its place."""
    try:
        return _decode_error(body).error
    except ValueError:
        return body[:200].decode(errors="replace").strip()


def _read_answer(got: HttpAnswer, rows: int, names: Sequence[str]) -> BatchAnswer:
    """Read a 200; raises ValueError where it is no answer for that many rows."""
    body = got.body
    stated = got.headers.get(_JSON_LENGTH)
    if stated is None or not stated.isdigit() or int(stated) > len(body):
        raise ValueError(f"{HEADER_LENGTH} is {stated!r} and the body has {len(body)} bytes")
    place = int(stated)
    raw: dict[str, bytes] = {}
    for output in _decode_answer(body[:place]).outputs:
        start, place = place, place + output.parameters.binary_data_size
        # copied: numpy works faster on what is aligned
        raw[output.name] = body[start:place]
    if place != len(body):
        raise ValueError(f"its outputs take {place} bytes of a body of {len(body)}")
    if absent := [name for name in names if name not in raw]:
        raise ValueError(f"it has no output {absent[0]!r}")
    label = np.frombuffer(raw["label"], dtype=np.int64)
    certainty = np.frombuffer(raw["certainty"], dtype=np.float32)
    if label.shape != (rows,) or certainty.shape != (rows,):
        raise ValueError(f"it has {label.size} labels and {certainty.size} certainties for {rows} rows")
    scores = np.frombuffer(raw["scores"], dtype=np.float32).reshape(rows, -1) if "scores" in names else None
    return BatchAnswer(label, certainty, scores)
