"""What every path of the HTTP interface answers, and under which paths: one table for all that parses HTTP.

No logic lives here: bodies become requests in `codec_http`, the data plane answers, errors become statuses in
`status`. Every error has the body `{"error": "<one sentence>"}`, which is what Triton's clients parse.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from cascadeserve.errors import NotFound, Overloaded, RequestError
from orchestrator.wire.codec_http import (
    HEADER_LENGTH,
    decode_raw_request,
    decode_request,
    encode_response,
    parse_header_length,
)
from orchestrator.wire.status import INTERNAL_ERROR, message_of, status_of

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from orchestrator.wire.tensors import DataPlane

_log = logging.getLogger(__name__)

_JSON = "application/json"
_OCTETS = "application/octet-stream"
_OK = 200
_SERVICE_UNAVAILABLE = 503
_RETRY_AFTER_S = 1
_SERVER_ERROR = 500
_MODEL_PATHS = ("/v2/models/{model}", "/v2/models/{model}/versions/{version}")


@dataclass(slots=True)
class Call:
    """One HTTP request, as far as answers depend on it; the version is empty where the path has none."""

    model: str = ""
    version: str = ""
    header_length: str | None = None
    body: bytes = b""


@dataclass(slots=True)
class Answer:
    """One HTTP response, without what its connection adds."""

    status: int = _OK
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=lambda: {"Content-Type": _OCTETS})


class Route(NamedTuple):
    """`path` may hold the places {model} and {version}; `handler` raises what `answer_to` turns into an answer.

    `gate` is asked before the body is read, with what stands in these places; it may raise the same.
    """

    method: str
    path: str
    handler: Callable[[Call], Awaitable[Answer]]
    gate: Callable[[str, str], None] | None = None


def routes(data_plane: DataPlane, metrics: Callable[[], Awaitable[tuple[bytes, str]]] | None) -> list[Route]:
    """Make the table; `metrics` returns the body and the content type of `GET /metrics`."""
    endpoints = _Endpoints(data_plane)
    # The hot path first: routes are tried in order.
    table = [Route("POST", f"{model}/infer", endpoints.infer, data_plane.admit) for model in _MODEL_PATHS]
    table += [
        Route("GET", "/v2/health/live", endpoints.live),
        Route("GET", "/v2/health/ready", endpoints.ready),
        Route("GET", "/v2", endpoints.server_metadata),
    ]
    for model in _MODEL_PATHS:
        table += [
            Route("GET", model, endpoints.model_metadata),
            Route("GET", f"{model}/ready", endpoints.model_ready),
        ]
    if metrics is not None:

        async def show_metrics(_call: Call) -> Answer:
            body, content_type = await metrics()
            return Answer(body=body, headers={"Content-Type": content_type})

        table.append(Route("GET", "/metrics", show_metrics))
    return table


def answer_to(error: Exception) -> Answer:
    """Turn what a handler raised into an answer with a JSON body."""
    if not isinstance(error, RequestError):
        _log.error("request failed", exc_info=error)
        return error_answer(_SERVER_ERROR, INTERNAL_ERROR)
    status = status_of(error).http
    if status == _SERVER_ERROR:
        _log.error("request failed: %s", error)
    answer = error_answer(status, message_of(error))
    if status == _SERVICE_UNAVAILABLE:
        after_s = error.retry_after_s if isinstance(error, Overloaded) else _RETRY_AFTER_S
        answer.headers["Retry-After"] = str(math.ceil(after_s))
    return answer


def error_answer(status: int, sentence: str) -> Answer:
    """Make the answer of an error."""
    return Answer(status, msgspec.json.encode({"error": sentence}), {"Content-Type": _JSON})


class _Endpoints:
    """One coroutine per route."""

    def __init__(self, data_plane: DataPlane) -> None:
        self._data_plane = data_plane

    async def live(self, _call: Call) -> Answer:
        return Answer()

    async def ready(self, _call: Call) -> Answer:
        return _readiness(ready=self._data_plane.ready())

    async def server_metadata(self, _call: Call) -> Answer:
        return _json_answer(self._data_plane.server_metadata())

    async def model_metadata(self, call: Call) -> Answer:
        return _json_answer(self._data_plane.model_metadata(call.model, call.version))

    async def model_ready(self, call: Call) -> Answer:
        try:
            ready = self._data_plane.model_ready(call.model, call.version)
        except NotFound:
            # Triton does not tell an unknown model from one that is not ready.
            ready = False
        return _readiness(ready=ready)

    async def infer(self, call: Call) -> Answer:
        header_length = parse_header_length(call.header_length, len(call.body))
        if header_length == 0:
            metadata = self._data_plane.model_metadata(call.model, call.version)
            request = decode_raw_request(call.body, metadata, model_version=call.version)
        else:
            request = decode_request(call.body, header_length, model_name=call.model, model_version=call.version)
        # Cancelled here when the client hangs up: the data plane drops the request, nothing is held on this side.
        response = await self._data_plane.infer(request)
        encoded = encode_response(request, response)
        if encoded.header_length is None:
            return Answer(_OK, encoded.body, {"Content-Type": _JSON})
        return Answer(_OK, encoded.body, {HEADER_LENGTH: str(encoded.header_length), "Content-Type": _OCTETS})


def _readiness(*, ready: bool) -> Answer:
    # 400, not 503: what Triton answers.
    return Answer(_OK if ready else 400)


def _json_answer(value: object) -> Answer:
    return Answer(_OK, msgspec.json.encode(value), {"Content-Type": _JSON})
