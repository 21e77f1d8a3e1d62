"""Which HTTP status and which gRPC code each request error becomes. Neither is derived from the other."""

from __future__ import annotations

from typing import NamedTuple

from grpc import StatusCode

from cascadeserve.errors import (
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    NotFound,
    NotSupported,
    Overloaded,
    RequestError,
    RequestTooLarge,
    Unavailable,
)


class Status(NamedTuple):
    """One error class on both wires."""

    http: int
    grpc: StatusCode


STATUS: dict[type[RequestError], Status] = {
    InvalidRequest: Status(400, StatusCode.INVALID_ARGUMENT),
    NotFound: Status(404, StatusCode.NOT_FOUND),
    RequestTooLarge: Status(413, StatusCode.RESOURCE_EXHAUSTED),
    NotSupported: Status(501, StatusCode.UNIMPLEMENTED),
    Unavailable: Status(503, StatusCode.UNAVAILABLE),
    Overloaded: Status(503, StatusCode.UNAVAILABLE),
    DeadlineExceeded: Status(504, StatusCode.DEADLINE_EXCEEDED),
    InternalError: Status(500, StatusCode.INTERNAL),
}

# What a client reads when the fault is a bug of ours; the log has the traceback.
INTERNAL_ERROR = "internal error"
SHUTTING_DOWN = "the server is shutting down; try another one"

# gRPC sends the message as a header, percent-encoded, and clients refuse more than 8 KiB of headers.
_MAX_MESSAGE = 500


def status_of(error: RequestError) -> Status:
    """Look up an error, or the nearest class above it."""
    for kind in type(error).__mro__:
        if kind in STATUS:
            return STATUS[kind]
    return STATUS[InternalError]


def message_of(error: RequestError) -> str:
    """Return the error's text as one line that fits both wires."""
    # cut first: a name may be as long as a request, and of nothing but words
    text = " ".join(str(error)[: 4 * _MAX_MESSAGE].split())
    if len(text) > _MAX_MESSAGE:
        text = f"{text[:_MAX_MESSAGE]}..."
    # A name taken from a path or a header may hold surrogates, which UTF-8 cannot.
    return text.encode("utf-8", "replace").decode()
