"""Passes requests for models that are no cascade on to an endpoint that has them, and the answers back untouched.

They take slots as batches do, so that the cascades know what the devices have to do. Where both wait they take turns.
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from cascadeserve.errors import DeadlineExceeded, InternalError, Unavailable
from orchestrator.backend import BackendError, EndpointDown, ModelVersion
from orchestrator.flights import LAST_WORDS_S
from orchestrator.wire.codec_http import HEADER_LENGTH
from orchestrator.wire.exchange import Answer
from orchestrator.wire.passed_shapes import check_http, check_rpc

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from orchestrator.backend import Backend
    from orchestrator.metrics import Metrics
    from orchestrator.state import EndpointState
    from orchestrator.wire.exchange import Call

    Send = Callable[[Backend], Awaitable[Any]]

# An answer is waited for so long, or until the client's deadline if that is sooner.
LIMIT_S = 60.0
# what needs no device
_TALK_LIMIT_S = 5.0
MAX_WAITING = 1024
# weight of an answer in the moving mean of a model's times
_MEMORY = 0.2
_PASSED_HEADERS = {
    b"content-type": "Content-Type",
    b"content-encoding": "Content-Encoding",
    HEADER_LENGTH.lower().encode(): HEADER_LENGTH,
}


@dataclass(frozen=True, slots=True)
class Passed:
    """A request that takes a slot."""

    occupied: tuple[ModelVersion, ...]
    work_s: float


@dataclass(slots=True, eq=False)
class _Waiting:
    """A request for a model that waits for a slot, at any endpoint but one."""

    model: str
    version: str
    lost: EndpointState | None
    slot: asyncio.Future[tuple[EndpointState, Passed]]


class Passing:
    """See `wire.others.Others`."""

    def __init__(self, endpoints: Sequence[EndpointState], *, metrics: Metrics, pump: Callable[[], None]) -> None:
        """`pump` is called when a request has come, and when one has left a slot."""
        # whether a model is a family or a part of one
        self.is_ours: Callable[[str], bool] = lambda _: False
        self.is_closing: Callable[[], bool] = lambda: False
        self.on_lost: Callable[[EndpointState], None] = lambda _: None
        # requests that have no answer yet
        self.open = 0
        self._endpoints = endpoints
        self._metrics = metrics
        self._pump = pump
        self._waiting: deque[_Waiting] = deque()
        self._had_turn = False
        self._calls: dict[asyncio.Task[Any], EndpointState] = {}
        # seconds from a request's departure to its answer, moving means
        self._times_s: dict[str, float] = {}
        self._loop = asyncio.get_running_loop()

    # -- Others -------------------------------------------------------------------------------------------------

    def has(self, model: str) -> bool:
        """See `Others.has`; a server that is down may come back with it."""
        return not self.is_ours(model) and any(
            each.name == model for endpoint in self._endpoints for each in endpoint.instances
        )

    def names(self) -> list[str]:
        """Models that there are."""
        models = {each.name for endpoint in self._endpoints for each in endpoint.instances}
        return sorted(model for model in models if not self.is_ours(model))

    async def http(self, call: Call, verb: str) -> Answer:
        """See `Others.http`."""
        path = f"/v2/models/{quote(call.model, safe='')}"
        path += f"/versions/{quote(call.version, safe='')}" if call.version else ""
        headers = {HEADER_LENGTH: call.header_length, "Accept-Encoding": call.accept_encoding}
        given = {name: value for name, value in headers.items() if value is not None}
        infers = verb == "infer"
        if infers:
            check_http(call)
        method, path = "POST" if infers else "GET", f"{path}/{verb}" if verb else path
        got = await self._answer(
            call.model, call.version, lambda backend: backend.pass_http(method, path, given, call.body), infers=infers
        )
        shown = {
            name: got.headers[key].decode("latin-1") for key, name in _PASSED_HEADERS.items() if key in got.headers
        }
        return Answer(got.status, got.body, shown)

    async def rpc(self, name: str, request: Any, model: str, version: str, timeout_s: float | None) -> Any:  # noqa: ANN401
        """See `Others.rpc`."""
        infers = name == "ModelInfer"
        if infers:
            check_rpc(request)
        return await self._answer(
            model, version, lambda backend: backend.pass_rpc(name, request), infers=infers, limit_s=timeout_s
        )

    # -- from the dispatcher ------------------------------------------------------------------------------------

    def take_turn(self, *, contested: bool) -> bool:
        """Give a free slot to a request that waits; every second one where a batch could leave as well."""
        if not self._waiting or not any(each.up and each.in_flight <= each.slots for each in self._endpoints):
            return False
        if contested and self._had_turn:
            self._had_turn = False
            return False
        full: set[tuple[str, str, str | None]] = set()
        for waiting in self._waiting:
            wanted = waiting.model, waiting.version, None if waiting.lost is None else waiting.lost.name
            # one whose client has just left takes itself out
            if waiting.slot.done() or wanted in full:
                continue
            hosts = self._hosts(waiting.model, waiting.version, waiting.lost)
            free = [(endpoint, each) for endpoint, each in hosts if endpoint.has_room((each,))]
            if free:
                endpoint, model = min(free, key=_load)
                passed = Passed((model,), self._times_s.get(model.name, 0.0))
                endpoint.depart(passed)
                self._waiting.remove(waiting)
                waiting.slot.set_result((endpoint, passed))
                self._had_turn = True
                return True
            full.add(wanted)
        return False

    def recall(self, endpoint: EndpointState) -> None:
        """Wait no longer for answers of an endpoint, which is down; what it said last may be on its way."""
        for task in [task for task, where in self._calls.items() if where is endpoint]:
            self._loop.call_later(LAST_WORDS_S, task.cancel)

    def refuse(self, why: str) -> None:
        """Answer that what waits cannot be served now, and end the calls under way."""
        self.is_closing = lambda: True
        for task in self._calls:
            task.cancel()
        while self._waiting:
            slot = self._waiting.popleft().slot
            if not slot.done():
                slot.set_exception(Unavailable(why))

    # -- helpers of the above -----------------------------------------------------------------------------------

    async def _answer(self, model: str, version: str, send: Send, *, infers: bool, limit_s: float | None = None) -> Any:  # noqa: ANN401 - whatever the server says
        longest_s = LIMIT_S if infers else _TALK_LIMIT_S
        limit_s = longest_s if limit_s is None else min(limit_s, longest_s)
        if self.is_closing():
            raise Unavailable("the server is shutting down; try another one")
        self.open += 1
        try:
            async with asyncio.timeout(limit_s):
                return await self._try_twice(model, version, send, infers=infers)
        except TimeoutError:
            raise DeadlineExceeded(f"model '{model}' gave no answer within {limit_s:.3g} s") from None
        except BackendError as error:
            raise InternalError(f"model '{model}' gave no answer: {error}") from error
        finally:
            self.open -= 1

    async def _try_twice(self, model: str, version: str, send: Send, *, infers: bool) -> Any:  # noqa: ANN401
        lost: EndpointState | None = None
        while True:
            hosts = self._hosts(model, version, lost)
            if not hosts or (lost is not None and self.is_closing()):
                raise Unavailable(f"no endpoint serves model '{model}' now; try again shortly")
            endpoint, passed = await self._slot(model, version, lost) if infers else (min(hosts, key=_load)[0], None)
            began_s = self._loop.time()
            try:
                answer = await self._call(endpoint, send, passed)
            except EndpointDown as error:
                self.on_lost(endpoint)
                if lost is not None:
                    raise Unavailable(f"model '{model}': its endpoint went away twice: {error}; try again") from error
                lost = endpoint
            else:
                if infers:
                    took_s = self._loop.time() - began_s
                    self._times_s[model] = (1.0 - _MEMORY) * self._times_s.get(model, took_s) + _MEMORY * took_s
                    self._metrics.passed(endpoint.name, model, took_s)
                return answer

    async def _slot(self, model: str, version: str, lost: EndpointState | None) -> tuple[EndpointState, Passed]:
        if len(self._waiting) >= MAX_WAITING:
            raise Unavailable("too many requests wait for models that are no cascade; try again shortly")
        waiting = _Waiting(model, version, lost, self._loop.create_future())
        self._waiting.append(waiting)
        try:
            self._pump()
            return await waiting.slot
        except asyncio.CancelledError:
            if waiting in self._waiting:
                self._waiting.remove(waiting)
            elif not waiting.slot.cancelled() and waiting.slot.exception() is None:
                endpoint, passed = waiting.slot.result()
                endpoint.arrive(passed)
                self._pump()
            raise

    async def _call(self, endpoint: EndpointState, send: Send, passed: Passed | None) -> Any:  # noqa: ANN401
        """Send; the slot stays busy until the answer, as the device does, whether or not somebody waits for it."""
        task = asyncio.ensure_future(send(endpoint.backend))
        self._calls[task] = endpoint
        limit = self._loop.call_later(LIMIT_S, task.cancel)

        def ended(_: asyncio.Future[Any]) -> None:
            limit.cancel()
            del self._calls[task]
            if not task.cancelled():
                task.exception()  # looked at, also where nobody waits
            if passed is not None:
                endpoint.arrive(passed)
                self._pump()

        task.add_done_callback(ended)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if not task.cancelled() or (current is not None and current.cancelling()):
                raise
            raise EndpointDown(f"endpoint '{endpoint.name}' does not answer any more") from None

    def _hosts(self, model: str, version: str, lost: EndpointState | None) -> list[tuple[EndpointState, ModelVersion]]:
        """Endpoints with the model, and its version there; of a version that is nowhere they may say so themselves."""
        hosts = [
            (endpoint, each)
            for endpoint in self._endpoints
            if endpoint.up and endpoint is not lost
            for each in endpoint.hosted
            if each.name == model
        ]
        return [host for host in hosts if str(host[1].version) == version] or hosts


def _load(host: tuple[EndpointState, ModelVersion]) -> tuple[float, float]:
    endpoint, _ = host
    return endpoint.work_s / endpoint.slots, endpoint.in_flight / endpoint.slots
