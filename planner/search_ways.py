"""The front while it is being searched: which thresholds each order of models has contributed, and where to look next.

A **way** is an ordered choice of models; a cascade is a way and the index of a cut for each stage but the last.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import reduce
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from planner.front import pareto_front
from planner.search_grid import on_grid, quantile_axis

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from planner.search_grid import RankedAnswers

_MAX_CELLS = 2**18  # combinations of thresholds evaluated at once: some 20 MB and 40 ms
_CUTS_PER_POINT = 5  # on each axis in refinement: its own, its two neighbours, and one on the way to each of these


@dataclass(frozen=True, eq=False)
class Points:
    """p cascades of up to `depth` stages, from the most accurate to the cheapest where they form a front.

    way int64 [p] is the index of the way; cut int64 [p, depth] the indices of its cuts, reach int64 [p, depth] the rows
    that reach each stage, both 0 behind the last stage; correct int64 [p] the rows answered right; work_s float64 [p]
    device-seconds per entry row.
    """

    way: NDArray[np.int64]
    cut: NDArray[np.int64]
    reach: NDArray[np.int64]
    correct: NDArray[np.int64]
    work_s: NDArray[np.float64]

    @classmethod
    def none(cls, depth: int) -> Points:
        """No cascade at all."""
        flat, deep = np.zeros(0, np.int64), np.zeros((0, depth), np.int64)
        return cls(flat, deep, deep, flat, np.zeros(0))

    def __len__(self) -> int:
        """Return the number of cascades."""
        return len(self.way)

    def front_with(self, others: Points) -> Points:
        """Front of both; where two cascades come to the same, the one that was here first stays."""
        columns = {
            field.name: np.concatenate((getattr(self, field.name), getattr(others, field.name)))
            for field in fields(self)
        }
        kept = pareto_front(columns["correct"], columns["work_s"])
        return Points(**{name: column[kept] for name, column in columns.items()})

    def most_correct(self, work_s: NDArray[np.float64]) -> NDArray[np.int64]:
        """Rows that this front answers right for at most each amount of work [...]; -1 where nothing is so cheap."""
        rising = np.concatenate(([-1], self.correct[::-1]))
        return rising[np.searchsorted(self.work_s[::-1], work_s, side="right")]

    def room(self, best: Points, num_rows: int) -> NDArray[np.float64]:
        """What refining around each point of this front, [p], may add to the front `best` of all cascades.

        Between two neighbours no cascade is expected to be more accurate than the dearer or cheaper than the cheaper
        one. The room is what a cascade as good as that would add to `best`: accuracy for its work (a fraction) or less
        work for its accuracy (the logarithm of a ratio), whichever is more. A point has that of its better side.
        """
        correct, work_s = self.correct[:-1], self.work_s[1:]
        gained = (correct - best.most_correct(work_s)) / num_rows
        least_s = best.work_s[::-1][np.searchsorted(best.correct[::-1], correct, side="left")]
        between = np.maximum(gained, np.log(least_s / work_s))
        return np.maximum(np.concatenate(([0.0], between)), np.concatenate((between, [0.0])))


@dataclass(frozen=True, eq=False)
class Way:
    """Models in the order in which a cascade asks them, and the device-seconds one row costs each."""

    names: tuple[str, ...]
    models: tuple[RankedAnswers, ...]
    work_s: tuple[float, ...]

    @property
    def largest_axis(self) -> int:
        """Number of cuts per stage at which the grid is as large as it may be."""
        return int(_MAX_CELLS ** (1 / max(1, len(self.models) - 1)))

    def first_axes(self, grid: int) -> list[NDArray[np.int64]]:
        """Cuts to start from: every one for two stages, otherwise at most `grid` per stage."""
        size = self.largest_axis if len(self.models) <= 2 else min(grid, self.largest_axis)  # noqa: PLR2004
        return [quantile_axis(model, size) for model in self.models[:-1]]

    def points(self, axes: Sequence[NDArray[np.int64]], own: Points, index: int) -> Points:
        """Cascades on the grid of `axes` that this way's `own` front so far does not beat; `index` is the way's."""
        outcome = on_grid(self.models, axes)
        num_rows = len(self.models[0].rank)
        answering = np.asarray(outcome.reach[-1] > 0)
        for before, after in pairwise(outcome.reach):
            answering &= before > after
        work_s = np.zeros(answering.shape)
        for rows, row_work_s in zip(outcome.reach, self.work_s, strict=True):
            work_s += rows / num_rows * row_work_s  # the arithmetic of search.Candidate, to the last bit
        # From the highest thresholds to the lowest, so that the higher one is first where two come to the same.
        kept = np.flatnonzero(answering & (outcome.correct > own.most_correct(work_s)))[::-1]
        kept = kept[pareto_front(outcome.correct.reshape(-1)[kept], work_s.reshape(-1)[kept])]
        cut, reach = np.zeros((2, len(kept), own.cut.shape[1]), np.int64)
        places = np.unravel_index(kept, work_s.shape) if axes else ()  # a single model has no axis
        for stage, (axis, place) in enumerate(zip(axes, places, strict=True)):
            cut[:, stage] = axis[place]
        for stage, rows in enumerate(outcome.reach):
            reach[:, stage] = rows.reshape(-1)[kept]
        way = np.full(len(kept), index)
        return Points(way, cut, reach, outcome.correct.reshape(-1)[kept], work_s.reshape(-1)[kept])

    def finer_axes(
        self, tried: Sequence[NDArray[np.int64]], cut: NDArray[np.int64], room: NDArray[np.float64]
    ) -> list[NDArray[np.int64]]:
        """Halve the axes tried so far around cascades `cut` [p, depth] that have `room` [p]; empty if nothing is new.

        Those with the most room come first when not all fit into one grid.
        """
        widest = np.argsort(-room, kind="stable")[: max(1, self.largest_axis // _CUTS_PER_POINT)]
        axes = []
        for stage, axis in enumerate(tried):
            used, num_cuts = cut[widest, stage], len(self.models[stage].cuts)
            ends = np.concatenate(([-1], axis, [num_cuts]))
            below = ends[np.searchsorted(ends, used, side="left") - 1]
            above = ends[np.searchsorted(ends, used, side="right")]
            around = np.concatenate((below, (below + used) // 2, used, (used + above) // 2, above))
            axes.append(np.unique(around[(around >= 0) & (around < num_cuts)]))
        return axes if any(not np.isin(axis, old).all() for axis, old in zip(axes, tried, strict=True)) else []


def search_ways(ways: Sequence[Way], *, depth: int, grid: int, tolerance: float, rounds: int) -> Points:
    """Front of all cascades of `ways`, as planner.search describes it; all ways have at most `depth` models."""
    num_rows = len(ways[0].models[0].rank)
    tried = [way.first_axes(grid) for way in ways]
    own = [
        way.points(axes, Points.none(depth), index) for index, (way, axes) in enumerate(zip(ways, tried, strict=True))
    ]
    best = reduce(Points.front_with, own)
    for _ in range(rounds):
        refined = False
        for index, way in enumerate(ways):
            room = own[index].room(best, num_rows)
            wide = room > tolerance
            axes = way.finer_axes(tried[index], own[index].cut[wide], room[wide]) if wide.any() else []
            if axes:
                refined = True
                tried[index] = [np.union1d(old, new) for old, new in zip(tried[index], axes, strict=True)]
                found = way.points(axes, own[index], index)
                own[index], best = own[index].front_with(found), best.front_with(found)
        if not refined:
            break
    return best
