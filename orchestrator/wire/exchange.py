"""One HTTP request and its response, as far as answers depend on them, and the route between them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import msgspec

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

OK = 200
JSON = "application/json"
OCTETS = "application/octet-stream"


@dataclass(slots=True)
class Call:
    """One HTTP request, as far as answers depend on it; the version is empty where the path has none."""

    model: str = ""
    version: str = ""
    header_length: str | None = None
    body: bytes = b""
    accept_encoding: str | None = None
    # what its gate said
    admitted: bool = True
    # seconds for which it has waited to be unfolded
    waited_s: float = 0.0


@dataclass(slots=True)
class Answer:
    """One HTTP response, without what its connection adds."""

    status: int = OK
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=lambda: {"Content-Type": OCTETS})


class Route(NamedTuple):
    """`path` may hold places such as {model}; `handler` raises what `endpoints.answer_to` turns into an answer.

    `gate` is asked before the body is read, with what stands in {model} and {version} and the beginning of the body, as
    far as it is there; it may raise the same, or answers what is to become `Call.admitted`.
    """

    method: str
    path: str
    handler: Callable[[Call], Awaitable[Answer]]
    gate: Callable[[str, str, bytes], bool] | None = None


def json_answer(body: bytes, status: int = OK) -> Answer:
    """Answer with JSON text."""
    return Answer(status, body, {"Content-Type": JSON})


def error_answer(status: int, sentence: str) -> Answer:
    """Make the answer of an error."""
    return json_answer(msgspec.json.encode({"error": sentence}), status)
