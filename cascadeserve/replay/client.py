"""The sender: one request out, one reply in, whatever the transport; and where a run is aimed at."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np

from cascadeserve.datatypes import FIXED_SIZE
from cascadeserve.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from cascadeserve.replay.payload import ModelSignature, Question

# A reply is waited for this long after the deadline before the request counts as lost.
GRACE_S = 1.0
NO_REPLY = "no reply by the deadline + 1 s"
FOREIGN_ANSWER = "answer without the id of its request"
SECOND_ANSWER = "second answer to one request"

_URL = re.compile(r"(?P<scheme>https?|grpc)://(?P<address>[^/\s]+)(?P<prefix>/[^\s]*)?")


class Outcome(IntEnum):
    """What became of a request; `UNSENT` is one that a run stopped before its time never concluded."""

    UNSENT = 0
    ANSWERED = 1
    REFUSED = 2
    FAILED = 3
    LOST = 4


@dataclass(slots=True)
class Answer:
    """The outputs of one answered request, each [rows of the request]; None where the model does not give them."""

    label: NDArray[np.int64]
    stage: NDArray[np.int64] | None = None
    certainty: NDArray[np.float64] | None = None
    gear: str | None = None
    certified: bool | None = None
    plan: str | None = None


@dataclass(slots=True)
class Reply:
    """How one request ended, at `done_s` on the event loop's clock.

    `duplicated` counts answers that belong to no open request: second ones, and ones with another request's id.
    """

    outcome: Outcome
    done_s: float
    error: str = ""
    duplicated: int = 0
    answer: Answer | None = None


class MalformedAnswer(Exception):  # noqa: N818 - named by what happened; never leaves a sender
    """A successful answer that does not hold what was asked for."""


class Sender(Protocol):
    """Sends requests of one run, each exactly once: never retried, neither here nor in the library below."""

    @property
    def unasked(self) -> int:
        """Answers so far that came over the wire while no request waited for them."""

    async def prepare(self, at_once: int) -> None:
        """Make ready for so many requests at a time, before time 0 of the run; never raises."""

    async def send(self, request_id: str, rows: list[int], until_s: float) -> Reply:
        """Send these rows and wait for the reply until `until_s` on the event loop's clock; never raises for it."""

    async def close(self) -> None:
        """Close all connections."""


@dataclass(frozen=True)
class Target:
    """Where the server is: `address` is a URL without trailing slash for HTTP, host:port for gRPC."""

    transport: Literal["http", "grpc"]
    address: str


def parse_target(url: str) -> Target:
    """Read `http://host:port`, `https://host:port` or `grpc://host:port`."""
    match = _URL.fullmatch(url)
    if match is None or (match["scheme"] == "grpc" and (match["prefix"] or "/") != "/"):
        raise UsageError(f"`{url}` is no address; write http://host:port or grpc://host:port")
    if match["scheme"] == "grpc":
        return Target("grpc", match["address"])
    return Target("http", url.rstrip("/"))


async def describe_model(target: Target, model: str, *, timeout_s: float = 10.0) -> ModelSignature:
    """Ask the server for the model's inputs and outputs.

    Raises:
        UsageError: no answer, or no such model.

    """
    if target.transport == "http":
        from cascadeserve.replay import http_sender  # noqa: PLC0415 - a run loads only the transport it uses

        return await http_sender.describe_model(target.address, model, timeout_s)
    from cascadeserve.replay import grpc_sender  # noqa: PLC0415

    return await grpc_sender.describe_model(target.address, model, timeout_s)


def open_sender(target: Target, question: Question) -> Sender:
    """Make the sender for a target; connections are opened when they are first needed."""
    if target.transport == "http":
        from cascadeserve.replay.http_sender import HttpSender  # noqa: PLC0415

        return HttpSender(target.address, question)
    from cascadeserve.replay.grpc_sender import GrpcSender  # noqa: PLC0415

    return GrpcSender(target.address, question)


def read_raw(datatype: str, data: bytes | memoryview) -> NDArray[np.generic]:
    """Raw output bytes as a flat array.

    Raises:
        MalformedAnswer: the datatype is unknown or the bytes are not a whole number of elements.

    """
    dtype = FIXED_SIZE.get(datatype)
    if dtype is None or len(data) % dtype.itemsize:
        raise MalformedAnswer(f"an output of datatype {datatype} in {len(data)} bytes")
    return np.frombuffer(data, dtype=dtype)


def make_answer(outputs: Mapping[str, NDArray[np.generic]], parameters: Mapping[str, object], rows: int) -> Answer:
    """Judge the outputs of a successful answer to a request of `rows` rows.

    Raises:
        MalformedAnswer: `label` is missing or an output has another number of elements than the request has rows.

    """
    for name, array in outputs.items():
        if array.size != rows:
            raise MalformedAnswer(f"output {name} has {array.size} elements for {rows} rows")
    label, stage, certainty = (outputs.get(name) for name in ("label", "stage", "certainty"))
    if label is None:
        raise MalformedAnswer("output label is missing")
    gear, certified, plan = (parameters.get(name) for name in ("gear", "certified", "plan"))
    return Answer(
        label=label.reshape(-1).astype(np.int64, copy=False),
        stage=None if stage is None else stage.reshape(-1).astype(np.int64),
        certainty=None if certainty is None else certainty.reshape(-1).astype(np.float64),
        gear=gear if isinstance(gear, str) else None,
        certified=certified if isinstance(certified, bool) else None,
        plan=plan if isinstance(plan, str) else None,
    )
