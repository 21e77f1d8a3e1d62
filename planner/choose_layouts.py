"""Which layouts a plan has, once the simulator has said what gears each of them can have."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise, product
from typing import TYPE_CHECKING

import msgspec

from planner.assemble import make_transitions, needed_of
from planner.expected import accuracy_up_to, top_rate_per_s
from planner.layouts import LAYOUT_PRICE

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from cascadeserve.gear_plan import Gear, LadderEntry, Layout, Transition
    from planner.goal import RatePrior
    from planner.layouts import Sites

    # a layout with its gears
    _Geared = tuple[Layout, list[Gear]]

# a layout before another one ends at this share of its highest rate at most, or there is no use in it
_LOWER_FRAC = 0.98


@dataclass(frozen=True)
class Chosen:
    """Layouts by rising rate with their gears, in that order, and the transitions; `sources` names them as they were.

    Where there are several, a gear's name begins with that of its layout.
    """

    sources: tuple[str, ...]
    layouts: tuple[Layout, ...]
    gears: tuple[Gear, ...]
    transitions: tuple[Transition, ...]


def choose_layouts(
    rows: Sequence[Sequence[Layout]],
    gears: Mapping[str, Sequence[Gear]],
    spare: Mapping[str, Sequence[Gear]],
    entries: Sequence[LadderEntry],
    prior: RatePrior | None,
    sites: Sites,
    *,
    family: str,
    most: int,
    always: set[str],
) -> Chosen:
    """Choose among `rows` of up to `most` layouts by rising rate: the highest rate first, then accuracy over rows.

    `gears` is by layout; a row goes without the layouts that have none. Parts that neither a gear needs nor `always`
    names are not loaded. A layout that cannot become its neighbour is left out; it may do so in one of its `spare`
    gears, which then is the degraded one.
    """
    able = [[layout for layout in row if layout.name in gears] for row in rows]
    able = [row for row in able if row]
    highest = max((row[-1] for row in able), key=lambda layout: top_rate_per_s(gears[layout.name]))
    # what comes before the last layout of a row may also come before the one that goes furthest
    able += [[*row[:-1], highest] for row in able if row[-1] != highest]
    top_per_s = top_rate_per_s(gears[highest.name])
    found: dict[tuple[tuple[str, int], ...], tuple[float, float, list[_Geared]]] = {}
    for row in able:
        for first in range(max(len(row) - most, 0), len(row)):
            for geared in _ways(row[first:], gears):
                joined = [gear for _, here in geared for gear in here]
                accuracy = accuracy_up_to(joined, entries, prior, top_per_s) - LAYOUT_PRICE * (len(geared) - 1)
                key = tuple((layout.name, len(here)) for layout, here in geared)
                found[key] = top_rate_per_s(geared[-1][1]), accuracy, geared
    for _, _, geared in sorted(found.values(), key=lambda each: (-each[0], -each[1], len(each[2]))):
        for way in (geared, *_with_spare(geared, spare)):
            chosen = _joined(way, entries, sites, family, always)
            if chosen is not None:
                return chosen
    raise AssertionError("a layout alone needs no transition")


def _ways(row: Sequence[Layout], gears: Mapping[str, Sequence[Gear]]) -> Iterator[list[_Geared]]:
    """Gears of layouts whose highest rates rise: of all but the last also the lower ones only, and the rest above."""
    *lower, last = row
    for chosen in product(*([(layout, here) for here in _ended_sooner(gears[layout.name])] for layout in lower)):
        geared = [*chosen, (last, list(gears[last.name]))]
        tops = [top_rate_per_s(here) for _, here in geared]
        if all(low <= _LOWER_FRAC * high for low, high in pairwise(tops)):
            yield geared


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
    names = [f"layout-{place}" for place in range(1, len(geared) + 1)] if several else [geared[0][0].name]
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
