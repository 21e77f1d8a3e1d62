"""Gears of a layout that another one follows at higher rates, and those in which it may become that."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import msgspec

from planner.choose_layouts import LowerGears
from planner.expected import DOWN_FRAC
from planner.gears import build_gears, gears_of, overload_gear, tile
from planner.infeasible import Infeasible

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cascadeserve.gear_plan import Gear
    from planner.gears import Option
    from planner.goal import FamilyGoal, RatePrior
    from planner.predict import Predictor
    from planner.triggers import Tuned


def lower_gears(
    options: Sequence[Option],
    goal: FamilyGoal,
    prior: RatePrior | None,
    predictor: Predictor,
    *,
    layout: str,
    overload: Tuned | None,
) -> list[LowerGears]:
    """For each option the gears that end with it, best for the rates at which the layout is in force then."""
    # it need not reach the rate that is asked for
    goal = msgspec.structs.replace(goal, max_rate_per_s=None)
    found: list[LowerGears] = []
    by_rate = sorted(options, key=lambda option: option.sustained_per_s)
    for number in range(1, len(by_rate) + 1):
        here = by_rate[:number]
        in_force_per_s = DOWN_FRAC * goal.headroom * here[-1].sustained_per_s
        served = prior and tuple((rate, share) for rate, share in prior if rate < in_force_per_s)
        if prior is not None and not served:
            continue
        spans = tile(here, goal, served)
        build = functools.partial(_build, here, goal, served, predictor, layout=layout, overload=overload)
        found.append(LowerGears(gears_of(spans, layout, overload), build))
    return found


def spare_gears(options: Sequence[Option], *, layout: str) -> list[Gear]:
    """Gears of a layout that may be its degraded one, the fastest first."""
    fastest_first = sorted(options, key=lambda option: -option.sustained_per_s)
    return [overload_gear(option.tuned[-1], 0.0, layout) for option in fastest_first]


def _build(
    options: Sequence[Option],
    goal: FamilyGoal,
    prior: RatePrior | None,
    predictor: Predictor,
    *,
    layout: str,
    overload: Tuned | None,
) -> list[Gear] | None:
    try:
        return build_gears(options, goal, prior, predictor, layout=layout, overload=overload)
    except Infeasible:
        return None
