"""Ten times a second: how much demand is there, which gear serves it, which layout is wanted."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cascadeserve.policy.demand import ArrivalWindow, demand_per_s
from cascadeserve.policy.gear_switch import HOLD, TICK_S, UP, switch_gear, switch_layout
from cascadeserve.policy.shares import available_share, needed_share
from orchestrator.state import covering_rate

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cascadeserve.gear_plan import Gear, GearPlan
    from orchestrator.dispatcher import Dispatcher
    from orchestrator.metrics import Metrics
    from orchestrator.reconciler import Reconciler
    from orchestrator.state import FamilyState

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _FamilyLoad:
    window: ArrivalWindow
    gears: list[Gear]
    # of the device time, that the gears are planned for; and that the family may use, as of the last tick
    guaranteed_share: float
    share: float
    demand_per_s: float = 0.0
    low_since_s: float = -1.0

    @property
    def guaranteed_per_share(self) -> float:
        """What a demand is to be multiplied by to be one that the gears are planned for.

        On more of the device time than is guaranteed it is as if it were less.
        """
        return self.guaranteed_share / self.share


class GearLoop:
    """Holds the arrival windows of all families and shifts their gears."""

    def __init__(self, plan: GearPlan, dispatcher: Dispatcher, reconciler: Reconciler, metrics: Metrics) -> None:
        """Every family starts in the gear its dispatcher state names."""
        self._plan = plan
        self._dispatcher = dispatcher
        self._reconciler = reconciler
        self._metrics = metrics
        self._layout_names = [layout.name for layout in plan.layouts]
        self._layout_wish = HOLD
        self._layout_wish_since_s = 0.0
        self._loads = {
            name: _FamilyLoad(
                ArrivalWindow(dispersion=family.plan.dispersion),
                family.plan.gears_of(reconciler.in_force.name),
                family.plan.guaranteed_share,
                family.plan.guaranteed_share,
            )
            for name, family in dispatcher.families.items()
        }
        self._show_gears()

    def take_plan(self, plan: GearPlan) -> None:
        """Go by another plan, whose families are in the dispatcher; what is known of the load stays known."""
        for name, family in self._plan.families.items():
            self._metrics.gear(name, [gear.name for gear in family.gears], "", None)
            self._metrics.load(name, self._loads[name].demand_per_s, dict.fromkeys(family.models, 0))
        self._plan = plan
        self._layout_names = [layout.name for layout in plan.layouts]
        self._layout_wish = HOLD
        for name, load in self._loads.items():
            family = self._dispatcher.families[name].plan
            load.window.dispersion = family.dispersion
            load.guaranteed_share = load.share = family.guaranteed_share
            load.gears = family.gears_of(self._reconciler.in_force.name)
            load.low_since_s = -1.0
        self._show_gears()

    def demands_per_s(self) -> dict[str, float]:
        """Rows per second that each family needs, as of the last tick."""
        return {name: load.demand_per_s for name, load in self._loads.items()}

    def share(self, family: str) -> float:
        """Share of the device time that a family may use, as of the last tick."""
        return self._loads[family].share

    def on_arrival(self, family: FamilyState, rows: float) -> None:
        """Count a request; rows of another amount of work count as so many plain ones."""
        self._loads[family.name].window.add(asyncio.get_running_loop().time(), rows)

    async def run(self) -> None:
        """Tick forever."""
        loop = asyncio.get_running_loop()
        while True:
            self.tick(loop.time())
            await asyncio.sleep(TICK_S)

    def tick(self, now_s: float) -> None:
        """Decide once; families one after the other, so that no two take what a third one leaves."""
        for family in self._dispatcher.families.values():
            self._shift_gear(family, self._loads[family.name], now_s)
        self._shift_layout(now_s)

    def _shift_gear(self, family: FamilyState, load: _FamilyLoad, now_s: float) -> None:
        rate_per_s, error_per_s = load.window.rate_per_s(now_s)
        load.share = self._available_share(family)
        # with a share of the device time it is as if there were fewer slots
        slots = load.share * (sum(endpoint.slots for endpoint in self._dispatcher.endpoints if endpoint.up) or 1)
        load.demand_per_s = demand_per_s(
            rate_per_s,
            self._dispatcher.queued_work_s(family),
            family.planned_work_s(rate_per_s, slots),
            family.work_per_row_s,
            family.plan.slo_s / 2,
        )
        self._metrics.load(
            family.name, load.demand_per_s, {model: self._dispatcher.queued_rows(model) for model in family.plan.models}
        )
        self._metrics.share(family.name, load.share)
        transition = self._reconciler.transition
        in_force = family.plan.gears_of(self._reconciler.in_force.name)
        gears = [gear for gear in in_force if self._dispatcher.can_serve_in(family, gear)] or in_force
        if transition is not None:
            load.gears = []
            meanwhile = next(gear for gear in family.plan.gears if gear.name == transition.gears[family.name])
            if meanwhile not in gears:  # what it needs is gone with an endpoint
                meanwhile = gears[-1]
            if meanwhile != family.gear:
                self._set_gear(family, meanwhile, "layout")
            return
        demand = load.demand_per_s * load.guaranteed_per_share
        planned = self._plan.standing(self._reconciler.in_force)
        upper_per_s = [gear.upper_rate_per_s * self._surviving_share(family, gear, planned) for gear in gears]
        if in_force != load.gears or family.gear not in gears:
            # Another layout came into force, or no endpoint is left for a model of the gear: the gear for the present
            # demand is right at once.
            direction = "capacity" if in_force == load.gears else "layout"
            load.gears = in_force
            load.low_since_s = -1.0
            self._set_gear(family, gears[covering_rate(upper_per_s, demand)], direction)
            return
        current = gears.index(family.gear)
        wanted, why, load.low_since_s = switch_gear(
            current,
            upper_per_s,
            demand,
            now_s,
            load.low_since_s,
            self._plan.switching.gear_dwell_s,
            error_per_s * load.guaranteed_per_share,
        )
        if why != HOLD:
            self._set_gear(family, gears[wanted], "up" if why == UP else "down")

    def _surviving_share(self, family: FamilyState, gear: Gear, planned: Mapping[str, Mapping[str, int]]) -> float:
        """Share that is left of what a gear was planned for: of the slots for each of its models, the least.

        `planned` is what stands by endpoint and model under the layout in force.
        """
        left = 1.0
        for stage in family.plan.entry(gear.ladder_entry).stages:
            model = family.served(stage.model)
            hosts = [each for each in self._dispatcher.endpoints if planned.get(each.name, {}).get(stage.model)]
            slots = sum(each.slots for each in hosts)
            up = sum(each.slots for each in self._dispatcher.endpoints if each.hosts(model))
            left = min(left, up / slots) if slots else left
        # with nothing left there is no gear to choose
        return left or 1.0

    def _available_share(self, family: FamilyState) -> float:
        """Share of the device time that a family may use: what the gears in force of the others leave."""
        layout = self._reconciler.in_force.name
        needed = 0.0
        for name, other in self._dispatcher.families.items():
            if name != family.name:
                # a degraded gear has no end
                planned_per_s = min(other.gear.upper_rate_per_s, other.plan.max_rate_per_s(layout))
                load = self._loads[name]
                needed += needed_share(load.guaranteed_share, load.demand_per_s, planned_per_s)
        return available_share(family.plan.guaranteed_share, needed)

    def _set_gear(self, family: FamilyState, gear: Gear, direction: str) -> None:
        load = self._loads[family.name]
        _log.info(
            "%s: gear %s -> %s (%s, demand %.1f rows/s on %.0f %% of the device time)",
            family.name, family.gear.name, gear.name, direction, load.demand_per_s, 100.0 * load.share,
        )  # fmt: skip
        self._dispatcher.set_gear(family, gear)
        self._metrics.gear(family.name, [each.name for each in family.plan.gears], gear.name, direction)

    def _shift_layout(self, now_s: float) -> None:
        switching = self._plan.switching
        current = self._layout_names.index(self._reconciler.in_force.name)
        if self._reconciler.transition is not None:
            return
        if self._reconciler.aim != self._reconciler.in_force:
            # One change at a time; a larger layout is given up when the load that called for it is gone.
            aims_up = self._layout_names.index(self._reconciler.aim.name) > current
            if aims_up and self._load_of(current) < switching.layout_down_fraction:
                self._reconciler.aim_at(self._reconciler.in_force)
            return
        wanted, self._layout_wish, self._layout_wish_since_s = switch_layout(
            current,
            len(self._layout_names),
            self._load_of(current),
            self._load_of(current - 1) if current else 0.0,
            now_s,
            self._layout_wish,
            self._layout_wish_since_s,
            switching.layout_up_after_s,
            switching.layout_down_after_s,
            switching.layout_down_fraction,
        )
        if wanted != current:
            self._reconciler.aim_at(self._plan.layouts[wanted])

    def _load_of(self, layout: int) -> float:
        """Largest ratio of a family's demand to what the layout is planned for."""
        return max(
            load.demand_per_s
            * load.guaranteed_per_share
            / self._dispatcher.families[name].plan.max_rate_per_s(self._layout_names[layout])
            for name, load in self._loads.items()
        )

    def _show_gears(self) -> None:
        for name, family in self._dispatcher.families.items():
            self._metrics.gear(name, [gear.name for gear in family.plan.gears], family.gear.name, None)
