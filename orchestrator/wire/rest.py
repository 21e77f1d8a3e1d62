"""KServe v2 over HTTP, as one Triton server speaks it.

No logic lives here: bodies become requests in `codec_http`, the data plane answers, errors become statuses in
`status`. Every error has the body `{"error": "<one sentence>"}`, which is what Triton's clients parse.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import msgspec
from aiohttp import web

from cascadeserve.errors import InvalidRequest, NotFound, NotSupported, RequestError, RequestTooLarge
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

    Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

logger = logging.getLogger(__name__)

_JSON = "application/json"
_SERVICE_UNAVAILABLE = 503
_RETRY_AFTER_S = 1
_SERVER_ERROR = 500
# What the HTTP parser takes off a body before a handler reads it.
_ENCODINGS = ("", "identity", "gzip", "deflate")


def build_rest_app(
    data_plane: DataPlane,
    *,
    max_body_bytes: int,
    metrics: Callable[[], tuple[bytes, str]] | None = None,
) -> web.Application:
    """Make the HTTP application; `metrics` returns the body and the content type of `GET /metrics`.

    `max_body_bytes` bounds a request body as sent and, if it is compressed, as it unfolds.
    """
    if max_body_bytes < 1:
        # aiohttp would read 0 as "no limit"
        raise ValueError("max_body_bytes must be at least 1")
    endpoints = _Endpoints(data_plane, max_body_bytes, metrics)
    app = web.Application(client_max_size=max_body_bytes, middlewares=[_answer_errors_as_json])
    # The hot path first: routes are tried in order.
    for model in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        app.router.add_post(f"{model}/infer", endpoints.infer)
    gets: list[tuple[str, Handler]] = [
        ("/v2/health/live", endpoints.live),
        ("/v2/health/ready", endpoints.ready),
        ("/v2", endpoints.server_metadata),
    ]
    for model in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        gets += [(model, endpoints.model_metadata), (f"{model}/ready", endpoints.model_ready)]
    if metrics is not None:
        gets.append(("/metrics", endpoints.metrics))
    for path, handler in gets:
        app.router.add_get(path, handler, allow_head=False)
    return app


def build_rest_runner(app: web.Application) -> web.AppRunner:
    """Make the runner that production uses: a client that hangs up cancels its request; no line logged per request."""
    return web.AppRunner(app, handler_cancellation=True, access_log=None)


class _Endpoints:
    """One coroutine per route."""

    def __init__(
        self,
        data_plane: DataPlane,
        max_body_bytes: int,
        metrics: Callable[[], tuple[bytes, str]] | None,
    ) -> None:
        self._data_plane = data_plane
        self._max_body_bytes = max_body_bytes
        self._metrics = metrics

    async def live(self, _request: web.Request) -> web.Response:
        return web.Response()

    async def ready(self, _request: web.Request) -> web.Response:
        return _readiness(ready=self._data_plane.ready())

    async def server_metadata(self, _request: web.Request) -> web.Response:
        return _json_response(self._data_plane.server_metadata())

    async def model_metadata(self, request: web.Request) -> web.Response:
        return _json_response(self._data_plane.model_metadata(*_model(request)))

    async def model_ready(self, request: web.Request) -> web.Response:
        try:
            ready = self._data_plane.model_ready(*_model(request))
        except NotFound:
            # Triton does not tell an unknown model from one that is not ready.
            ready = False
        return _readiness(ready=ready)

    async def infer(self, request: web.Request) -> web.Response:
        name, version = _model(request)
        body = await self._body(request)
        header_length = parse_header_length(request.headers.get(HEADER_LENGTH), len(body))
        if header_length == 0:
            metadata = self._data_plane.model_metadata(name, version)
            infer_request = decode_raw_request(body, metadata, model_version=version)
        else:
            infer_request = decode_request(body, header_length, model_name=name, model_version=version)
        # Cancelled here when the client hangs up: the data plane drops the request, nothing is held on this side.
        response = await self._data_plane.infer(infer_request)
        encoded = encode_response(infer_request, response)
        if encoded.header_length is None:
            return web.Response(body=encoded.body, content_type=_JSON)
        return web.Response(
            body=encoded.body,
            headers={HEADER_LENGTH: str(encoded.header_length)},
            content_type="application/octet-stream",
        )

    async def metrics(self, _request: web.Request) -> web.Response:
        assert self._metrics is not None
        body, content_type = self._metrics()
        return web.Response(body=body, headers={"Content-Type": content_type})

    async def _body(self, request: web.Request) -> bytes:
        """Read the whole body, decompressed, within the limit."""
        encoding = request.headers.get("Content-Encoding", "").lower()
        if encoding not in _ENCODINGS:
            raise NotSupported(f"the content encoding '{encoding}' is not supported; use gzip, deflate or none")
        if request.content_length is not None and request.content_length > self._max_body_bytes:
            # Refused unread: this is what the limit is for.
            raise _too_large(self._max_body_bytes)
        try:
            return await request.read()
        except web.HTTPRequestEntityTooLarge:
            raise _too_large(self._max_body_bytes) from None
        except web.RequestPayloadError:
            raise InvalidRequest(
                f"the request body cannot be read as {encoding or 'sent'}; it is broken or cut short"
            ) from None


@web.middleware
async def _answer_errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn every exception into a JSON body; CancelledError passes, there is nobody to answer."""
    try:
        return await handler(request)
    except RequestError as error:
        status = status_of(error).http
        if status == _SERVER_ERROR:
            logger.error("request failed: %s", error)  # noqa: TRY400 - where it was raised says nothing more
        headers = {"Retry-After": str(_RETRY_AFTER_S)} if status == _SERVICE_UNAVAILABLE else {}
        return _error_response(status, message_of(error), headers)
    except web.HTTPMethodNotAllowed as error:
        sentence = f"the method {error.method} is not allowed here"
        return _error_response(error.status, sentence, {"Allow": error.headers["Allow"]})
    except web.HTTPException as error:
        # The router's own: no such path.
        sentence = "no such path" if error.status == web.HTTPNotFound.status_code else error.reason
        return _error_response(error.status, sentence, {})
    except Exception:
        logger.exception("request failed")
        return _error_response(_SERVER_ERROR, INTERNAL_ERROR, {})


def _model(request: web.Request) -> tuple[str, str]:
    """Return the model's name and version from the path; the version is empty where the path has none."""
    return request.match_info["model"], request.match_info.get("version", "")


def _readiness(*, ready: bool) -> web.Response:
    # 400, not 503: what Triton answers.
    return web.Response(status=200 if ready else 400)


def _json_response(value: object) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), content_type=_JSON)


def _error_response(status: int, sentence: str, headers: dict[str, str]) -> web.Response:
    body = msgspec.json.encode({"error": sentence})
    return web.Response(status=status, body=body, headers=headers, content_type=_JSON)


def _too_large(max_body_bytes: int) -> RequestTooLarge:
    return RequestTooLarge(f"the request body is larger than the limit of {max_body_bytes} bytes; send fewer rows")
