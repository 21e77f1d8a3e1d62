"""The paths of the HTTP interface that tell of models, and those that only say what is not offered."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from cascadeserve.errors import InvalidRequest, NotSupported, RequestTooLarge
from orchestrator.wire.exchange import Answer, Call, Route, json_answer
from orchestrator.wire.json_data import JSON_ERRORS
from orchestrator.wire.model_json import config_json, index_json, statistics_json
from orchestrator.wire.not_offered import PATHS
from orchestrator.wire.others import or_passed_on

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from orchestrator.wire.others import Others
    from orchestrator.wire.tensors import DataPlane


class _IndexRequest(msgspec.Struct):
    ready: bool = False


# {"ready": true} is all that there is to say
_MAX_INDEX_BYTES = 1 << 16
_INDEX_REQUEST = msgspec.json.Decoder(_IndexRequest)


def model_routes(data_plane: DataPlane, others: Others | None) -> list[Route]:
    """Make their part of the table; `/v2/models/stats` must come before what takes `stats` for a model."""
    endpoints = _ModelEndpoints(data_plane)
    config = or_passed_on(others, "config", endpoints.config)
    table = [Route("GET", "/v2/models/stats", endpoints.statistics)]
    for model in ("/v2/models/{model}", "/v2/models/{model}/versions/{version}"):
        table += [
            Route("GET", f"{model}/config", config),
            Route("GET", f"{model}/stats", endpoints.statistics),
        ]
    table.append(Route("POST", "/v2/repository/index", endpoints.index))
    return table + [Route(method, path, _refusal(sentence)) for (method, path), sentence in PATHS.items()]


class _ModelEndpoints:
    """One coroutine per route."""

    def __init__(self, data_plane: DataPlane) -> None:
        self._data_plane = data_plane

    async def config(self, call: Call) -> Answer:
        return json_answer(config_json(self._data_plane.model_config(call.model, call.version)))

    async def statistics(self, call: Call) -> Answer:
        return json_answer(statistics_json(await self._data_plane.statistics(call.model, call.version)))

    async def index(self, call: Call) -> Answer:
        if len(call.body) > _MAX_INDEX_BYTES:
            raise RequestTooLarge(f"the request JSON is longer than {_MAX_INDEX_BYTES} bytes; send {{}}")
        try:
            wanted = _INDEX_REQUEST.decode(call.body or b"{}")
        except JSON_ERRORS as error:
            raise InvalidRequest(f"failed to parse the request JSON buffer: {error}") from None
        entries = self._data_plane.repository_index()
        return json_answer(index_json([entry for entry in entries if entry.ready or not wanted.ready]))


def _refusal(sentence: str) -> Callable[[Call], Awaitable[Answer]]:
    async def refuse(_call: Call) -> Answer:
        raise NotSupported(sentence)

    return refuse
