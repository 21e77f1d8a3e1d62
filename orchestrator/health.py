"""Watches one endpoint: takes it in when it is there, out when it is not, and reads its instance counts again.

A server that hangs keeps its connections. It is noticed by its silence: when none of the batches in flight has come
back for far longer than all of them are expected to take, and a call that needs no device is not answered either.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from orchestrator.backend import BackendError
from orchestrator.silent_models import SilentModels
from orchestrator.supervise import Kick

if TYPE_CHECKING:
    from collections.abc import Callable

    from orchestrator.dispatcher import Dispatcher
    from orchestrator.state import EndpointState

_log = logging.getLogger(__name__)

PROBE_PERIOD_S = 0.5
PROBE_TIMEOUT_S = 2.0
# A server that has answered no batch for so long, and for so many times what it is expected to need, has to answer a
# probe faster than others.
SILENCE_S = 0.5
SILENCE_WORKS = 8.0
SILENCE_PROBE_TIMEOUT_S = 1.0
_WATCH_PERIOD_S = 0.1


class EndpointMonitor:
    """Probes an endpoint twice a second, and at once after a call to it failed."""

    def __init__(self, endpoint: EndpointState, dispatcher: Dispatcher) -> None:
        """Starts out believing that the endpoint is down."""
        self.kick = Kick()
        self._endpoint = endpoint
        self._dispatcher = dispatcher
        self._silent_models = SilentModels(endpoint, dispatcher.endpoints)
        # how many batches had come back, and since when no more have while some are in flight
        self._answers = 0
        self._silent_since_s = 0.0
        self.on_up: Callable[[EndpointState], None] = lambda _: None

    async def run(self) -> None:
        """Probe forever."""
        while True:
            await self.probe()
            await self.kick.wait(PROBE_PERIOD_S)

    async def probe(self) -> None:
        """Bring the dispatcher's view of the endpoint up to date."""
        endpoint = self._endpoint
        changes = endpoint.changes
        try:
            live = await endpoint.backend.is_live(timeout_s=PROBE_TIMEOUT_S)
            instances = await endpoint.backend.instance_counts(timeout_s=PROBE_TIMEOUT_S) if live else {}
        except BackendError as error:
            live, instances = False, {}
            _log.warning("endpoint %s: %s", endpoint.name, error)
        if live:
            if endpoint.up and endpoint.changes != changes:
                return  # read before or while instances changed; the next probe sees how it ended
            if not endpoint.up:
                _log.info("endpoint %s is up: %s", endpoint.name, instances)
            was_up = endpoint.up
            self._dispatcher.endpoint_is_up(endpoint, instances)
            if not was_up:
                self.on_up(endpoint)
            opinions = self._dispatcher.flights.opinions
            is_any_back = bool(endpoint.failing) and await opinions.look_again(endpoint, timeout_s=PROBE_TIMEOUT_S)
            if is_any_back and endpoint.up:
                self._dispatcher.endpoint_is_up(endpoint, endpoint.instances)
        elif endpoint.up:
            _log.warning("endpoint %s is down", endpoint.name)
            self._dispatcher.endpoint_is_down(endpoint)

    async def watch(self) -> None:
        """Look for silence, forever."""
        while True:
            await asyncio.sleep(_WATCH_PERIOD_S)
            now_s = asyncio.get_running_loop().time()
            for model in self._silent_models.find(now_s):
                self._dispatcher.flights.model_is_silent(self._endpoint, model)
            if self._is_silent(now_s):
                await self._ask_the_silent()

    def _is_silent(self, now_s: float) -> bool:
        endpoint = self._endpoint
        if not endpoint.up or not endpoint.in_flight or endpoint.answers != self._answers:
            self._answers = endpoint.answers
            self._silent_since_s = now_s
            return False
        expected_s = endpoint.work_s / endpoint.slots
        return now_s - self._silent_since_s > max(SILENCE_S, SILENCE_WORKS * expected_s)

    async def _ask_the_silent(self) -> None:
        endpoint = self._endpoint
        generation = endpoint.generation
        live = await endpoint.backend.is_live(timeout_s=SILENCE_PROBE_TIMEOUT_S)
        silent_s = asyncio.get_running_loop().time() - self._silent_since_s
        still = endpoint.up and endpoint.generation == generation and endpoint.answers == self._answers
        self._silent_since_s += silent_s  # it is asked again only after another such silence
        if not live and still:
            _log.warning("endpoint %s is down: no batch answered for %.1f s, nor a probe", endpoint.name, silent_s)
            self._dispatcher.endpoint_is_down(endpoint)
