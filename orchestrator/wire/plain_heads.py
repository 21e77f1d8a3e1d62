"""The heads of plain requests: what they say, or that they are not plain."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from orchestrator.wire.codec_http import HEADER_LENGTH
from orchestrator.wire.limits import PEEK_BYTES

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from orchestrator.wire.exchange import Answer, Call, Route

# A client writes the same head again and again.
_MAX_KNOWN_HEADS = 512

_REQUEST_LINE = re.compile(rb"(GET|POST) (/[A-Za-z0-9_.~/-]*) HTTP/1\.1")
_NAME = re.compile(rb"[A-Za-z0-9-]+")
_VALUE = re.compile(rb"[\t\x20-\x7e]*")
# a place in a path; no name may look like a step up or down
_PLACE = r"(?P<\1>[A-Za-z0-9_~-][A-Za-z0-9_.~-]*)"
_LENGTH = b"content-length"
_JSON_LENGTH = HEADER_LENGTH.lower().encode()
_MAX_LENGTH_DIGITS = 15
# With one of these a request means more than its bytes say, or its length is not the stated one.
_NOT_PLAIN = {b"transfer-encoding", b"content-encoding", b"expect", b"upgrade", b"te", b"trailer", b"http2-settings"}


@dataclass(slots=True, frozen=True)
class Head:
    """What the head of a plain request says."""

    handler: Callable[[Call], Awaitable[Answer]]
    gate: Callable[[str, str, bytes], bool] | None
    model: str
    version: str
    header_length: str | None
    accept_encoding: str | None
    body_bytes: int
    # how much of the body the gate is shown
    peek_bytes: int


class Heads:
    """Reads them for the routes of a table."""

    def __init__(self, table: list[Route], max_body_bytes: int) -> None:
        """A request with a larger body is not plain."""
        self._routes = [
            (route, route.method.encode(), re.compile(re.sub(r"\\{(\w+)\\}", _PLACE, re.escape(route.path))))
            for route in table
        ]
        self._max_body_bytes = max_body_bytes
        self._known: dict[bytes, Head | None] = {}

    def read(self, head: bytes) -> Head | None:
        """Read the head of a request, without the empty line; None if the request is not plain."""
        try:
            return self._known[head]
        except KeyError:
            if len(self._known) >= _MAX_KNOWN_HEADS:
                self._known.clear()
            read = self._known[head] = self._parse_head(head)
            return read

    def _parse_head(self, head: bytes) -> Head | None:
        first, *lines = head.split(b"\r\n")
        request = _REQUEST_LINE.fullmatch(first)
        if request is None:
            return None
        headers: dict[bytes, bytes] = {}
        for line in lines:
            name, colon, value = line.partition(b":")
            if not colon or not _NAME.fullmatch(name) or not _VALUE.fullmatch(value):
                return None
            key = name.lower()
            if key in headers or key in _NOT_PLAIN:
                return None
            headers[key] = value.strip(b" \t")
        method, path = request.groups()
        length = headers.get(_LENGTH, b"0")
        plain = (
            b"host" in headers
            and headers.get(b"connection", b"keep-alive").lower() == b"keep-alive"
            and length.isdigit()
            and len(length) <= _MAX_LENGTH_DIGITS
            and (method == b"POST" or int(length) == 0)
            and int(length) <= self._max_body_bytes
        )
        if not plain:
            return None
        for route, wanted, pattern in self._routes:
            if wanted == method and (match := pattern.fullmatch(path.decode())) is not None:
                places = match.groupdict()
                header_length = headers.get(_JSON_LENGTH)
                accept_encoding = headers.get(b"accept-encoding")
                return Head(
                    route.handler,
                    route.gate,
                    places.get("model", ""),
                    places.get("version", ""),
                    None if header_length is None else header_length.decode(),
                    None if accept_encoding is None else accept_encoding.decode(),
                    int(length),
                    _json_bytes(int(length), header_length) if route.gate is not None else 0,
                )
        return None


def _json_bytes(body_bytes: int, header_length: bytes | None) -> int:
    """How much of a body is JSON, as far as anybody looks."""
    json_bytes = body_bytes
    if header_length is not None and header_length.isdigit() and len(header_length) <= _MAX_LENGTH_DIGITS:
        json_bytes = min(int(header_length), body_bytes)
    return min(json_bytes, PEEK_BYTES)
