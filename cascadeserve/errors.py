"""The errors of every package.

    CascadeServeError
    ├── InvalidArtefact      a file or a field of it is wrong: path, field, what to do   (exit code 2)
    ├── UsageError           a command was called in a way that cannot work              (exit code 2)
    ├── ExportRefused        an exported model does not do what its source does          (exit code 1)
    ├── ServerStartFailed    a server process did not come up                            (exit code 1)
    └── RequestError         one request, answered with an error; mapped in orchestrator.wire.status
        ├── InvalidRequest   the request itself is wrong
        ├── NotFound         no such model or version
        ├── RequestTooLarge  over a stated limit
        ├── NotSupported     a part of the protocol that is not offered
        ├── Unavailable      cannot be served now; may be tried again
        │   └── Overloaded   refused at the door: too much is waiting already
        ├── DeadlineExceeded its deadline passed
        └── InternalError    the server's own fault

Every message is one sentence (or two): what was wrong, where, what to do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path


class CascadeServeError(Exception):
    """Base of all errors that a person or a client is meant to read."""

    exit_code = 1


class InvalidArtefact(CascadeServeError):  # noqa: N818 - named by what happened
    """A file is missing, unreadable, or a field in it is wrong."""

    exit_code = 2

    def __init__(self, message: str, *, path: Path | str | None = None, field: str | None = None) -> None:
        """`field` is a JSON path such as `$.gears[0].max_rate_per_s`."""
        where = ": ".join(str(part) for part in (path, field) if part)
        super().__init__(f"{where}: {message}" if where else message)
        self.path = path
        self.field = field


class UsageError(CascadeServeError):
    """A command was asked for something that cannot work as asked."""

    exit_code = 2


class ExportRefused(CascadeServeError):  # noqa: N818
    """An exported model does not reproduce its source, so it is not written."""


class ServerStartFailed(CascadeServeError):  # noqa: N818
    """A server process ended or did not become ready in time."""


class RequestError(CascadeServeError):
    """One inference request is answered with an error."""


class InvalidRequest(RequestError):  # noqa: N818
    """The request is malformed or does not fit the model."""


class NotFound(RequestError):  # noqa: N818
    """No such model or model version."""


class RequestTooLarge(RequestError):  # noqa: N818
    """The request is over a stated limit."""


class NotSupported(RequestError):  # noqa: N818
    """A part of the protocol that this server does not offer."""


class Unavailable(RequestError):  # noqa: N818
    """The request cannot be served now; the client may try again."""


class Overloaded(Unavailable):
    """So much is waiting that the request would be answered too late."""

    def __init__(self, message: str, *, retry_after_s: float) -> None:
        """The client may expect to be let in after `retry_after_s` seconds."""
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(RequestError):  # noqa: N818
    """The request's deadline passed before its answer was complete."""


class InternalError(RequestError):
    """The server failed."""
