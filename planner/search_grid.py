"""What cascades of the same models do under every combination of thresholds on a grid, exactly and all at once.

A model's **cuts** are the thresholds it can have: the midpoints between its distinct certainties. A row's **rank** is
the number of cuts at or below its certainty, so that the cut with index i takes the row exactly when rank > i. From
here on thresholds are integers; certainties are not looked at again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from planner.records import ModelAnswers

_LARGEST_THRESHOLD = 1e9  # what cascadeserve.gear_plan.Stage accepts


@dataclass(frozen=True, eq=False)
class RankedAnswers:
    """One model's answers to n rows: cuts float32 [m] rising, rank int64 [n] in 0..m, right bool [n]."""

    cuts: NDArray[np.float32]
    rank: NDArray[np.int64]
    right: NDArray[np.bool_]


@dataclass(frozen=True, eq=False)
class GridOutcome:
    """Cascades of d models on a grid of d - 1 axes, all arrays int64 with the shape of the grid.

    `correct` counts the rows answered right; `reach[k]` counts the rows that reach stage k.
    """

    correct: NDArray[np.int64]
    reach: tuple[NDArray[np.int64], ...]


def cuts_between(certainty: NDArray[np.float32]) -> NDArray[np.float32]:
    """Midpoints between neighbouring distinct certainties [n], rising, float32 [m].

    A cut is a float32 strictly between two certainties, so a JSON double carries it without loss and no rounding makes
    it a value that was seen. Where no float32 lies between two neighbours there is no cut. NaN and infinite
    certainties, and midpoints that no gear plan may hold, make none either.
    """
    values = np.unique(certainty[np.isfinite(certainty)]).astype(np.float64)
    low, high = values[:-1], values[1:]
    middle = ((low + high) / 2).astype(np.float32)
    cuts: NDArray[np.float32] = middle[(low < middle) & (middle < high) & (np.abs(middle) <= _LARGEST_THRESHOLD)]
    return cuts


def ranked(answers: ModelAnswers, truth: NDArray[np.int64]) -> RankedAnswers:
    """Rank the rows of one model; NaN certainty gets rank 0, since no threshold takes it."""
    certainty = np.asarray(answers.certainty, np.float32)
    cuts = cuts_between(certainty)
    rank = np.searchsorted(cuts, certainty, side="right")
    rank[np.isnan(certainty)] = 0
    return RankedAnswers(cuts=cuts, rank=rank, right=answers.label == truth)


def quantile_axis(model: RankedAnswers, size: int) -> NDArray[np.int64]:
    """Indices of at most `size` cuts, rising: all, or the first, the last and those at even quantiles of the rows."""
    if len(model.cuts) <= size:
        return np.arange(len(model.cuts))
    rows = np.sort(model.rank)[np.linspace(0, len(model.rank) - 1, size).astype(np.int64)]
    axis: NDArray[np.int64] = np.unique(np.maximum(rows, 1) - 1)  # the cut just below; stepped certainties share one
    return axis


def on_grid(models: Sequence[RankedAnswers], axes: Sequence[NDArray[np.int64]]) -> GridOutcome:
    """Send all rows through cascades of `models` with every combination of the cuts in `axes`.

    `axes[k]` holds rising indices of cuts of stage k; the last stage has none. A row falls into the cell given by the
    number of cuts on each axis that take it, and the rows a threshold combination lets through all the stages so far
    are those in the cells up to it: cumulative histograms, one per stage, answer for the whole grid without sampling.
    """
    num_rows = len(models[0].rank)
    shape = tuple(len(axis) for axis in axes)
    cell = np.zeros(num_rows, np.int64)
    reach = [np.full(shape, num_rows)]
    correct = np.zeros(shape, np.int64)
    for depth, (model, axis) in enumerate(zip(models, axes, strict=False), start=1):
        cell = cell * (len(axis) + 1) + np.searchsorted(axis, model.rank, side="left")
        reach.append(_over_grid(_cumulative(cell, shape[:depth]), shape))
        right = _cumulative(cell[model.right], shape[:depth])
        correct += _over_grid(right[..., -1:] - right, shape)  # right among those that came, less those sent on
    correct += _over_grid(_cumulative(cell[models[-1].right], shape), shape)
    return GridOutcome(correct=correct, reach=tuple(reach))


def _cumulative(cell: NDArray[np.int64], shape: tuple[int, ...]) -> NDArray[np.int64]:
    """Count of rows in the cells up to and including each cell; `shape` counts cuts, one fewer than cells per axis."""
    cells = tuple(size + 1 for size in shape)
    counts = np.bincount(cell, minlength=int(np.prod(cells))).reshape(cells)
    for axis in range(len(cells)):
        np.cumsum(counts, axis=axis, out=counts)
    return counts


def _over_grid(counts: NDArray[np.int64], shape: tuple[int, ...]) -> NDArray[np.int64]:
    """Drop the last cell of each axis (rows that every cut takes) and repeat over the axes that are still to come."""
    cuts = counts[tuple(slice(size) for size in shape[: counts.ndim])]
    return np.broadcast_to(cuts.reshape(cuts.shape + (1,) * (len(shape) - cuts.ndim)), shape)
