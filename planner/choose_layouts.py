"""Which layouts a plan has, once the simulator has said what each of them sustains.

Tried is every chain of layouts that were simulated. In the last one the gears are those that go furthest. One before it
serves lower rates only, and has room for other gears then: it may end at any of its entries. Those gears are tiled
first, and built, with all that the simulator has to say, for the chains that would be best with them.
"""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from planner.assemble import make_transitions, needed_of
from planner.expected import DOWN_FRAC, gear_at, rows_at, top_rate_per_s
from planner.rank_layouts import LAYOUT_PRICE

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from cascadeserve.gear_plan import Gear, LadderEntry, Layout, Transition
    from planner.goal import RatePrior
    from planner.layouts import Sites

    # a layout with its gears
    _Geared = tuple[Layout, list[Gear]]

# a layout before another one ends at this share of its highest rate at most, or there is no use in it
_LOWER_FRAC = 0.98
# the layout of a plan that has one
ALL = "all"
# of each length
_MOST_CHAINS = 256


@dataclass(frozen=True)
class Chosen:
    """Layouts by rising rate with their gears, in that order, and the transitions; `sources` names them as they were.

    Where there are several, a gear's name begins with that of its layout.
    """

    sources: tuple[str, ...]
    layouts: tuple[Layout, ...]
    gears: tuple[Gear, ...]
    transitions: tuple[Transition, ...]


@dataclass(frozen=True)
class LowerGears:
    """Gears that a layout may have below another one: as they were tiled; `build` checks them, None: they fail."""

    tiled: list[Gear]
    build: Callable[[], list[Gear] | None]


@dataclass(frozen=True, eq=False)
class _Way:
    """Gears of a layout, and the accuracy [rates] with which it would answer; `build` is there until they are built."""

    layout: Layout
    gears: list[Gear]
    accuracy: NDArray[np.float64]
    build: Callable[[], list[Gear] | None] | None = None

    @property
    def top_per_s(self) -> float:
        return top_rate_per_s(self.gears)


def choose_layouts(
    layouts: Sequence[Layout],
    gears: Mapping[str, Sequence[Gear]],
    lower: Mapping[str, Sequence[LowerGears]],
    spare: Mapping[str, Sequence[Gear]],
    entries: Sequence[LadderEntry],
    prior: RatePrior | None,
    sites: Sites,
    *,
    family: str,
    most: int,
    always: set[str],
) -> Chosen:
    """Choose up to `most` of some layouts by rising rate: the highest rate first, then accuracy over rows.

    `gears`, `lower` and `spare` are by layout; one that has no gears is not chosen. Parts that neither a gear needs nor
    `always` names are not loaded. A layout that cannot become its neighbour is left out; it may do so in one of its
    `spare` gears, which then is the degraded one.
    """
    able = [layout for layout in layouts if layout.name in gears]
    rates, weights = rows_at(prior, max(top_rate_per_s(gears[layout.name]) for layout in able))
    accuracy = {entry.name: entry.accuracy or 0.0 for entry in entries}

    def way(layout: Layout, here: Iterable[Gear], build: Callable[[], list[Gear] | None] | None = None) -> _Way:
        here = list(here)
        found = np.array([accuracy[gear_at(here, rate).ladder_entry] for rate in rates])
        return _Way(layout, here, found, build)

    highest = [way(layout, gears[layout.name]) for layout in able]
    before = [way(layout, here) for layout in able for here in _ended_sooner(gears[layout.name])]
    before += [way(layout, each.tiled, each.build) for layout in able for each in lower.get(layout.name, ())]
    order = itertools.count()

    def ranked(chain: tuple[_Way, ...]) -> tuple[float, float, int, int, tuple[_Way, ...]]:
        return -chain[-1].top_per_s, -_worth(chain, rates, weights), len(chain), next(order), chain

    waiting = [ranked(chain) for chain in _chains(highest, before if most > 1 else [], rates, weights, most)]
    heapq.heapify(waiting)
    while waiting:
        *_, chain = heapq.heappop(waiting)
        unbuilt = next((place for place, each in enumerate(chain) if each.build is not None), None)
        if unbuilt is not None:
            asked = chain[unbuilt]
            built = asked.build() if asked.build is not None else None
            changed = chain if built is None else (*chain[:unbuilt], way(asked.layout, built), *chain[unbuilt + 1 :])
            if built is not None and _rises(changed):
                heapq.heappush(waiting, ranked(changed))
            continue
        geared = [(each.layout, each.gears) for each in chain]
        for each in (geared, *_with_spare(geared, spare)):
            chosen = _joined(each, entries, sites, family, always)
            if chosen is not None:
                return chosen
    raise AssertionError("a layout alone needs no transition")


def _rises(chain: Sequence[_Way]) -> bool:
    return all(low.top_per_s <= _LOWER_FRAC * high.top_per_s for low, high in itertools.pairwise(chain))


def _worth(chain: Sequence[_Way], rates: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    """Accuracy over rows, less the price of every further layout."""
    found = chain[-1].accuracy
    for each in reversed(chain[:-1]):
        found = np.where(rates < DOWN_FRAC * each.top_per_s, each.accuracy, found)
    return float(found @ weights) - LAYOUT_PRICE * (len(chain) - 1)


def _chains(
    highest: Sequence[_Way],
    before: Sequence[_Way],
    rates: NDArray[np.float64],
    weights: NDArray[np.float64],
    most: int,
) -> Iterator[tuple[_Way, ...]]:
    """Chains of layouts whose highest rates rise: of each sort those that are worth more than what they go on from."""
    rows: list[tuple[_Way, ...]] = [(each,) for each in highest]
    yield from rows
    for _ in range(1, most):
        longer = []
        for row in rows:
            worth = _worth(row, rates, weights)
            for each in before:
                chain = (each, *row)
                known = any(each.layout == other.layout for other in row)
                if not known and _rises(chain[:2]) and _worth(chain, rates, weights) > worth:
                    longer.append(chain)
        # there may be thousands, and the best ones go on
        rows = sorted(longer, key=lambda chain: -_worth(chain, rates, weights))[:_MOST_CHAINS]
        yield from rows


def _ended_sooner(gears: Sequence[Gear]) -> Iterator[list[Gear]]:
    """Gears of a layout as they are, and without the highest ones, above which the degraded one begins then."""
    *planned, degraded = gears
    yield list(gears)
    for number in range(len(planned) - 1, 0, -1):
        last = planned[number - 1]
        if last.predicted is not None:
            predicted = msgspec.structs.replace(last.predicted, ended_by="next_layout")
            last = msgspec.structs.replace(last, predicted=predicted)
        above = msgspec.structs.replace(degraded, min_rate_per_s=last.upper_rate_per_s)
        yield [*planned[: number - 1], last, above]


def _with_spare(geared: Sequence[_Geared], spare: Mapping[str, Sequence[Gear]]) -> Iterator[list[_Geared]]:
    """Give one of the layouts another degraded gear."""
    for place, (layout, (*planned, degraded)) in enumerate(geared):
        for gear in spare[layout.name]:
            other = msgspec.structs.replace(gear, min_rate_per_s=degraded.min_rate_per_s)
            yield [*geared[:place], (layout, [*planned, other]), *geared[place + 1 :]]


def _joined(
    geared: Sequence[_Geared],
    entries: Sequence[LadderEntry],
    sites: Sites,
    family: str,
    always: set[str],
) -> Chosen | None:
    """Layouts with names, gears and transitions as a plan has them; None: a transition is missing."""
    by_name = {entry.name: entry for entry in entries}
    used = {stage.model for _, here in geared for gear in here for stage in by_name[gear.ladder_entry].stages}
    parts = always | {part.name for model in used for part in sites.models[model].parts}
    several = len(geared) > 1
    names = [f"layout-{place}" for place in range(1, len(geared) + 1)] if several else [ALL]
    layouts = tuple(
        msgspec.structs.replace(needed_of(layout, parts), name=name)
        for (layout, _), name in zip(geared, names, strict=True)
    )
    renamed = tuple(
        msgspec.structs.replace(gear, layout=name, name=f"{name}.{gear.name}" if several else gear.name)
        for (_, here), name in zip(geared, names, strict=True)
        for gear in here
    )
    transitions = make_transitions(layouts, renamed, entries, sites, family)
    if transitions is None:
        return None
    return Chosen(tuple(layout.name for layout, _ in geared), layouts, renamed, tuple(transitions))
