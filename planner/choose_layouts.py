"""Which layouts a plan has, once the simulator has said what gears each of them can have."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from planner.assemble import make_transitions, needed_of
from planner.expected import accuracy_up_to, top_rate_per_s
from planner.layouts import LAYOUT_PRICE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cascadeserve.gear_plan import Gear, LadderEntry, Layout, Transition
    from planner.goal import RatePrior
    from planner.layouts import Sites

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
    entries: Sequence[LadderEntry],
    prior: RatePrior | None,
    sites: Sites,
    *,
    family: str,
    always: set[str],
) -> Chosen:
    """Choose among `rows` of layouts by rising rate: the highest rate first, then accuracy over rows.

    `gears` is by layout; a row goes without the layouts that have none. Parts that neither a gear needs nor `always`
    names are not loaded. A layout that cannot become its neighbour is left out.
    """
    able = [[layout for layout in row if layout.name in gears] for row in rows]
    able = [row for row in able if row]
    highest = max((row[-1] for row in able), key=lambda layout: top_rate_per_s(gears[layout.name]))
    # what comes before the last layout of a row may also come before the one that goes furthest
    able += [[*row[:-1], highest] for row in able if row[-1] != highest]
    top_per_s = top_rate_per_s(gears[highest.name])
    best: tuple[tuple[float, float], Chosen] | None = None
    seen: list[tuple[str, ...]] = []
    for row in able:
        rising = _rising(row, gears)
        for first in range(len(rising)):
            names = tuple(layout.name for layout in rising[first:])
            if names in seen:
                continue
            seen.append(names)
            chosen = _joined(rising[first:], gears, entries, sites, family, always)
            if chosen is None:
                continue
            accuracy = accuracy_up_to(chosen.gears, entries, prior, top_per_s)
            worth = top_rate_per_s(gears[names[-1]]), accuracy - LAYOUT_PRICE * (len(names) - 1)
            if best is None or worth > best[0]:
                best = worth, chosen
    assert best is not None, "a layout alone needs no transition"
    return best[1]


def _rising(row: Sequence[Layout], gears: Mapping[str, Sequence[Gear]]) -> list[Layout]:
    """Layouts of a row whose highest rates rise, the last one among them."""
    kept = [row[-1]]
    for layout in reversed(row[:-1]):
        if top_rate_per_s(gears[layout.name]) < _LOWER_FRAC * top_rate_per_s(gears[kept[0].name]):
            kept.insert(0, layout)
    return kept


def _joined(
    row: Sequence[Layout],
    gears: Mapping[str, Sequence[Gear]],
    entries: Sequence[LadderEntry],
    sites: Sites,
    family: str,
    always: set[str],
) -> Chosen | None:
    """Layouts with names, gears and transitions as a plan has them; None: a transition is missing."""
    by_name = {entry.name: entry for entry in entries}
    used = {stage.model for layout in row for gear in gears[layout.name] for stage in by_name[gear.ladder_entry].stages}
    parts = always | {part.name for model in used for part in sites.models[model].parts}
    several = len(row) > 1
    names = [f"layout-{place}" for place in range(1, len(row) + 1)] if several else [row[0].name]
    layouts = tuple(
        msgspec.structs.replace(needed_of(layout, parts), name=name) for layout, name in zip(row, names, strict=True)
    )
    renamed = tuple(
        msgspec.structs.replace(gear, layout=name, name=f"{name}.{gear.name}" if several else gear.name)
        for layout, name in zip(row, names, strict=True)
        for gear in gears[layout.name]
    )
    transitions = make_transitions(layouts, renamed, entries, sites, family)
    if transitions is None:
        return None
    return Chosen(tuple(layout.name for layout in row), layouts, renamed, tuple(transitions))
