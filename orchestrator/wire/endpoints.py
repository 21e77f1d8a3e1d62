"""What every path of the HTTP interface answers, and under which paths: one table for all that parses HTTP.

No logic lives here: bodies become requests in `codec_http`, the data plane answers, errors become statuses in
`status`. Every error has the body `{"error": "<one sentence>"}`, which is what Triton's clients parse.
"""

from __future__ import annotations

import asyncio
import logging
import math
from typing import TYPE_CHECKING

import msgspec

from cascadeserve.errors import NotFound, Overloaded, RequestError, Unavailable
from orchestrator.wire.codec_http import (
    HEADER_LENGTH,
    decode_raw_request,
    decode_request,
    encode_response,
    lists_many,
    parse_header_length,
)
from orchestrator.wire.compression import compressed
from orchestrator.wire.exchange import OCTETS, OK, Answer, Call, Route, error_answer, json_answer
from orchestrator.wire.limits import MAX_LISTED_ELEMENTS, json_checks
from orchestrator.wire.model_endpoints import model_routes
from orchestrator.wire.others import or_passed_on
from orchestrator.wire.status import INTERNAL_ERROR, message_of, status_of
from orchestrator.wire.turns import Turns

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from orchestrator.wire.others import Others
    from orchestrator.wire.tensors import DataPlane, InferRequest

_log = logging.getLogger(__name__)

_SERVICE_UNAVAILABLE = 503
_RETRY_AFTER_S = 1
_SERVER_ERROR = 500
# not 503: what Triton answers
_NOT_READY = 400
# from this on, JSON takes longer to read than everything else about a request
_DEAR_BYTES = 1 << 14
_MODEL_PATHS = ("/v2/models/{model}", "/v2/models/{model}/versions/{version}")


def routes(
    data_plane: DataPlane,
    metrics: Callable[[], Awaitable[tuple[bytes, str]]] | None,
    others: Others | None = None,
    *,
    max_listed_elements: int = MAX_LISTED_ELEMENTS,
) -> list[Route]:
    """Make the table; `metrics` returns the body and the content type of `GET /metrics`."""
    endpoints = _Endpoints(data_plane, others, max_listed_elements)
    infer = or_passed_on(others, "infer", endpoints.infer)
    metadata = or_passed_on(others, "", endpoints.model_metadata)
    # The hot path first: routes are tried in order.
    table = [Route("POST", f"{model}/infer", infer, data_plane.admit) for model in _MODEL_PATHS]
    table += model_routes(data_plane, others)
    table += [
        Route("GET", "/v2/health/live", endpoints.live),
        Route("GET", "/v2/health/ready", endpoints.ready),
        Route("GET", "/v2", endpoints.server_metadata),
    ]
    for model in _MODEL_PATHS:
        table += [
            Route("GET", model, metadata),
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


class _Endpoints:
    """One coroutine per route."""

    def __init__(self, data_plane: DataPlane, others: Others | None, max_listed_elements: int) -> None:
        self._data_plane = data_plane
        self._others = others
        self._max_listed_elements = max_listed_elements
        self._turns = Turns(
            "too many requests of large JSON or many texts wait to be read; send binary data, or fewer rows"
        )

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
            if self._others is not None and self._others.has(call.model):
                return await self._others.http(call, "ready")
            if self._data_plane.model_ready(call.model, call.version):
                return Answer()
        except (NotFound, Unavailable):
            # Triton does not tell an unknown model from one that is not ready.
            pass
        return error_answer(_NOT_READY, "Model version not ready")

    async def infer(self, call: Call) -> Answer:
        header_length = parse_header_length(call.header_length, len(call.body))
        if header_length == 0:
            metadata = self._data_plane.model_metadata(call.model, call.version)
            request = decode_raw_request(call.body, metadata, model_version=call.version)
        else:
            request = await self._decode(call, header_length)
        request.admitted = call.admitted
        request.waited_s += call.waited_s
        # Cancelled here when the client hangs up: the data plane drops the request, nothing is held on this side.
        response = await self._data_plane.infer(request)
        encoded = encode_response(request, response)
        if encoded.header_length is None:
            answer = json_answer(encoded.body)
        else:
            headers = {HEADER_LENGTH: str(encoded.header_length), "Content-Type": OCTETS}
            answer = Answer(OK, encoded.body, headers)
        return answer if call.accept_encoding is None else await compressed(answer, call.accept_encoding)

    async def _decode(self, call: Call, header_length: int | None) -> InferRequest:
        def decode() -> InferRequest:
            return decode_request(
                call.body,
                header_length,
                model_name=call.model,
                model_version=call.version,
                max_listed_elements=self._max_listed_elements,
                checked=True,
            )

        json_part = call.body if header_length is None else memoryview(call.body)[:header_length]
        for _ in json_checks(json_part, self._max_listed_elements):
            await asyncio.sleep(0)
        if len(json_part) < _DEAR_BYTES and not lists_many(call.body, header_length):
            return decode()
        try:
            deadline_s = self._data_plane.default_deadline_s(call.model, call.version)
            request, waited_s = await self._turns.run(decode, deadline_s)
        except Overloaded:
            self._data_plane.unread(call.model, call.version)
            raise
        request.waited_s = waited_s
        return request


def _readiness(*, ready: bool) -> Answer:
    return Answer(OK if ready else _NOT_READY)


def _json_answer(value: object) -> Answer:
    return json_answer(msgspec.json.encode(value))
