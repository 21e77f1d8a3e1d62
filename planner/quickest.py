"""Options for the least latency: which of them answers soonest at which rates.

At low rates a single model may be done before a cascade that asks two; at high rates it is the cascade that is not
busy. So each option is predicted at some rates up to the one that the plan has to reach, may serve up to the highest
of them at which none is quicker, and is worth, at every rate, the less the longer its answers take.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from planner.predict import CHECK
from planner.triggers import trial_gear

if TYPE_CHECKING:
    from collections.abc import Sequence

    from planner.gears import Option
    from planner.predict import Predictor

# the rates that options are compared at are these parts of the highest
_PARTS = 8
# A further gear has a price in planner.gears, in accuracy: at this worth of a whole SLO it has to gain 1 % of the SLO.
_SLO_WORTH = 0.02


def quickest(
    options: Sequence[Option], predictor: Predictor, *, layout: str, slo_s: float, headroom: float, top_per_s: float
) -> list[Option]:
    """Options that are quickest at some rate up to `top_per_s`, in rows per second; all, where none goes so far."""
    if not any(headroom * option.sustained_per_s >= top_per_s for option in options):
        return list(options)
    valued = [_valued(option, predictor, layout, slo_s, headroom, top_per_s) for option in options]
    until_per_s: dict[str, float] = {}
    for rate_per_s in _rates(top_per_s):
        able = [option for option in valued if headroom * option.sustained_per_s >= rate_per_s]
        if able:
            until_per_s[max(able, key=lambda option: option.worth(rate_per_s)).name] = rate_per_s
    return [replace(option, until_per_s=until_per_s[option.name]) for option in valued if option.name in until_per_s]


def _rates(top_per_s: float) -> list[float]:
    return [top_per_s * part / _PARTS for part in range(1, _PARTS + 1)]


def _valued(
    option: Option, predictor: Predictor, layout: str, slo_s: float, headroom: float, top_per_s: float
) -> Option:
    """Give an option the worth of its answers at the rates that it can serve."""
    values = []
    for rate_per_s in _rates(top_per_s):
        # greedy triggers as far as they go, as in the gears
        tuned = next((tuned for tuned in option.tuned if headroom * tuned.sustained_per_s >= rate_per_s), None)
        if tuned is not None:
            gear = trial_gear(tuned.entry, tuned.triggers, layout)
            latency_s = predictor.gear(gear, rate_per_s, CHECK).latency_s
            values.append((rate_per_s, -_SLO_WORTH * latency_s / slo_s))
    return replace(option, tuned=tuple(replace(tuned, values=tuple(values)) for tuned in option.tuned))
