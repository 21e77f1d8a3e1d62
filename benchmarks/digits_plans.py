"""Plans of the digits family by several policies, from the demo's records and profile; drafts, nothing is certified."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cascadeserve.demo.family import FAMILY
from cascadeserve.demo.offline import OfflineTriton, draw_rows
from cascadeserve.demo.plans import GOAL, make_plan, planned_rate_per_s

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from cascadeserve.demo.steps import Steps
    from cascadeserve.gear_plan import Gear, GearPlan, Stage


@dataclass(frozen=True)
class Planned:
    """A plan and where it is."""

    path: Path
    plan: GearPlan

    @property
    def slo_s(self) -> float:
        """Its SLO."""
        return self.plan.families[FAMILY].slo_s

    @property
    def rate_per_s(self) -> float:
        """Rows per second up to which it has gears that are not degraded."""
        return planned_rate_per_s(self.plan)

    @property
    def top_gear(self) -> Gear:
        """The gear at that rate."""
        gears = [gear for gear in self.plan.families[FAMILY].gears if not gear.degraded]
        return max(gears, key=lambda gear: gear.upper_rate_per_s)

    @property
    def top_stages(self) -> tuple[Stage, ...]:
        """The cascade of that gear."""
        return tuple(self.plan.families[FAMILY].entry(self.top_gear.ladder_entry).stages)


async def make_plans(state: Path, policies: Sequence[str], steps: Steps, goal: Path = GOAL) -> dict[str, Planned]:
    """Plans by policy. The state directory may be the demo's, whose records and profile are taken then.

    Raises:
        UsageError: a policy has no plan that meets the goal.

    """
    search, profile = state / "search.npz", state / "profile.json"
    with steps.timed("draw rows"):
        rows = draw_rows(state, "search")
    async with contextlib.AsyncExitStack() as servers:
        offline = OfflineTriton(state, steps, servers)
        await offline.record("search", rows, search)
        await offline.profile(rows, profile)
    made = {}
    with steps.timed("plan"):
        for policy in policies:
            path = state / f"{goal.stem}-{policy}.json"
            options = (f"--policy={policy}", f"--name={policy}")
            plan = await make_plan(path, *options, goal=goal, search=search, profile=profile, calibration=None)
            made[policy] = Planned(path, plan)
    return made
