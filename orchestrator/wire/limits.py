"""What one client, and all clients together, may take of a server."""

from __future__ import annotations

import resource
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cascadeserve.errors import InvalidRequest, RequestTooLarge

if TYPE_CHECKING:
    from collections.abc import Iterator, Sized

MAX_LISTED_ELEMENTS = 1 << 20
# rows of one request: each takes its own way, and some memory until the last one is answered
MAX_ROWS = 1 << 16
# inputs, outputs and parameters of one request, of each
MAX_ENTRIES = 1000
# It comes back with the answer, and waits with it until the client reads.
MAX_ID_BYTES = 1 << 16
# Entries have few fields each; counted by their colons, which may also stand in texts.
_MAX_FIELDS = 64 * MAX_ENTRIES
# What is there of a request's body before it is let in or refused: its parameters stand before its tensors.
PEEK_BYTES = 4096
_MAX_BLANK_BYTES = 1 << 20
# what stands before a value on a line of its own, seven levels deep at four spaces each
_MAX_BLANK_PER_VALUE = 32
_COMMA, _LIST, _BLANK = b",[ "
# what stays in a cache, and what takes a millisecond
_PIECE_BYTES = 1 << 18
_STEP_BYTES = 1 << 21


@dataclass(frozen=True, slots=True)
class Limits:
    """Beside the size of a request; see docs/reference/limits.md."""

    # elements of a request that are written one by one: in JSON, as typed gRPC contents, or as text
    max_listed_elements: int = MAX_LISTED_ELEMENTS
    # open HTTP connections, and as many gRPC connections and calls
    max_connections: int = 10_000
    # bytes of all HTTP requests that are not complete yet
    max_received_bytes: int = 1 << 30
    # seconds that each 64 KiB of a request may take to arrive, and of an answer to be read; a gRPC request, in all
    client_timeout_s: float = 60.0


def check_json(json_part: bytes | memoryview, limit: int) -> None:
    """Refuse JSON that takes much longer to read than such a request needs, before it is read.

    Values take many times what they are long, so there may be `limit`, and as many lists: each is a value too. White
    space, which a few bytes may unfold to, takes five times as long as text: that of printed JSON, with a line for
    each value, is let through, and any up to a megabyte.
    """
    for _ in json_checks(json_part, limit):
        pass


def json_checks(json_part: bytes | memoryview, limit: int) -> Iterator[None]:
    """Do the same piece by piece, so that others may run in between: a millisecond for some megabytes."""
    if len(json_part) <= min(limit, _MAX_BLANK_BYTES):
        return
    text = np.frombuffer(json_part, np.uint8)
    # A comma stands between any two values.
    commas = lists = blanks = 0
    for at in range(0, text.size, _PIECE_BYTES):
        piece = text[at : at + _PIECE_BYTES]
        commas += np.count_nonzero(piece == _COMMA)
        lists += np.count_nonzero(piece == _LIST)
        blanks += np.count_nonzero(piece <= _BLANK)
        if commas >= limit:
            raise RequestTooLarge(f"the request JSON has more than {limit} values; send binary data or fewer rows")
        if lists >= limit:
            raise RequestTooLarge(f"the request JSON has more than {limit} lists; nest the data less deep")
        if at % _STEP_BYTES == 0:
            yield
    if blanks > max(_MAX_BLANK_BYTES, text.size // 2, _MAX_BLANK_PER_VALUE * commas):
        raise RequestTooLarge("the request JSON is mostly white space; send it without, or binary data")


def check_entries(inputs: Sized, outputs: Sized, parameters: Sized) -> None:
    """Refuse a request of more than `MAX_ENTRIES` of one of these, before any of them is looked at."""
    for what, entries in (("inputs", inputs), ("outputs", outputs), ("parameters", parameters)):
        if len(entries) > MAX_ENTRIES:
            raise RequestTooLarge(f"the request has {len(entries)} {what}; there may be {MAX_ENTRIES}")


def check_fields(json_part: bytes | memoryview) -> None:
    """Refuse JSON of so many fields that `check_entries` would come late: that counts them when they are read."""
    if len(json_part) > _MAX_FIELDS and bytes(json_part).count(b":") > _MAX_FIELDS:
        raise RequestTooLarge(
            f"the request JSON has more than {_MAX_FIELDS} fields; there may be {MAX_ENTRIES} inputs, outputs and "
            f"parameters"
        )


def check_id(request_id: str) -> None:
    """Refuse a request id of more than `MAX_ID_BYTES`."""
    if len(request_id) > MAX_ID_BYTES or len(request_id.encode()) > MAX_ID_BYTES:
        raise InvalidRequest(f"the id of the request is longer than {MAX_ID_BYTES} bytes; send a shorter one")


class ListedElements:
    """Counts those elements of one request that become one Python object each."""

    def __init__(self, limit: int) -> None:
        """None yet, and `limit` at most."""
        self._limit = limit
        self._left = limit

    def add(self, name: str, count: int) -> None:
        """Count those of an input; raises RequestTooLarge where they are too many."""
        self._left -= count
        if self._left < 0:
            raise RequestTooLarge(
                f"the request lists more than {self._limit} elements up to input '{name}'; send raw data or fewer rows"
            )


# What the process needs beside its clients' connections: Tritons, files, event loops.
_OTHER_FILES = 256


def allow_connections(limits: Limits) -> int:
    """Raise this process's limit of open files to what the connections need; returns how many fit into it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * limits.max_connections + _OTHER_FILES
    if hard != resource.RLIM_INFINITY:
        wanted = min(wanted, hard)
    if soft not in (resource.RLIM_INFINITY, wanted) and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
        soft = wanted
    if soft == resource.RLIM_INFINITY:
        return limits.max_connections
    return min(limits.max_connections, max((soft - _OTHER_FILES) // 2, 1))
