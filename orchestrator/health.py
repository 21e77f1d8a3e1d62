"""Watches one endpoint: takes it in when it is there, out when it is not, and reads its instance counts again."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

from orchestrator.backend import BackendError
from orchestrator.supervise import Kick

if TYPE_CHECKING:
    from orchestrator.dispatcher import Dispatcher
    from orchestrator.state import EndpointState

_log = logging.getLogger(__name__)

PROBE_PERIOD_S = 0.5
PROBE_TIMEOUT_S = 2.0


class EndpointMonitor:
    """Probes an endpoint twice a second, and at once after a call to it failed."""

    def __init__(self, endpoint: EndpointState, dispatcher: Dispatcher) -> None:
        """Starts out believing that the endpoint is down."""
        self.kick = Kick()
        self._endpoint = endpoint
        self._dispatcher = dispatcher

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
            self._dispatcher.endpoint_is_up(endpoint, instances)
        elif endpoint.up:
            _log.warning("endpoint %s is down", endpoint.name)
            self._dispatcher.endpoint_is_down(endpoint)
