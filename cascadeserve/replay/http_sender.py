"""Requests over HTTP with the binary tensor extension."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import re
from typing import TYPE_CHECKING
from urllib.parse import quote, urlsplit

import aiohttp
import msgspec
import numpy as np

from cascadeserve.errors import UsageError
from cascadeserve.http_connection import ConnectionClosed, ConnectionPool, HttpAnswer, NotHttp
from cascadeserve.replay.client import (
    FOREIGN_ANSWER,
    NO_REPLY,
    Answer,
    MalformedAnswer,
    Outcome,
    Reply,
    make_answer,
    read_raw,
)
from cascadeserve.replay.payload import ModelSignature, Question, TensorSignature

if TYPE_CHECKING:
    from numpy.typing import NDArray

_JSON_LENGTH = "Inference-Header-Content-Length"
_OK = 200
_REFUSALS = (503, 504)
_MALFORMED = "malformed answer"
_ID_PLACE = "@"


class _TensorMetadata(msgspec.Struct):
    name: str
    datatype: str
    shape: list[int]


class _ModelMetadata(msgspec.Struct):
    inputs: list[_TensorMetadata]
    outputs: list[_TensorMetadata]


class _Output(msgspec.Struct):
    name: str
    datatype: str
    parameters: dict[str, object] = {}
    data: list[object] | None = None


class _InferAnswer(msgspec.Struct):
    outputs: list[_Output]
    id: str = ""
    parameters: dict[str, object] = {}


class _ErrorAnswer(msgspec.Struct):
    error: str


class _Head:
    """The bytes before the tensors of a request of a given number of rows, the same for all but its id.

    `sizes` are the bytes of each tensor.
    """

    def __init__(
        self, question: Question, rows: int, id_length: int, sizes: tuple[int, ...], target: tuple[str, str]
    ) -> None:
        text = msgspec.json.encode(
            {
                "id": _ID_PLACE,
                "parameters": {"timeout": question.timeout_us},
                "inputs": [
                    {
                        "name": tensor.name,
                        "shape": [rows, *tensor.row_shape],
                        "datatype": tensor.datatype,
                        "parameters": {"binary_data_size": size},
                    }
                    for tensor, size in zip(question.inputs, sizes, strict=True)
                ],
                "outputs": [{"name": name, "parameters": {"binary_data": True}} for name in question.outputs],
            }
        )
        before, _, self.after = text.partition(_ID_PLACE.encode())
        json_length = len(before) + id_length + len(self.after)
        body_length = json_length + sum(sizes)
        host, path = target
        head = (
            f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/octet-stream\r\n"
            f"{_JSON_LENGTH}: {json_length}\r\nContent-Length: {body_length}\r\n\r\n"
        )
        self.before = head.encode() + before


def _model_url(address: str, model: str) -> str:
    return f"{address}/v2/models/{quote(model, safe='')}"


def _explain_error(body: bytes) -> str:
    try:
        return msgspec.json.decode(body, type=_ErrorAnswer).error
    except msgspec.MsgspecError:
        return body[:200].decode(errors="replace").strip()


async def describe_model(address: str, model: str, timeout_s: float) -> ModelSignature:
    """Ask the server for the model's inputs and outputs; see `client.describe_model`."""
    try:
        async with (
            asyncio.timeout(timeout_s),
            aiohttp.ClientSession() as session,
            session.get(_model_url(address, model)) as got,
        ):
            body = await got.read()
    except (aiohttp.ClientError, TimeoutError, OSError) as error:
        what = str(error) or "timed out"
        raise UsageError(f"{address} does not answer ({what}); start the server or correct the URL") from error
    if got.status != _OK:
        raise UsageError(f"{address} does not describe model {model}: {got.status} {_explain_error(body)}")
    try:
        metadata = msgspec.json.decode(body, type=_ModelMetadata)
    except msgspec.MsgspecError as error:
        raise UsageError(f"{address} is no KServe v2 server: its model metadata is malformed ({error})") from error
    return ModelSignature(
        inputs=tuple(TensorSignature(one.name, one.datatype, tuple(one.shape)) for one in metadata.inputs),
        outputs=tuple(one.name for one in metadata.outputs),
    )


def _read_answer(body: bytes, json_length: bytes | None, request_id: str, rows: int) -> Answer | None:
    """Read a 200; None when it answers another request."""
    try:
        split = len(body) if json_length is None else int(json_length)
        head = msgspec.json.decode(body[:split], type=_InferAnswer)
    except (ValueError, msgspec.MsgspecError) as error:
        raise MalformedAnswer(str(error)) from error
    if head.id != request_id:
        return None
    view = memoryview(body)[split:]
    outputs: dict[str, NDArray[np.generic]] = {}
    for output in head.outputs:
        size = output.parameters.get("binary_data_size")
        if isinstance(size, int):
            if size > len(view):
                raise MalformedAnswer(f"output {output.name} is cut short")
            outputs[output.name] = read_raw(output.datatype, view[:size])
            view = view[size:]
        else:
            try:
                outputs[output.name] = np.array(
                    output.data, dtype=np.float64 if output.name == "certainty" else np.int64
                )
            except (TypeError, ValueError) as error:
                raise MalformedAnswer(f"output {output.name} holds no numbers") from error
    return make_answer(outputs, head.parameters, rows)


class HttpSender:
    """Sends one POST per request, each exactly once, over as many keep-alive connections as it takes.

    A connection that the server closes just as it is used again loses its request: nothing is sent twice.
    """

    def __init__(self, address: str, question: Question) -> None:
        self._question = question
        self._pool = ConnectionPool(address)
        self._target = (self._pool.host_header, urlsplit(f"{_model_url(address, question.model)}/infer").path)
        self._heads: dict[tuple[int, int, tuple[int, ...]], _Head] = {}

    @property
    def unasked(self) -> int:
        """See `Sender`."""
        return self._pool.unasked

    def _encode(self, request_id: str, rows: list[int]) -> bytes:
        chunks = [tensor.chunk(rows) for tensor in self._question.inputs]
        key = (len(rows), len(request_id), tuple(map(len, chunks)))
        head = self._heads.get(key)
        if head is None:
            head = self._heads[key] = _Head(self._question, *key, self._target)
        return b"".join((head.before, request_id.encode(), head.after, *chunks))

    async def prepare(self, at_once: int) -> None:
        """Open so many connections.

        To open one takes both sides longer than a request does. After a stall of the machine, when many requests are
        due, that would feed on itself where both share a core.
        """
        with contextlib.suppress(OSError):
            for connection in [await self._pool.open() for _ in range(at_once)]:
                self._pool.release(connection)

    async def send(self, request_id: str, rows: list[int], until_s: float) -> Reply:
        """Send one request; see `Sender`."""
        clock = asyncio.get_running_loop().time
        connection = None
        keep = False
        try:
            async with asyncio.timeout_at(until_s):
                connection = await self._pool.acquire()
                got = await connection.exchange(self._encode(request_id, rows))
            reply = _judge(got, request_id, len(rows), clock())
            # A connection that carries answers to other requests is of no more use.
            keep = got.keep_alive and not reply.duplicated
        except TimeoutError:
            return Reply(Outcome.LOST, clock(), NO_REPLY)
        except OSError as error:
            refused = _is_refused(error)
            what = "connection refused" if refused else f"cannot connect: {error.strerror or error}"
            return Reply(Outcome.REFUSED if refused else Outcome.LOST, clock(), what)
        except NotHttp as error:
            return Reply(Outcome.FAILED, clock(), f"{_MALFORMED}: {error}")
        except ConnectionClosed as error:
            return Reply(Outcome.LOST, clock(), f"connection lost: {error}")
        finally:
            if connection is not None:
                (self._pool.release if keep else self._pool.drop)(connection)
        return reply

    async def close(self) -> None:
        """Close all connections."""
        await self._pool.close()


def _is_refused(error: OSError) -> bool:
    """Whether nobody listens; with several addresses asyncio puts all their errors into one text."""
    numbers = re.findall(r"\[Errno (\d+)\]", str(error))
    return bool(numbers) and all(int(number) == errno.ECONNREFUSED for number in numbers)


def _judge(got: HttpAnswer, request_id: str, rows: int, done_s: float) -> Reply:
    if got.status != _OK:
        refused = got.status in _REFUSALS and bool(got.body)
        error = f"{got.status} {_explain_error(got.body)}".strip()
        return Reply(Outcome.REFUSED if refused else Outcome.FAILED, done_s, error)
    try:
        answer = _read_answer(got.body, got.headers.get(_JSON_LENGTH.lower().encode()), request_id, rows)
    except MalformedAnswer as error:
        return Reply(Outcome.FAILED, done_s, f"{_MALFORMED}: {error}")
    if answer is None:
        return Reply(Outcome.LOST, done_s, FOREIGN_ANSWER, duplicated=1)
    return Reply(Outcome.ANSWERED, done_s, answer=answer)
