"""Requests over HTTP with the binary tensor extension, through aiohttp."""

from __future__ import annotations

import asyncio
import errno
import io
from typing import TYPE_CHECKING
from urllib.parse import quote

import aiohttp
import msgspec
import numpy as np

from cascadeserve.errors import UsageError
from cascadeserve.replay.client import (
    FOREIGN_ANSWER,
    NO_REPLY,
    SECOND_ANSWER,
    Answer,
    MalformedAnswer,
    Outcome,
    Reply,
    make_answer,
    read_raw,
)
from cascadeserve.replay.payload import ModelSignature, Question, TensorSignature

if TYPE_CHECKING:
    from aiohttp.client_proto import ResponseHandler
    from aiohttp.connector import Connection
    from numpy.typing import NDArray

_JSON_LENGTH = "Inference-Header-Content-Length"
_OK = 200
_REFUSALS = (503, 504)
# Above this, aiohttp wants a stream instead of bytes and warns otherwise.
_LARGE_BODY_BYTES = 1 << 20
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


class _WatchedResponse(aiohttp.ClientResponse):
    """Remembers its connection, which aiohttp lets go of at the end of the body, to see what else came over it."""

    answered_twice = False
    _watched: ResponseHandler | None = None

    async def start(self, connection: Connection) -> aiohttp.ClientResponse:
        """Read the head; a second response in the same stretch of bytes is parsed with it."""
        protocol = self._watched = connection.protocol
        await super().start(connection)
        # With the body read to its end and no wish to close on the server's side, the only reason left for aiohttp not
        # to use this connection again is that bytes nobody asked for arrived behind the answer.
        keeps_alive = self.version is not None and self.version >= aiohttp.HttpVersion11
        keeps_alive = keeps_alive and self.headers.get("Connection", "").lower() != "close"
        if keeps_alive and self.content.is_eof() and protocol is not None:
            self.answered_twice = protocol.should_close and protocol.exception() is None
        return self

    def abandon(self) -> None:
        """Close the connection even if it went back to the pool: it carries answers to other requests."""
        if self._watched is not None:
            self._watched.close()


class _Head:
    """The JSON part of a request of a given number of rows, the same for all but its id."""

    def __init__(self, question: Question, rows: int, id_length: int) -> None:
        head = {
            "id": _ID_PLACE,
            "parameters": {"timeout": question.timeout_us},
            "inputs": [
                {
                    "name": tensor.name,
                    "shape": [rows, *tensor.row_shape],
                    "datatype": tensor.datatype,
                    "parameters": {"binary_data_size": rows * tensor.row_bytes},
                }
                for tensor in question.inputs
            ],
            "outputs": [{"name": name, "parameters": {"binary_data": True}} for name in question.outputs],
        }
        text = msgspec.json.encode(head)
        self.before, _, self.after = text.partition(_ID_PLACE.encode())
        length = len(self.before) + id_length + len(self.after)
        self.headers = {_JSON_LENGTH: str(length), "Content-Type": "application/octet-stream"}


def _open_session() -> aiohttp.ClientSession:
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, ttl_dns_cache=None),
        cookie_jar=aiohttp.DummyCookieJar(),
        # Deadlines are kept by the callers; an answer is never compressed, so that its cost is the server's own.
        timeout=aiohttp.ClientTimeout(total=None, sock_connect=None),
        headers={"Accept-Encoding": "identity"},
        response_class=_WatchedResponse,
    )


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
            _open_session() as session,
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


def _read_answer(body: bytes, json_length: str | None, request_id: str, rows: int) -> Answer | None:
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
    """Sends one POST per request over as many keep-alive connections as it takes.

    aiohttp sends a request a second time only for idempotent methods, so a POST on a connection that the server has
    just closed is lost, not repeated; the tests hold this.
    """

    def __init__(self, address: str, question: Question) -> None:
        self._question = question
        self._url = f"{_model_url(address, question.model)}/infer"
        self._session: aiohttp.ClientSession | None = None
        self._heads: dict[tuple[int, int], _Head] = {}

    async def send(self, request_id: str, rows: list[int], until_s: float) -> Reply:
        """Send one request; see `Sender`."""
        if self._session is None:
            self._session = _open_session()
        clock = asyncio.get_running_loop().time
        key = (len(rows), len(request_id))
        head = self._heads.get(key)
        if head is None:
            head = self._heads[key] = _Head(self._question, *key)
        chunks = [tensor.chunk(rows) for tensor in self._question.inputs]
        body = b"".join((head.before, request_id.encode(), head.after, *chunks))
        data = body if len(body) <= _LARGE_BODY_BYTES else io.BytesIO(body)
        try:
            async with (
                asyncio.timeout_at(until_s),
                self._session.post(self._url, data=data, headers=head.headers, allow_redirects=False) as response,
            ):
                content = await response.read()
        except TimeoutError:
            return Reply(Outcome.LOST, clock(), NO_REPLY)
        except aiohttp.ClientConnectorError as error:
            refused = error.os_error.errno == errno.ECONNREFUSED
            what = "connection refused" if refused else f"cannot connect: {error.os_error.strerror or error.os_error}"
            return Reply(Outcome.REFUSED if refused else Outcome.LOST, clock(), what)
        except aiohttp.ClientResponseError as error:
            return Reply(Outcome.FAILED, clock(), f"malformed answer: {error.message}")
        except (aiohttp.ClientError, OSError) as error:
            return Reply(Outcome.LOST, clock(), f"connection lost: {type(error).__name__}")
        return _judge(response, content, request_id, len(rows), clock())

    async def close(self) -> None:
        """Close all connections."""
        if self._session is not None:
            await self._session.close()


def _judge(response: aiohttp.ClientResponse, body: bytes, request_id: str, rows: int, done_s: float) -> Reply:
    assert isinstance(response, _WatchedResponse)
    if response.status != _OK:
        refused = response.status in _REFUSALS and bool(body)
        error = f"{response.status} {_explain_error(body)}"
        return Reply(Outcome.REFUSED if refused else Outcome.FAILED, done_s, error)
    try:
        answer = _read_answer(body, response.headers.get(_JSON_LENGTH), request_id, rows)
    except MalformedAnswer as error:
        return Reply(Outcome.FAILED, done_s, f"malformed answer: {error}")
    if answer is None:
        response.abandon()
        return Reply(Outcome.LOST, done_s, FOREIGN_ANSWER, duplicated=1)
    if response.answered_twice:
        return Reply(Outcome.ANSWERED, done_s, SECOND_ANSWER, duplicated=1, answer=answer)
    return Reply(Outcome.ANSWERED, done_s, answer=answer)
