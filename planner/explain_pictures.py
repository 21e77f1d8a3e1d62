"""The pictures of the page about a gear plan, as numbers: where what stands. The page's template draws them as SVG.

Horizontally everything is in per cent of the width and vertically in pixels, so a picture fills a phone as well as a
sheet of paper while its text keeps its size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from planner.derived import steady_layout

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cascadeserve.gear_plan import Gear, PlannedFamily
    from planner.derived import LayoutRates

# from blue to amber by rising lightness: told apart by colour-blind readers too, and in grey
_RAMP = ("#2b5c8a", "#5a86a3", "#94a99a", "#c9b26a", "#e3a33b")
_LIGHT_INK, _DARK_INK = "#ffffff", "#1f2328"
# luminance from which dark ink is read better
_BRIGHT = 0.25
# what lies above the highest range is drawn this wide, as a share of it
_ROOM_ABOVE = 0.14
# a band narrower than this, in per cent, has no room for its number
_LEAST_LABELLED = 4.0
_BAND_PX, _GAP_PX, _PANEL_PX, _PRIOR_PX = 34.0, 26.0, 132.0, 34.0
_LABEL_PX = 16.0
_FRONT_PX = 250.0
# of the front: where no work and the dearest entry stand, per cent; what is left free above and below, pixels
_FRONT_LEFT, _FRONT_RIGHT, _FRONT_PAD_PX = 16.0, 94.0, 34.0
_STEPS = (1.0, 2.0, 5.0, 10.0)


@dataclass(frozen=True)
class Mark:
    """How a ladder entry is marked wherever it occurs: number (from 1), colour, and the ink that is read on it."""

    number: int
    fill: str
    ink: str


@dataclass(frozen=True)
class Tick:
    """A label on an axis; `at` in per cent from the left, or pixels from the top."""

    at: float
    label: str


@dataclass(frozen=True)
class Band:
    """A gear's range on the axis of rates, per cent; `level` are the pixels of its latencies."""

    gear: Gear
    mark: Mark
    left: float
    width: float
    level: Level | None

    @property
    def right(self) -> float:
        """Where it ends, per cent."""
        return self.left + self.width

    @property
    def has_room(self) -> bool:
        """Whether its number fits in."""
        return self.width >= _LEAST_LABELLED


@dataclass(frozen=True)
class Level:
    """Latencies of a gear, pixels from the top: at the upper end of its range, and the longest within it."""

    p50: float
    p95: float
    worst: float


@dataclass(frozen=True)
class PriorBar:
    """How often a rate occurs: per cent from the left, pixels high; whether the layout serves it if it is steady."""

    at: float
    height: float
    here: bool


@dataclass(frozen=True)
class Leave:
    """Where a layout is left for another: per cent from the left, the label's pixels from the top, what it says."""

    at: float
    y: float
    label: str
    # the label stands to the left
    before: bool


@dataclass(frozen=True)
class RatePicture:
    """Gears over the rates of a layout; `slo` and what follows are pixels, None without predictions."""

    bands: list[Band]
    ticks: list[Tick]
    prior: list[PriorBar]
    leaves: list[Leave]
    band_top: float
    band_height: float
    axis: float
    slo: float | None
    latency_ticks: list[Tick]

    @property
    def band_bottom(self) -> float:
        """Pixels from the top."""
        return self.band_top + self.band_height


@dataclass(frozen=True)
class Point:
    """A ladder entry in the picture of the front: per cent, pixels."""

    mark: Mark
    name: str
    at: float
    y: float
    is_reference: bool


@dataclass(frozen=True)
class FrontPicture:
    """Accuracy over work; points from much work to little."""

    points: list[Point]
    work_ticks: list[Tick]
    accuracy_ticks: list[Tick]
    axis: float

    @property
    def legs(self) -> list[tuple[Point, Point]]:
        """Neighbours by work."""
        return list(pairwise(self.points))


def marks(count: int) -> list[Mark]:
    """Marks of `count` ladder entries, from the most accurate to the cheapest."""
    made = []
    for index in range(count):
        place = (len(_RAMP) - 1) * index / max(count - 1, 1)
        low = min(int(place), len(_RAMP) - 2)
        parts = [
            start + (end - start) * (place - low)
            for start, end in zip(_channels(_RAMP[low]), _channels(_RAMP[low + 1]), strict=True)
        ]
        fill = "#" + "".join(f"{round(part):02x}" for part in parts)
        made.append(Mark(index + 1, fill, _DARK_INK if _luminance(fill) > _BRIGHT else _LIGHT_INK))
    return made


def _channels(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def _luminance(colour: str) -> float:
    """Relative luminance as WCAG has it."""
    linear: list[float] = [((part / 255 + 0.055) / 1.055) ** 2.4 for part in _channels(colour)]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def step_within(span: float, most: int) -> float:
    """Smallest of 1, 2, 5 times a power of ten that divides `span` into at most `most` parts."""
    power: float = 10.0 ** math.floor(math.log10(span / most))
    return next(factor * power for factor in _STEPS if span / (factor * power) <= most * (1 + 1e-9))


def _multiples(low: float, high: float, step: float) -> list[float]:
    return [number * step for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _plain(value: float) -> str:
    return f"{value:,.0f}" if value >= 1.0 or value == 0.0 else f"{value:.4g}"


def draw_rates(
    family: PlannedFamily,
    layout: str,
    mark_of: Mapping[str, Mark],
    upper_per_s: float,
    rates: Mapping[str, LayoutRates],
) -> RatePicture:
    """Place the gears of a layout on an axis from 0 to `upper_per_s`, the highest rate of all layouts, and a bit.

    `rates` is by layout, in their order.
    """
    gears = family.gears_of(layout)
    whole_per_s = (1.0 + _ROOM_ABOVE) * upper_per_s
    prior = _prior(family, whole_per_s, layout, rates)
    band_top = _PRIOR_PX + 6.0 if prior else 0.0
    band_bottom = band_top + _BAND_PX
    worst_s = max((gear.predicted.worst_s for gear in gears if gear.predicted is not None), default=0.0)
    top_s = 1.12 * max(worst_s, family.slo_s)
    leaves = _leaves(layout, rates, whole_per_s, band_bottom)
    gap_px = max(_GAP_PX, 10.0 + _LABEL_PX * len(leaves))
    axis, slo, latency_ticks = band_bottom + (gap_px if leaves else 0.0), None, []
    if worst_s > 0.0:
        axis = band_bottom + gap_px + _PANEL_PX
        slo = _height(family.slo_s, top_s, axis)
        step_ms = step_within(1e3 * top_s, 3)
        heights = {ms: _height(ms / 1e3, top_s, axis) for ms in _multiples(step_ms, 1e3 * top_s, step_ms)}
        # the SLO's own label stands at the same side
        latency_ticks = [Tick(at, f"{_plain(ms)} ms") for ms, at in heights.items() if abs(at - slo) > _LABEL_PX]
    bands = []
    for gear in gears:
        left = 100.0 * gear.min_rate_per_s / whole_per_s
        right = 100.0 * min(gear.upper_rate_per_s / whole_per_s, 1.0)
        level = None
        if gear.predicted is not None:
            seconds = (gear.predicted.p50_s, gear.predicted.p95_s, gear.predicted.worst_s)
            level = Level(*(_height(each_s, top_s, axis) for each_s in seconds))
        bands.append(Band(gear, mark_of[gear.ladder_entry], left, right - left, level))
    step_per_s = step_within(whole_per_s, 5)
    ticks = [Tick(100.0 * rate / whole_per_s, _plain(rate)) for rate in _multiples(0.0, whole_per_s, step_per_s)]
    return RatePicture(bands, ticks, prior, leaves, band_top, _BAND_PX, axis, slo, latency_ticks)


def _height(value_s: float, top_s: float, axis: float) -> float:
    return axis - _PANEL_PX * value_s / top_s


def _leaves(layout: str, rates: Mapping[str, LayoutRates], whole_per_s: float, band_bottom: float) -> list[Leave]:
    names = list(rates)
    place, mine = names.index(layout), rates[layout]
    found = []
    if place > 0:
        found.append((mine.left_below_per_s, f"below {_plain(mine.left_below_per_s)}: {names[place - 1]}"))
    if place + 1 < len(names):
        found.append((mine.left_above_per_s, f"above {_plain(mine.left_above_per_s)}: {names[place + 1]}"))
    return [
        Leave(
            at=100.0 * rate / whole_per_s,
            y=band_bottom + _LABEL_PX * (line + 1),
            label=label,
            before=rate > whole_per_s / 2,
        )
        for line, (rate, label) in enumerate(found)
    ]


def _prior(family: PlannedFamily, whole_per_s: float, layout: str, rates: Mapping[str, LayoutRates]) -> list[PriorBar]:
    if family.expected is None:
        return []
    most = max(share for _, share in family.expected.rate_prior)
    return [
        PriorBar(100.0 * rate / whole_per_s, max(_PRIOR_PX * share / most, 1.0), steady_layout(rates, rate) == layout)
        for rate, share in family.expected.rate_prior
        if rate <= whole_per_s
    ]


def draw_front(family: PlannedFamily, mark_of: Mapping[str, Mark], work_s: Mapping[str, float]) -> FrontPicture | None:
    """Place ladder entries by device time per row and accuracy; None unless two of them state an accuracy."""
    known = [(entry, entry.accuracy) for entry in family.ladder if entry.accuracy is not None]
    if len(known) < 2:  # noqa: PLR2004 - one point is no front
        return None
    accuracies = [accuracy for _, accuracy in known]
    low, high = min(accuracies), max(accuracies)
    # equal accuracies lie in the middle
    span = max(high - low, 1e-3)
    middle = (low + high) / 2
    low, high = middle - span / 2, middle + span / 2
    inner_px = _FRONT_PX - 2 * _FRONT_PAD_PX
    dearest_s = max(work_s[entry.name] for entry, _ in known)

    def y_of(accuracy: float) -> float:
        return _FRONT_PX - _FRONT_PAD_PX - inner_px * (accuracy - low) / (high - low)

    def at_of(seconds: float) -> float:
        return _FRONT_LEFT + (_FRONT_RIGHT - _FRONT_LEFT) * seconds / dearest_s

    points = [
        Point(
            mark=mark_of[entry.name],
            name=entry.name,
            at=at_of(work_s[entry.name]),
            y=y_of(accuracy),
            is_reference={stage.model for stage in entry.stages} == {family.reference_model},
        )
        for entry, accuracy in sorted(known, key=lambda pair: -work_s[pair[0].name])
    ]
    room = span * _FRONT_PAD_PX / inner_px
    step = step_within(span + 2 * room, 4)
    digits = max(0, -math.floor(math.log10(100.0 * step) + 1e-9))
    accuracy_ticks = [
        Tick(y_of(each), f"{100.0 * each:.{digits}f}%") for each in _multiples(low - room, min(high + room, 1.0), step)
    ]
    step_ms = step_within(1e3 * dearest_s, 5)
    work_ticks = [Tick(at_of(ms / 1e3), _plain(ms)) for ms in _multiples(0.0, 1e3 * dearest_s, step_ms)]
    return FrontPicture(points, work_ticks, accuracy_ticks, _FRONT_PX)


def highest_rate_per_s(family: PlannedFamily, layouts: Sequence[str]) -> float:
    """Highest rate, in rows per second, that any of the layouts is planned for."""
    return max(family.max_rate_per_s(layout) for layout in layouts)
