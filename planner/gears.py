"""Gears: which ladder entry serves which rates, checked in the simulator.

An entry may serve up to `headroom` times the rate it sustains. Of all ways to tile the rates from 0 to the highest of
these with gears, the one is taken whose rows are answered most accurately (or soonest, see planner.quickest), at the
rates of the goal's prior (without one, every doubling of the rate counts as equally frequent), less a small price per
gear.

A gear must be **wide enough**: the orchestrator estimates the rate from recent arrivals, and a load in the upper part
of a narrow gear would look like one of the next gear now and then, and for the dwell after that be served by it. So a
tenth of a gear's range must be some three standard deviations of that estimate. The simulator has the last
word: as long as it finds a gear restless, that one has to be wider. Room is made at the cost of the gear below, which
then ends before its entry would have to. A gear that stands alone may be as narrow as it must.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import chain, combinations
from types import MappingProxyType
from typing import TYPE_CHECKING

import msgspec

from cascadeserve.gear_plan import Gear
from cascadeserve.plan_evidence import Predicted
from cascadeserve.policy.demand import MAX_WINDOW_S, MIN_WINDOW_S, WINDOW_REQUESTS
from planner.infeasible import Infeasible
from planner.predict import CHECK, WHOLE

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from cascadeserve.plan_evidence import RangeEnd
    from planner.goal import FamilyGoal, RatePrior
    from planner.predict import Prediction, Predictor
    from planner.triggers import Tuned

OVERLOAD = "overload"

_DEVIATIONS = 3.2
_MARGIN_FRAC = 0.1
_ROUNDING = 1e-9
# rows per second; no gear is narrower, whatever the noise
_LEAST_WIDTH_PER_S = 1e-6
# accuracy that a further gear has to gain
GEAR_PRICE = 2e-4
_QUARTERS = (0.25, 0.5, 0.75, 1.0)
# by what a range shrinks if the check of a gear fails, and how often
_SHRINK = 0.95
_TRIES = 12
_AS_THEY_ARE: Mapping[str, float] = MappingProxyType({})
_SURGE_FACTOR = 1.5
# share of the time that a steady load has to stay in its gear; by what, and how far, the gear widens if it does not
_IN_FORCE_FRAC = 0.985
_WIDER = 1.08
_WIDEST = 1.6


@dataclass(frozen=True)
class Option:
    """A ladder entry that may serve, by rising sustained rate: greedy triggers and, maybe, eager ones.

    From `until_per_s` on, in rows per second, another option is better, though this one could serve more.
    """

    tuned: tuple[Tuned, ...]
    until_per_s: float = math.inf

    @property
    def name(self) -> str:
        """Name of the ladder entry."""
        return self.tuned[0].entry.name

    def worth(self, rate_per_s: float) -> float:
        """What an answer is worth at a rate: as a rule the accuracy on the search split."""
        return self.tuned[-1].worth(rate_per_s)

    @property
    def sustained_per_s(self) -> float:
        """Highest rate, in rows per second."""
        return self.tuned[-1].sustained_per_s


@dataclass(frozen=True)
class Span:
    """A range of rates in rows per second and what serves it."""

    low: float
    high: float
    tuned: Tuned


def least_width_per_s(upper_per_s: float, goal: FamilyGoal) -> float:
    """Narrowest range, in rows per second, of a gear that ends at this rate; see the module."""
    low, high = goal.min_rows_per_request, goal.max_rows_per_request
    rows_variance = ((high - low + 1) ** 2 - 1) / 12
    per_request = goal.dispersion * goal.mean_rows**2 + rows_variance
    # at nine tenths of a range that starts at 0
    requests_per_s = (1.0 - _MARGIN_FRAC) * upper_per_s / goal.mean_rows
    window_s = min(max(WINDOW_REQUESTS * goal.dispersion / requests_per_s, MIN_WINDOW_S), MAX_WINDOW_S)
    deviation: float = math.sqrt(requests_per_s * per_request / window_s)
    return _DEVIATIONS * deviation / _MARGIN_FRAC


def tile(
    options: Iterable[Option],
    goal: FamilyGoal,
    prior: RatePrior | None,
    *,
    wider: Mapping[str, float] = _AS_THEY_ARE,
    one_entry: bool = False,
) -> list[Span]:
    """Choose gears for the rates from 0 to the highest that an option can serve, or the goal asks for.

    `wider` is the factor by which the gear of a ladder entry must be wider than the module says. With `one_entry` the
    option that serves the highest rate serves all.

    Raises:
        Infeasible: no option serves the rate that the goal asks for.

    """
    useful = _useful(options, goal)
    top = useful[-1]
    rate_per_s = _upper_per_s(top, goal)
    if goal.max_rate_per_s is not None and rate_per_s < goal.max_rate_per_s:
        raise Infeasible(
            f"the goal asks for {goal.max_rate_per_s:g} rows/s, but {top.name!r}, the fastest entry that is accurate "
            f"enough, serves only {rate_per_s:.0f}; lower max_rate_per_s, or relax the SLO or the accuracy",
            "rate",
        )
    others = [] if one_entry else useful[:-1]
    subsets = chain.from_iterable(combinations(others, size) for size in range(len(others) + 1))
    tilings = [_spans((*subset, top), goal, wider) for subset in subsets]
    wide = [spans for spans in tilings if len(spans) == 1 or all(_is_wide(span, goal, wider) for span in spans)]
    chosen = max(wide, key=lambda spans: (_score(spans, prior), _score(spans, None)))
    return [part for span in chosen for part in _by_triggers(span, useful, goal, wider)]


def _upper_per_s(option: Option, goal: FamilyGoal) -> float:
    upper = min(goal.headroom * option.sustained_per_s, option.until_per_s)
    return upper if goal.max_rate_per_s is None else min(upper, goal.max_rate_per_s)


def _useful(options: Iterable[Option], goal: FamilyGoal) -> list[Option]:
    """Options by rising rate that no other one beats in both rate and worth."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda o: (-_upper_per_s(o, goal), -o.worth(_upper_per_s(o, goal)))):
        end_per_s = _upper_per_s(option, goal)
        if not kept or option.worth(end_per_s) > kept[-1].worth(end_per_s):
            kept.append(option)
    return kept[::-1]


def _spans(options: Sequence[Option], goal: FamilyGoal, wider: Mapping[str, float]) -> list[Span]:
    """Gears of these options, as wide as they must be from the top down; what is left for the lowest may be nothing."""
    spans: list[Span] = []
    high = math.inf
    for option, below in zip(reversed(options), [*reversed(options[:-1]), None], strict=True):
        high = min(high, _upper_per_s(option, goal))
        whole = Span(0.0, high, option.tuned[-1])
        low = 0.0 if below is None else min(high - _least_width_per_s(whole, goal, wider), _upper_per_s(below, goal))
        spans.append(replace(whole, low=low))
        high = low
    return spans[::-1]


def _least_width_per_s(span: Span, goal: FamilyGoal, wider: Mapping[str, float]) -> float:
    return wider.get(span.tuned.entry.name, 1.0) * least_width_per_s(span.high, goal) if span.high > 0.0 else 0.0


def _is_wide(span: Span, goal: FamilyGoal, wider: Mapping[str, float]) -> bool:
    # a range that was made as wide as it must be is that wide but for rounding
    least_per_s = max(_least_width_per_s(span, goal, wider) * (1.0 - _ROUNDING), _LEAST_WIDTH_PER_S)
    return span.low >= 0.0 and span.high - span.low >= least_per_s


def _score(spans: Sequence[Span], prior: RatePrior | None) -> float:
    """Worth over rows, less the price of the gears; rates above the highest are served by the last one."""
    if prior is None:
        # as many rows between any two rates as between two others as far apart
        parts = [(span.high - span.low, span.tuned.worth((span.low + span.high) / 2)) for span in spans]
    else:
        ends = [*(span.high for span in spans[:-1]), math.inf]
        parts = [
            (share * rate, span.tuned.worth(rate))
            for span, end in zip(spans, ends, strict=True)
            for rate, share in prior
            if span.low <= rate < end
        ]
    worth = sum(weight * worth for weight, worth in parts)
    return worth / sum(weight for weight, _ in parts) - GEAR_PRICE * len(spans)


def _by_triggers(span: Span, options: Sequence[Option], goal: FamilyGoal, wider: Mapping[str, float]) -> list[Span]:
    """Greedy triggers as far as they go, since they answer sooner at low rates; eager ones above, if both are wide."""
    option = next(option for option in options if option.name == span.tuned.entry.name)
    greedy = option.tuned[0]
    middle = goal.headroom * greedy.sustained_per_s
    if middle >= span.high:
        return [replace(span, tuned=greedy)]
    parts = [replace(span, high=middle, tuned=greedy), replace(span, low=middle)]
    return parts if middle > span.low and all(_is_wide(part, goal, wider) for part in parts) else [span]


def build_gears(
    options: Sequence[Option],
    goal: FamilyGoal,
    prior: RatePrior | None,
    predictor: Predictor,
    *,
    layout: str,
    overload: Tuned | None = None,
    one_entry: bool = False,
) -> list[Gear]:
    """Gears by rising rate, each checked at the quarters of its range, then the degraded one.

    `overload` serves what is above all ranges; None: the fastest of the gears does. `one_entry` is for `tile`.

    Raises:
        Infeasible: as in `tile`, or a gear fails its checks however it is tried.

    """
    wider: dict[str, float] = {}
    for _ in range(_TRIES):
        spans = _calm_spans(options, goal, prior, predictor, wider, layout, one_entry=one_entry)
        gears = [_gear(span, spans, layout) for span in spans]
        checked = [_checked(gear, span, goal, predictor) for gear, span in zip(gears, spans, strict=True)]
        failed = {id(span.tuned) for gear, span in zip(checked, spans, strict=True) if gear is None}
        if failed:
            options = [_shrunk(option, failed) for option in options]
            continue
        found = [gear for gear in checked if gear is not None]
        found.append(overload_gear(overload or spans[-1].tuned, spans[-1].high, layout))
        if (stuck := _latches(found, predictor)) is None:
            return found
        if all(len(option.tuned) == 1 for option in options):
            raise Infeasible(
                f"after a surge the load of gear {stuck!r} does not bring it back; relax the SLO", "latency"
            )
        # What waits for large batches can look like a backlog; greedy triggers never do.
        options = [replace(option, tuned=option.tuned[:1]) for option in options]
    raise Infeasible(
        "no gear keeps the SLO over its whole range; the profile may be too noisy, or the SLO too tight", "latency"
    )


def _calm_spans(
    options: Sequence[Option],
    goal: FamilyGoal,
    prior: RatePrior | None,
    predictor: Predictor,
    wider: dict[str, float],
    layout: str,
    *,
    one_entry: bool,
) -> list[Span]:
    """Tile so that a steady load stays in its gear; `wider` remembers what that takes, if it can be had."""
    spans = tile(options, goal, prior, wider=wider, one_entry=one_entry)
    while len(spans) > 1:
        restless = _restless(gears_of(spans, layout), predictor)
        before = spans
        while restless is not None and spans == before:
            if wider.get(restless, 1.0) > _WIDEST:
                return spans
            wider[restless] = wider.get(restless, 1.0) * _WIDER
            spans = tile(options, goal, prior, wider=wider, one_entry=one_entry)
        if restless is None:
            break
    return spans


def gears_of(spans: Sequence[Span], layout: str, overload: Tuned | None = None) -> list[Gear]:
    """Gears of some ranges as nobody has checked them, the degraded one last."""
    gears = [_gear(span, spans, layout) for span in spans]
    return [*gears, overload_gear(overload or spans[-1].tuned, spans[-1].high, layout)]


def _gear(span: Span, spans: Sequence[Span], layout: str) -> Gear:
    name = span.tuned.entry.name
    twins = [other for other in spans if other.tuned.entry.name == name]
    return Gear(
        name=name if span is twins[0] else f"{name}.eager",
        layout=layout,
        min_rate_per_s=span.low,
        max_rate_per_s=span.high,
        ladder_entry=name,
        triggers=span.tuned.triggers,
    )


def overload_gear(tuned: Tuned, rate_per_s: float, layout: str) -> Gear:
    """Gear for what is above a rate."""
    return Gear(
        name=OVERLOAD, layout=layout, min_rate_per_s=rate_per_s, max_rate_per_s=None, ladder_entry=tuned.entry.name,
        triggers=tuned.triggers, degraded=True,
    )  # fmt: skip


def _checked(gear: Gear, span: Span, goal: FamilyGoal, predictor: Predictor) -> Gear | None:
    """Gear with its prediction, None if it does not keep the SLO somewhere in its range."""
    found: list[Prediction] = []
    for quarter in _QUARTERS:
        effort = WHOLE if quarter == _QUARTERS[-1] else CHECK
        found.append(predictor.gear(gear, span.low + quarter * (span.high - span.low), effort))
        if not found[-1].keeps:
            return None
    at_end = found[-1]
    predicted = Predicted(
        sustained_rate_per_s=span.tuned.sustained_per_s,
        p50_s=at_end.p50_s,
        p95_s=at_end.p95_s,
        p99_s=at_end.p99_s,
        worst_s=max(prediction.latency_s for prediction in found),
        accuracy=span.tuned.entry.accuracy or 0.0,
        utilisation=at_end.utilisation,
        ended_by=_ended_by(span, goal),
    )
    return msgspec.structs.replace(gear, predicted=predicted)


def _ended_by(span: Span, goal: FamilyGoal) -> RangeEnd:
    """What keeps a range from ending higher."""
    if goal.max_rate_per_s is not None and span.high >= goal.max_rate_per_s:
        return "goal"
    return "sustained" if span.high >= goal.headroom * span.tuned.sustained_per_s else "next_gear"


def _shrunk(option: Option, failed: set[int]) -> Option:
    """Option that claims less of the triggers that failed; eager ones that claim no more than the greedy ones go."""
    tuned = [replace(t, sustained_per_s=t.sustained_per_s * _SHRINK) if id(t) in failed else t for t in option.tuned]
    kept = tuned[:1] + [t for t in tuned[1:] if t.sustained_per_s > tuned[0].sustained_per_s]
    return replace(option, tuned=tuple(kept))


def _restless(gears: Sequence[Gear], predictor: Predictor) -> str | None:
    """Ladder entry of a gear in which a steady load in its upper part does not stay."""
    for gear in gears[:-1]:
        rate_per_s = gear.upper_rate_per_s - _MARGIN_FRAC * (gear.upper_rate_per_s - gear.min_rate_per_s)
        if predictor.share_in_force(gears, rate_per_s) < _IN_FORCE_FRAC:
            return gear.ladder_entry
    return None


def _latches(gears: Sequence[Gear], predictor: Predictor) -> str | None:
    """Name of a gear that is not in force again after a surge, though its load is back."""
    surge_per_s = _SURGE_FACTOR * gears[-1].min_rate_per_s
    for gear in gears[:-1]:
        calm_per_s = (gear.min_rate_per_s + gear.upper_rate_per_s) / 2
        if not predictor.comes_down(gears, calm_per_s, surge_per_s):
            return gear.name
    return None
