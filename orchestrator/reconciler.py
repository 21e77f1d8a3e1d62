"""Moves the instances of all endpoints towards the layout aimed at, without failing a request.

Capacity is added first; only when all of it stands is the new layout in force and its gears used. What is surplus then
goes in the background: a shrink blocks inside Triton until the model's queue there is empty, so the model's batches in
flight are first held to the instances that remain.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from cascadeserve.errors import InvalidArtefact
from orchestrator.backend import BackendError
from orchestrator.reconcile import Step, steps
from orchestrator.supervise import Kick

if TYPE_CHECKING:
    from cascadeserve.gear_plan import GearPlan, Layout
    from orchestrator.dispatcher import Dispatcher
    from orchestrator.instance_config import InstanceConfig
    from orchestrator.metrics import Metrics
    from orchestrator.state import EndpointState

_log = logging.getLogger(__name__)

RECONCILE_PERIOD_S = 1.0
LOAD_TIMEOUT_S = 300.0
# A failed step is tried again after this long, doubled at every further failure.
FIRST_BACK_OFF_S = 1.0
LAST_BACK_OFF_S = 60.0
_DRAIN_POLL_S = 0.005


class _NotYet(Exception):  # noqa: N818 - named by what happened
    """The step has to wait for something else; the next round looks again."""


class Reconciler:
    """Owns the instance counts of every endpoint. `config` None: counts cannot be changed, only read."""

    def __init__(
        self, plan: GearPlan, dispatcher: Dispatcher, *, config: InstanceConfig | None, metrics: Metrics
    ) -> None:
        """Aims at the plan's first layout."""
        self._plan = plan
        self._dispatcher = dispatcher
        self._config = config
        self._metrics = metrics
        self._kick = Kick()
        self._pending: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._failures: dict[tuple[str, str], tuple[int, float]] = {}
        self._adopted = False
        self.aim: Layout = plan.layouts[0]
        self.in_force: Layout = plan.layouts[0]
        self._show_layout()

    def aim_at(self, layout: Layout) -> None:
        """Want another layout; it comes into force when all its instances stand."""
        if layout.name != self.aim.name:
            _log.info("layout %s wanted, %s in force", layout.name, self.in_force.name)
            self.aim = layout
            self._kick()

    async def run(self) -> None:
        """Reconcile forever."""
        try:
            while True:
                self.reconcile()
                await self._kick.wait(RECONCILE_PERIOD_S)
        finally:
            for task in self._pending.values():
                task.cancel()
            await asyncio.gather(*self._pending.values(), return_exceptions=True)

    def reconcile(self) -> None:
        """Start every step that is due and not under way."""
        endpoints = {endpoint.name: endpoint for endpoint in self._dispatcher.endpoints if endpoint.up}
        observed = {name: endpoint.instances for name, endpoint in endpoints.items()}
        if not self._adopted and len(endpoints) == len(self._dispatcher.endpoints):
            self._adopt(observed)
        growing, shrinking = steps(observed, self._plan.standing(self.aim))
        if self._config is not None:
            for step in growing:
                self._start(step, endpoints[step.endpoint])
        growing_pending = growing or any(task for task in self._pending.values() if task.get_name() == "grow")
        if not growing_pending and len(endpoints) == len(self._dispatcher.endpoints) and self.in_force != self.aim:
            _log.info("layout %s in force", self.aim.name)
            self.in_force = self.aim
            self._show_layout()
        if self._config is not None and self.in_force == self.aim:
            for step in shrinking:
                self._start(step, endpoints[step.endpoint])

    def _adopt(self, observed: dict[str, dict[str, int]]) -> None:
        """Take over a layout that already stands, as after a restart of the orchestrator alone."""
        self._adopted = True
        standing = next(
            (layout for layout in self._plan.layouts if steps(observed, self._plan.standing(layout)) == ([], [])), None
        )
        if standing is not None and self.aim == self.in_force != standing:
            _log.info("layout %s already stands", standing.name)
            self.aim = self.in_force = standing
            self._show_layout()

    def _start(self, step: Step, endpoint: EndpointState) -> None:
        key = (step.endpoint, step.model)
        _, not_before_s = self._failures.get(key, (0, 0.0))
        if key in self._pending or asyncio.get_running_loop().time() < not_before_s:
            return
        if not self._is_next(step, endpoint):
            return
        name = "grow" if step.grows else "shrink"
        task = asyncio.create_task(self._carry_out(step, endpoint), name=name)
        self._pending[key] = task
        task.add_done_callback(lambda _: self._pending.pop(key))

    async def _carry_out(self, step: Step, endpoint: EndpointState) -> None:
        if self._config is None:
            raise RuntimeError("steps need a way to change counts")
        key = (step.endpoint, step.model)
        _log.info("endpoint %s: %s %d -> %d instances", step.endpoint, step.model, step.present, step.wanted)
        previous: str | None = None
        endpoint.changes += 1
        try:
            if step.wanted == 0:
                await self._unload(step, endpoint)
            else:
                if not step.grows:
                    await self._hold_to(step, endpoint)
                previous = self._config.write(step.endpoint, step.model, step.wanted)
                await endpoint.backend.load(step.model, timeout_s=LOAD_TIMEOUT_S)
            instances = await endpoint.backend.instance_counts(timeout_s=LOAD_TIMEOUT_S)
            endpoint.leaving.discard(step.model)
            self._dispatcher.endpoint_is_up(endpoint, instances)
        except (BackendError, OSError, InvalidArtefact) as error:
            self._failed(key, error)
            await self._roll_back(step, endpoint, previous)
        except _NotYet:
            pass
        else:
            self._failures.pop(key, None)
            self._metrics.instance_change(step.endpoint, step.model, "ok")
            asyncio.get_running_loop().call_soon(self._kick)  # once this task has left the pending ones
        finally:
            endpoint.changes += 1
            endpoint.leaving.discard(step.model)
            self._dispatcher.limit_in_flight(endpoint, step.model, None)

    def _is_next(self, step: Step, endpoint: EndpointState) -> bool:
        """Whether nothing has to go before it: the models of an ensemble are loaded before it and unloaded after it."""
        if step.wanted == 0:
            return not any(step.model in self._plan.ensembles.get(name, ()) for name in endpoint.instances)
        return all(part in endpoint.instances for part in self._plan.ensembles.get(step.model, ()))

    async def _hold_to(self, step: Step, endpoint: EndpointState) -> None:
        """Let no more batches be in flight than instances will remain, so that Triton's own queue is empty."""
        self._dispatcher.limit_in_flight(endpoint, step.model, step.wanted)
        await self._in_flight_at_most(step.wanted, step, endpoint)

    @staticmethod
    async def _in_flight_at_most(count: int, step: Step, endpoint: EndpointState) -> None:
        # Counts change at every batch: looking now and then is cheaper than an event on the hot path.
        while endpoint.in_flight_by_model.get(step.model, 0) > count:  # noqa: ASYNC110
            await asyncio.sleep(_DRAIN_POLL_S)

    async def _unload(self, step: Step, endpoint: EndpointState) -> None:
        """Unload a model when neither a gear in force nor a row on its way needs it here."""
        used = {stage.model for family in self._dispatcher.families.values() for stage in family.entry.stages}
        if not self._stands_elsewhere(step) and (step.model in used or self._dispatcher.is_needed(step.model)):
            raise _NotYet
        self._dispatcher.stop_sending(endpoint, step.model)
        await self._in_flight_at_most(0, step, endpoint)
        await endpoint.backend.unload(step.model, timeout_s=LOAD_TIMEOUT_S)

    def _stands_elsewhere(self, step: Step) -> bool:
        return any(
            other.up and step.model in other.hosted
            for other in self._dispatcher.endpoints
            if other.name != step.endpoint
        )

    async def _roll_back(self, step: Step, endpoint: EndpointState, previous: str | None) -> None:
        """Put the file back; a model whose first load failed is unloaded, or it stays in the server as a failure."""
        try:
            if previous is not None and self._config is not None:
                self._config.restore(step.endpoint, step.model, previous)
            if step.present == 0:
                await endpoint.backend.unload(step.model, timeout_s=LOAD_TIMEOUT_S)
        except (BackendError, OSError) as error:
            _log.warning("endpoint %s: rolling back %s failed too: %s", step.endpoint, step.model, error)

    def _failed(self, key: tuple[str, str], error: Exception) -> None:
        count, _ = self._failures.get(key, (0, 0.0))
        back_off_s = min(FIRST_BACK_OFF_S * 2**count, LAST_BACK_OFF_S)
        self._failures[key] = (count + 1, asyncio.get_running_loop().time() + back_off_s)
        self._metrics.instance_change(*key, "failed")
        level = logging.ERROR if count == 0 else logging.INFO
        _log.log(
            level, "endpoint %s: changing the instances of %s failed, old ones keep serving, again in %g s: %s",
            *key, back_off_s, error,
        )  # fmt: skip

    def _show_layout(self) -> None:
        self._metrics.layout([layout.name for layout in self._plan.layouts], self.in_force.name)
