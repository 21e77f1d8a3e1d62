"""Moves the instances of all endpoints towards the layout aimed at, without failing a request.

Where the plan has a transition to it, its steps are taken one after the other, while every family is in the gear that
the transition names for it. What was begun is brought to its end.

Where it has none, capacity is added first; only when all of it stands is the new layout in force and its gears used.
What is surplus then goes in the background: a shrink blocks inside Triton until the model's queue there is empty, so
the model's batches in flight are first held to the instances that remain.

After a start of the orchestrator alone, what stands is taken over: a layout, or a transition that was under way, or the
layout that is nearest. What an endpoint has beside the layout in force, as after a start of its server with other
models, goes before what it lacks is loaded: together they may be more than its memory holds.

Models of another plan are brought in beside those of the plan in force, versions of one model side by side; what only
the former plan used is surplus once the other one is in force, and goes when none of its rows may still need it.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from cascadeserve.errors import InvalidArtefact
from orchestrator.backend import BackendError, CallRejected, ModelVersion
from orchestrator.incoming import CannotBringIn, Incoming
from orchestrator.reconcile import (
    Instances,
    LayoutChange,
    Step,
    instances_of,
    parts_of_models,
    side_by_side,
    standing_layout,
    steps,
    touched,
)
from orchestrator.reload import load_anew
from orchestrator.step_failures import StepFailures
from orchestrator.supervise import Kick

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from cascadeserve.gear_plan import GearPlan, Layout, Transition
    from orchestrator.dispatcher import Dispatcher
    from orchestrator.instance_config import InstanceConfig
    from orchestrator.metrics import Metrics
    from orchestrator.state import EndpointState

_log = logging.getLogger(__name__)

RECONCILE_PERIOD_S = 1.0
LOAD_TIMEOUT_S = 300.0
# At the start all endpoints are waited for so long before what stands on the others is taken over.
ADOPT_WITHIN_S = 5.0
_DRAIN_POLL_S = 0.005


class _NotYet(Exception):  # noqa: N818 - named by what happened
    """The step has to wait for something else; the next round looks again."""


class Reconciler:
    """Owns the instances of every endpoint. `config` None: they cannot be changed, only read."""

    def __init__(
        self, plan: GearPlan, dispatcher: Dispatcher, *, config: InstanceConfig | None, metrics: Metrics
    ) -> None:
        """Aims at the plan's first layout."""
        self._dispatcher = dispatcher
        self._config = config
        self._metrics = metrics
        self._kick = Kick()
        # by endpoint and name of the model: Triton changes all its versions together
        self._pending: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._failures = StepFailures(metrics)
        self._adopted = False
        self._adopt_at_s: float | None = None
        self._incoming: Incoming | None = None
        self._change: LayoutChange | None = None
        # models of this plan and of former ones, with what they are composed of: others on an endpoint are somebody
        # else's
        self._ours = parts_of_models(plan)
        self.plan = plan
        self.aim: Layout = plan.layouts[0]
        self.in_force: Layout = plan.layouts[0]
        self._show_layout()

    def aim_at(self, layout: Layout) -> None:
        """Want another layout; it comes into force when all its instances stand."""
        if layout.name != self.aim.name:
            _log.info("layout %s wanted, %s in force", layout.name, self.in_force.name)
            transition = self.plan.transition(self.in_force.name, layout.name)
            if transition is not None and self._config is not None:
                self._change = LayoutChange(self.plan, transition)
            self.aim = layout
            self._kick()

    def endpoint_came_up(self, endpoint: EndpointState) -> None:
        """What failed there before says nothing any more."""
        self._failures.endpoint_came_up(endpoint.name)
        self._kick()

    def look_again(self) -> None:
        """Something changed: do not wait for the next round."""
        self._kick()

    def owns(self, model: str) -> bool:
        """Whether a model is of this plan or a former one; others on an endpoint are somebody else's."""
        return model in self._ours

    @property
    def transition(self) -> Transition | None:
        """The one under way."""
        return None if self._change is None else self._change.transition

    async def bring_in(self, plan: GearPlan, layout: Layout) -> None:
        """Have a layout of another plan stand beside the one aimed at, and return once it does; see `take_plan`.

        Raises:
            CannotBringIn: it does not; what stands of it by then goes again.

        """
        self._ours |= parts_of_models(plan)
        self._failures.clear()
        incoming = Incoming(instances_of(plan, layout), asyncio.get_running_loop().create_future())
        self._incoming = incoming
        self._kick()
        try:
            async with asyncio.timeout(LOAD_TIMEOUT_S):
                await incoming.stands
        except TimeoutError as error:
            raise CannotBringIn(f"not all its endpoints and models were up within {LOAD_TIMEOUT_S:g} s") from error
        finally:
            if incoming.stands.cancelled() or incoming.stands.exception() is not None:
                self._incoming = None
                self._kick()

    def take_plan(self, plan: GearPlan, layout: Layout) -> None:
        """Put in force what was brought in; what only the former plan used goes when it is not needed any more."""
        self._metrics.layout([each.name for each in self.plan.layouts], "")
        self._incoming = self._change = None
        self.plan = plan
        self.aim = self.in_force = layout
        self._show_layout()
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
        for family in self._dispatcher.forget_drained():
            _log.info("%s: the last request under plan %s is answered", family.name, family.plan_name)
        endpoints = {endpoint.name: endpoint for endpoint in self._dispatcher.endpoints if endpoint.up}
        for endpoint in endpoints.values():
            for name in endpoint.dead:
                self._start_reload(endpoint, name)
        all_up = len(endpoints) == len(self._dispatcher.endpoints)
        observed = {
            name: {model: count for model, count in endpoint.instances.items() if model.name in self._ours}
            for name, endpoint in endpoints.items()
        }
        if not self._adopted:
            if not all_up and not self._waited_for_all(endpoints):
                return
            self._adopt(observed)
        if self._change is None or self._ended(self._change, observed, endpoints):
            self._take_steps(observed, endpoints, all_up=all_up)

    def _take_steps(self, observed: Instances, endpoints: Mapping[str, EndpointState], *, all_up: bool) -> None:
        """Start what the layout aimed at asks for, capacity first."""
        wanted = aim = instances_of(self.plan, self.aim)
        if self._incoming is not None:
            wanted = side_by_side(aim, self._incoming.wanted)
        growing, shrinking = steps(observed, wanted)
        dead = ((name, ModelVersion(each, 0)) for name, endpoint in endpoints.items() for each in endpoint.dead)
        self._failures.keep_only({*((step.endpoint, step.model) for step in (*growing, *shrinking)), *dead})
        if self._config is not None:
            full = self._endpoints_with_strangers(shrinking)
            for step in growing:
                if step.endpoint not in full:
                    self._start(step, endpoints[step.endpoint])
        growing_pending = steps(observed, aim)[0] or any(task.get_name() == "grow" for task in self._pending.values())
        ready = not growing_pending and touched(instances_of(self.plan, self.in_force), aim) <= endpoints.keys()
        if ready and self.in_force != self.aim:
            _log.info("layout %s in force", self.aim.name)
            self.in_force = self.aim
            self._show_layout()
        if self._incoming is not None and all_up:
            self._check_incoming(self._incoming, growing)
        if self._config is not None and self.in_force == self.aim:
            for step in shrinking:
                self._start(step, endpoints[step.endpoint])

    def _endpoints_with_strangers(self, shrinking: list[Step]) -> set[str]:
        """Where something stands that is about to go, and has to go before anything else is loaded."""
        if self._incoming is not None or self.in_force != self.aim:
            return set()
        return {
            step.endpoint
            for step in shrinking
            if step.wanted or self._stands_elsewhere(step) or not self._dispatcher.is_needed(step.model)
        }

    def _ended(self, change: LayoutChange, observed: Instances, endpoints: Mapping[str, EndpointState]) -> bool:
        """Take the next step of a transition, if there is one."""
        if not change.endpoints <= endpoints.keys():
            # whether the step before it is done cannot be said of an endpoint that is down
            return False
        wanted = change.wanted(observed)
        if wanted is None:
            if self._pending:
                # the last step is about to end; without the transition its layout has to come into force at once
                return False
            self._change = None
            return True
        growing, shrinking = steps(observed, wanted)
        for step in (*shrinking, *growing):
            self._start(step, endpoints[step.endpoint])
        return False

    def _check_incoming(self, incoming: Incoming, growing: list[Step]) -> None:
        awaited = {(endpoint, model.name) for endpoint, models in incoming.wanted.items() for model in models}
        missing = [step for step in growing if step.model in incoming.wanted.get(step.endpoint, {})]
        if missing and self._config is None:
            step = missing[0]
            incoming.fail(
                f"endpoint {step.endpoint} has {step.present} of {step.wanted} instances of {step.model}, and without "
                "--repository none can be loaded"
            )
        elif not missing and awaited.isdisjoint(self._pending) and not incoming.stands.done():
            incoming.stands.set_result(None)

    def _adopt(self, observed: Instances) -> None:
        """Take over a layout that already stands, as after a restart of the orchestrator alone."""
        self._adopted = True
        served = {ModelVersion(*each) for each in self.plan.versions.items()}
        current = {
            name: {model: count for model, count in instances.items() if model in served}
            for name, instances in observed.items()
        }
        if self.aim != self.in_force:
            return
        self.in_force = self.aim = standing_layout(self.plan, current)
        if self._config is not None and (change := LayoutChange.under_way(self.plan, current)) is not None:
            self._change = change
            self.in_force, self.aim = (self.plan.layout(name) for name in change.between)
        _log.info("layout %s is taken over, %s wanted", self.in_force.name, self.aim.name)
        self._show_layout()

    def _waited_for_all(self, endpoints: Mapping[str, EndpointState]) -> bool:
        """Whether to go on without the endpoints that are down, at the start."""
        now_s = asyncio.get_running_loop().time()
        self._adopt_at_s = self._adopt_at_s or now_s + ADOPT_WITHIN_S
        return bool(endpoints) and now_s >= self._adopt_at_s

    def _start(self, step: Step, endpoint: EndpointState) -> None:
        key = (step.endpoint, step.model.name)
        if key in self._pending or self._failures.must_wait(step.endpoint, step.model):
            return
        if not self._is_next(step, endpoint):
            return
        name = "grow" if step.grows else "shrink"
        task = asyncio.create_task(self._carry_out(step, endpoint), name=name)
        self._pending[key] = task
        task.add_done_callback(lambda _: self._pending.pop(key))

    def _start_reload(self, endpoint: EndpointState, name: str) -> None:
        """Load a model anew whose Python process died, before anything else is done to it."""
        key = (endpoint.name, name)
        model = ModelVersion(name, 0)
        if key in self._pending or self._failures.must_wait(endpoint.name, model):
            return
        task = asyncio.create_task(self._reload(endpoint, model), name="reload")
        self._pending[key] = task
        task.add_done_callback(lambda _: self._pending.pop(key))

    async def _reload(self, endpoint: EndpointState, model: ModelVersion) -> None:
        made_of_it = [name for name, parts in self._ours.items() if model.name in parts]
        standing = {each.name for each in endpoint.instances}
        endpoint.changes += 1
        try:
            instances = await load_anew(endpoint, model.name, [name for name in made_of_it if name in standing])
            endpoint.dead.discard(model.name)
            self._dispatcher.endpoint_is_up(endpoint, instances)
        except BackendError as error:
            self._failures.failed(endpoint.name, model, error)
        else:
            self._failures.succeeded(endpoint.name, model)
        finally:
            endpoint.changes += 1

    async def _carry_out(self, step: Step, endpoint: EndpointState) -> None:
        if self._config is None:
            raise RuntimeError("steps need a way to change counts")
        _log.info("endpoint %s: %s %d -> %d instances", step.endpoint, step.model, step.present, step.wanted)
        former: str | None = None
        endpoint.changes += 1
        try:
            versions, count = await self._make_ready(step, endpoint)
            if versions:
                former = self._config.write(step.endpoint, step.model.name, count, versions)
                await endpoint.backend.load(step.model.name, timeout_s=LOAD_TIMEOUT_S)
                endpoint.loads[step.model.name] += 1
            else:
                # what is loaded next may need its memory
                await endpoint.backend.unload(step.model.name, timeout_s=LOAD_TIMEOUT_S, to_its_end=True)
            instances = await endpoint.backend.instance_counts(timeout_s=LOAD_TIMEOUT_S)
            endpoint.leaving.discard(step.model)
            self._dispatcher.endpoint_is_up(endpoint, instances)
            if (count := instances.get(step.model, 0)) != step.wanted:
                # Triton corrects some counts without a word, and takes others for unchanged
                raise CallRejected(f"Triton says it did so, but has {count} instances, not {step.wanted}")
        except (BackendError, OSError, InvalidArtefact) as error:
            self._failed(step, error)
            await self._roll_back(step, endpoint, former)
        except _NotYet:
            pass
        else:
            self._failures.succeeded(step.endpoint, step.model)
            asyncio.get_running_loop().call_soon(self._kick)  # once this task has left the pending ones
        finally:
            endpoint.changes += 1
            endpoint.leaving.discard(step.model)
            for model in list(endpoint.hosted):
                if model.name == step.model.name:
                    self._dispatcher.limit_in_flight(endpoint, model, None)

    async def _make_ready(self, step: Step, endpoint: EndpointState) -> tuple[set[int], int]:
        """Wait until a step can be taken; returns the versions of the model that are to stand and how often each."""
        versions = endpoint.versions_of(step.model.name)
        if step.wanted == 0:
            await self._wait_until_unused(step, endpoint)
            return versions - {step.model.version}, step.present
        if not step.grows:
            await self._hold_to(step, endpoint)
        return versions | {step.model.version}, step.wanted

    def _is_next(self, step: Step, endpoint: EndpointState) -> bool:
        """Whether nothing has to go before it: the models of an ensemble are loaded before it and unloaded after it."""
        if step.wanted == 0:
            return not any(step.model.name in self._ours.get(other.name, ()) for other in endpoint.instances)
        return {other.name for other in endpoint.instances}.issuperset(self._ours[step.model.name])

    async def _hold_to(self, step: Step, endpoint: EndpointState) -> None:
        """Let no more batches be in flight than instances will remain, so that Triton's own queue is empty."""
        together = [ModelVersion(step.model.name, each) for each in endpoint.versions_of(step.model.name)]
        for model in together:
            self._dispatcher.limit_in_flight(endpoint, model, step.wanted)
        await self._in_flight_at_most(step.wanted, together, endpoint)

    @staticmethod
    async def _in_flight_at_most(count: int, models: Iterable[ModelVersion], endpoint: EndpointState) -> None:
        # Counts change at every batch: looking now and then is cheaper than an event on the hot path.
        while any(endpoint.in_flight_by_model.get(model, 0) > count for model in models):  # noqa: ASYNC110
            await asyncio.sleep(_DRAIN_POLL_S)

    async def _wait_until_unused(self, step: Step, endpoint: EndpointState) -> None:
        """Let a model go when neither a gear in force nor a row on its way needs it here."""
        if not self._stands_elsewhere(step) and self._dispatcher.is_needed(step.model):
            raise _NotYet
        self._dispatcher.stop_sending(endpoint, step.model)
        await self._in_flight_at_most(0, [step.model], endpoint)

    def _stands_elsewhere(self, step: Step) -> bool:
        return any(
            other.up and step.model in other.hosted
            for other in self._dispatcher.endpoints
            if other.name != step.endpoint
        )

    async def _roll_back(self, step: Step, endpoint: EndpointState, former: str | None) -> None:
        """Put the file back; a model whose first load failed is unloaded, or it stays in the server as a failure."""
        try:
            if former is not None and self._config is not None:
                self._config.restore(step.endpoint, step.model.name, former)
            if not endpoint.versions_of(step.model.name):
                await endpoint.backend.unload(step.model.name, timeout_s=LOAD_TIMEOUT_S)
        except (BackendError, OSError) as error:
            _log.warning("endpoint %s: rolling back %s failed too: %s", step.endpoint, step.model, error)

    def _failed(self, step: Step, error: Exception) -> None:
        self._failures.failed(step.endpoint, step.model, error)
        if self._incoming is not None and step.grows and step.model in self._incoming.wanted.get(step.endpoint, {}):
            self._incoming.fail(f"endpoint {step.endpoint} could not load {step.model}: {error}")

    def _show_layout(self) -> None:
        self._metrics.layout([layout.name for layout in self.plan.layouts], self.in_force.name)
