"""Puts another gear plan in force while requests are served.

The plan is read and checked first; whatever is wrong with it, the one in force stays. Then its models are loaded beside
those that serve. Once they stand, requests that come in are of the new plan: its gears, its models and versions, its
certificate, its name in their answers. Requests that came before are answered under the plan they came in with.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

from cascadeserve.errors import CascadeServeError, UsageError
from orchestrator.incoming import CannotBringIn
from orchestrator.probe_rows import say_what_is_not_probed
from orchestrator.state import FamilyState

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from cascadeserve.gear_plan import GearPlan, Layout
    from orchestrator.dispatcher import Dispatcher
    from orchestrator.gear_loop import GearLoop
    from orchestrator.metrics import Metrics
    from orchestrator.reconciler import Reconciler

_log = logging.getLogger(__name__)


class PlanChange:
    """Waits to be asked for another plan, and carries the change out."""

    def __init__(
        self,
        read_plan: Callable[[], GearPlan],
        dispatcher: Dispatcher,
        reconciler: Reconciler,
        gear_loop: GearLoop,
        metrics: Metrics,
    ) -> None:
        """`read_plan` reads the plan that is wanted, checked against cluster and repository; it runs in a thread."""
        self._read_plan = read_plan
        self._dispatcher = dispatcher
        self._reconciler = reconciler
        self._gear_loop = gear_loop
        self._metrics = metrics
        self._asked = asyncio.Event()
        metrics.plan(reconciler.plan.name)

    def ask(self) -> None:
        """Have the plan read again; while a change is under way, after it."""
        self._asked.set()

    async def run(self) -> None:
        """Do what is asked for, forever."""
        while True:
            await self._asked.wait()
            self._asked.clear()
            await self.change()

    async def change(self) -> None:
        """Read the plan and put it in force; a plan that cannot be is refused, in one line of the log."""
        former = self._reconciler.plan
        try:
            plan = await asyncio.to_thread(self._read_plan)
            if plan == former:
                _log.info("plan %s is in force already", plan.name)
                return
            _check_can_follow(former, plan)
            layout = _layout_for(plan, self._gear_loop.demands_per_s())
            _log.info("plan %s wanted, %s in force", plan.name, former.name)
            await self._reconciler.bring_in(plan, layout)
        except Exception as error:  # noqa: BLE001 - whatever it is, what serves must not end for it
            unexpected = not isinstance(error, (CascadeServeError, CannotBringIn))
            _log.error("the new plan is refused, plan %s stays in force: %s", former.name, error, exc_info=unexpected)
            self._metrics.plan_change("refused")
        else:
            self._put_in_force(plan, layout)

    def _put_in_force(self, plan: GearPlan, layout: Layout) -> None:
        """Change all that knows the plan, without an await: no request sees a part of the change."""
        demands_per_s = self._gear_loop.demands_per_s()
        slots = {endpoint.name: endpoint.slots for endpoint in self._dispatcher.endpoints}
        families = [
            FamilyState.in_gear_for(demands_per_s[name], name, plan, layout.name, slots) for name in plan.families
        ]
        former = self._reconciler.plan
        self._reconciler.take_plan(plan, layout)
        self._dispatcher.take_families(families)
        self._gear_loop.take_plan(plan)
        self._metrics.plan(plan.name, former=former.name)
        self._metrics.plan_change("ok")
        _log.info("plan %s in force, layout %s", plan.name, layout.name)
        say_what_is_not_probed(plan)


def _check_can_follow(former: GearPlan, plan: GearPlan) -> None:
    """Check that clients need not know of the change, but see it in their answers."""
    if plan.name == former.name:
        raise UsageError(
            f"it is another plan but has the same name, {plan.name!r}, by which answers say what made them; rename it"
        )
    signatures, before = (
        {name: (family.inputs, family.num_classes) for name, family in each.families.items()} for each in (plan, former)
    )
    if signatures.keys() != before.keys():
        raise UsageError(
            f"its families are {', '.join(sorted(signatures))}, those in force are {', '.join(sorted(before))}; "
            "restart with it"
        )
    for name, signature in signatures.items():
        if signature != before[name]:
            raise UsageError(f"family {name!r} has other inputs or classes than the one in force; restart with it")
    parts = {name for ensemble in (*plan.ensembles.values(), *former.ensembles.values()) for name in ensemble}
    coming, standing = plan.versions, former.versions
    for name in sorted(parts & coming.keys() & standing.keys()):
        if coming[name] != standing[name]:
            raise UsageError(
                f"model {name!r} is part of an ensemble and has another version than in the plan in force, but Triton "
                "would join the newest to both; give the new one a model name of its own"
            )


def _layout_for(plan: GearPlan, demands_per_s: Mapping[str, float]) -> Layout:
    """The smallest layout that is planned for these demands; the largest if none is."""
    for layout in plan.layouts:
        if all(demands_per_s[name] < family.max_rate_per_s(layout.name) for name, family in plan.families.items()):
            return layout
    return plan.layouts[-1]
