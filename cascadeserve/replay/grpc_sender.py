"""Requests over gRPC, through grpc.aio with the messages that tritonclient ships."""

from __future__ import annotations

import asyncio
import re
from typing import TYPE_CHECKING

import grpc.aio
from grpc import StatusCode
from tritonclient.grpc import service_pb2

from cascadeserve.errors import UsageError
from cascadeserve.replay.client import FOREIGN_ANSWER, NO_REPLY, Answer, MalformedAnswer, Outcome, Reply, make_answer
from cascadeserve.replay.client import read_raw as _read_raw
from cascadeserve.replay.payload import ModelSignature, Question, TensorSignature

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_SERVICE = "/inference.GRPCInferenceService"
# gRPC servers answer CANCELLED to a call that reaches them while they shut down; we never cancel one ourselves.
_REFUSALS = (StatusCode.UNAVAILABLE, StatusCode.DEADLINE_EXCEEDED, StatusCode.CANCELLED)
# Messages have no size limit, a server that comes back is found within a second.
# No retry policy is configured, so the library sends again only what it knows that no server has seen (a call that met
# a GOAWAY), which is still one request to the server.
_CHANNEL_OPTIONS = [
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]
# Texts of the gRPC library itself when the transport or its own timer ended a call. A server's refusal has the same
# status codes, and nothing else in the error tells where it was made: the library wraps what happened to a running
# call in "Stream removed (...)"; the other forms are those of versions before it did.
_MADE_LOCALLY = re.compile(
    r"Stream removed(?: \(.*\))?"
    r"|(?:failed to connect to all addresses|DNS resolution failed|empty address list).*"
    r"|(?:Socket closed|Transport closed|Connection reset by peer|Broken pipe|Endpoint read failed)(?: \(.*\))?"
    r"|(?:recvmsg|sendmsg):.*|GOAWAY received.*|(?:RST_STREAM.*|Received RST_STREAM with error code \d+)"
    r"|keepalive watchdog timeout|ping timeout|Deadline Exceeded|Channel closed.*",
    re.DOTALL,
)
_TIMER = re.compile(r"(?:Stream removed \()?Deadline Exceeded\)?")
_FROM_PEER = "Error received from peer"


async def describe_model(address: str, model: str, timeout_s: float) -> ModelSignature:
    """Ask the server for the model's inputs and outputs; see `client.describe_model`."""
    async with grpc.aio.insecure_channel(address, options=_CHANNEL_OPTIONS) as channel:
        ask = channel.unary_unary(
            f"{_SERVICE}/ModelMetadata",
            request_serializer=service_pb2.ModelMetadataRequest.SerializeToString,
            response_deserializer=service_pb2.ModelMetadataResponse.FromString,
        )
        try:
            metadata = await ask(service_pb2.ModelMetadataRequest(name=model), timeout=timeout_s)
        except grpc.aio.AioRpcError as error:
            what = f"{address} does not describe model {model} ({error.code().name}: {error.details()})"
            raise UsageError(f"{what}; start the server or correct URL and model") from error
    return ModelSignature(
        inputs=tuple(TensorSignature(one.name, one.datatype, tuple(one.shape)) for one in metadata.inputs),
        outputs=tuple(one.name for one in metadata.outputs),
    )


def _read_answer(response: service_pb2.ModelInferResponse, request_id: str, rows: int) -> Answer | None:
    """Read a successful answer; None when it answers another request."""
    if response.id != request_id:
        return None
    if len(response.raw_output_contents) != len(response.outputs):
        raise MalformedAnswer(f"{len(response.raw_output_contents)} raw tensors for {len(response.outputs)} outputs")
    outputs: dict[str, NDArray[np.generic]] = {}
    for output, raw in zip(response.outputs, response.raw_output_contents, strict=True):
        outputs[output.name] = _read_raw(output.datatype, raw)
    parameters = {
        name: getattr(value, kind)
        for name, value in response.parameters.items()
        if (kind := value.WhichOneof("parameter_choice")) is not None
    }
    return make_answer(outputs, parameters, rows)


def _judge_error(error: grpc.aio.AioRpcError, done_s: float) -> Reply:
    code, details = error.code(), error.details() or ""
    made_locally = _FROM_PEER not in (error.debug_error_string() or "") and _MADE_LOCALLY.fullmatch(details)
    if not made_locally:
        outcome = Outcome.REFUSED if code in _REFUSALS else Outcome.FAILED
        return Reply(outcome, done_s, f"{code.name} {details}".strip())
    if code is StatusCode.DEADLINE_EXCEEDED and _TIMER.fullmatch(details):
        return Reply(Outcome.LOST, done_s, NO_REPLY)
    if details.startswith("failed to connect") and "Connection refused" in details:
        return Reply(Outcome.REFUSED, done_s, "connection refused")
    return Reply(Outcome.LOST, done_s, f"connection lost: {details}")


class GrpcSender:
    """Sends one unary call per request over one channel."""

    def __init__(self, address: str, question: Question) -> None:
        self._address = address
        self._question = question
        self._channel: grpc.aio.Channel | None = None
        self._infer: grpc.aio.UnaryUnaryMultiCallable[bytes, service_pb2.ModelInferResponse] | None = None
        self._templates: dict[int, bytes] = {}

    async def prepare(self, at_once: int) -> None:
        """Nothing to do: all calls share one connection."""

    @property
    def unasked(self) -> int:
        """None: the library ends a call at its first answer."""
        return 0

    def _template(self, rows: int) -> bytes:
        message = service_pb2.ModelInferRequest(model_name=self._question.model)
        message.parameters["timeout"].int64_param = self._question.timeout_us
        for tensor in self._question.inputs:
            message.inputs.add(name=tensor.name, datatype=tensor.datatype, shape=[rows, *tensor.row_shape])
        for name in self._question.outputs:
            message.outputs.add(name=name)
        encoded: bytes = message.SerializeToString()
        return encoded

    async def send(self, request_id: str, rows: list[int], until_s: float) -> Reply:
        """Send one request; see `Sender`."""
        if self._infer is None:
            self._channel = grpc.aio.insecure_channel(self._address, options=_CHANNEL_OPTIONS)
            # No serialiser: messages are put together as bytes.
            self._infer = self._channel.unary_unary(
                f"{_SERVICE}/ModelInfer", response_deserializer=service_pb2.ModelInferResponse.FromString
            )
        clock = asyncio.get_running_loop().time
        template = self._templates.get(len(rows))
        if template is None:
            template = self._templates[len(rows)] = self._template(len(rows))
        chunks = [bytes(tensor.chunk(rows)) for tensor in self._question.inputs]
        own = service_pb2.ModelInferRequest(id=request_id, raw_input_contents=chunks).SerializeToString()
        try:
            # Encoded messages that are joined decode as one merged message, so the template is encoded only once.
            response = await self._infer(template + own, timeout=max(until_s - clock(), 0.0))
        except grpc.aio.AioRpcError as error:
            return _judge_error(error, clock())
        done_s = clock()
        try:
            answer = _read_answer(response, request_id, len(rows))
        except MalformedAnswer as error:
            return Reply(Outcome.FAILED, done_s, f"malformed answer: {error}")
        if answer is None:
            return Reply(Outcome.LOST, done_s, FOREIGN_ANSWER, duplicated=1)
        return Reply(Outcome.ANSWERED, done_s, answer=answer)

    async def close(self) -> None:
        """Close the channel."""
        if self._channel is not None:
            await self._channel.close()
