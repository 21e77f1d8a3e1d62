"""The ladder: the short list of cascades that is certified and that gears choose from.

Seen on logarithmic axes of work and error rate, the Pareto front is a path from dear to cheap, and the ladder is a few
points on it. Both axes are logarithmic because both are felt as ratios: the highest rate of a gear goes with 1 / work,
and half a point of accuracy is much at the top of the front and little at its foot. A **step** is the distance of two
neighbours on the ladder. The ladder is the list with the least sum of squared steps: the largest steps count most, and
what lies beside a step that no cascade can divide is still divided evenly.

Every entry takes a share of delta from the others' certificates. So each also costs what dividing a step of 5 % in two
would save; a front with little on it gets a shorter ladder than `size`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cascadeserve.errors import UsageError
from cascadeserve.gear_plan import LadderEntry
from planner.front import pareto_front

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from numpy.typing import NDArray

    from cascadeserve.gear_plan import Stage
    from planner.search import Candidate

_SMALLEST = 3  # room for the most accurate cascade, the reference model and the cheapest model
_PRICE = np.log(1.05) ** 2 / 2  # of an entry, in squared steps
_ERROR_FLOOR = 1e-3  # added to error rates: few errors or none is no large step
_PLACES = 512  # points of the front that are considered
_MAX_NAME = 128  # characters, as cascadeserve.gear_plan.Name says
_MAX_DECIMALS = 9


def ladder(
    candidates: Sequence[Candidate],
    *,
    reference: str,
    size: int = 12,
    floor: float = 0.0,
    also: Collection[tuple[Stage, ...]] = (),
) -> tuple[LadderEntry, ...]:
    """Choose at most `size` candidates, from the dearest to the cheapest.

    The most accurate candidate, the reference model alone and the cheapest model alone are always among them. All but
    the reference lie on the Pareto front, where accuracy falls along with work; a reference that some cascade beats in
    both stands above that cascade, as the dearer one. So do the candidates whose stages are in `also`, which are always
    among them, too. Below the accuracy `floor` there is only the cheapest model, for when all else is too slow: with a
    goal that is known, the places go where they can be used.

    Raises:
        UsageError: `size` is too small for what must be in it, or the reference model alone is no candidate.

    """
    if size < _SMALLEST:
        raise UsageError(f"a ladder needs room for {_SMALLEST} entries, not {size}: most accurate, reference, cheapest")
    points, must = _places(candidates, reference, floor, also)
    if len(must) > size:
        raise UsageError(f"a ladder of {size} entries has no room for the {len(must)} that must be in it")
    chosen = [points[place] for place in _least_squares(points, must, size)]
    names = entry_names([candidate.stages for candidate in chosen])
    return tuple(
        LadderEntry(name=name, stages=candidate.stages, reach=candidate.reach)
        for name, candidate in zip(names, chosen, strict=True)
    )


def entry_names(cascades: Sequence[Sequence[Stage]]) -> list[str]:
    """Name cascades by their models and thresholds, as in "cnn0.62-resnet", with the decimals that tell them apart."""
    for decimals in range(2, _MAX_DECIMALS + 1):
        names = ["-".join(_stage_name(stage, decimals) for stage in stages) for stages in cascades]
        if len(set(names)) == len(names) and max(map(len, names)) <= _MAX_NAME:
            return names
    return [f"cascade-{number}" for number in range(len(cascades))]


def _stage_name(stage: Stage, decimals: int) -> str:
    if stage.threshold is None:
        return stage.model
    # 0.9996 must not read 1.00, nor 0.0004 read 0.00
    while decimals < _MAX_DECIMALS and round(stage.threshold, decimals).is_integer() > stage.threshold.is_integer():
        decimals += 1
    apart = "_" if stage.model[-1:].isdigit() else ""
    return f"{stage.model}{apart}{stage.threshold:.{decimals}f}"


def _places(
    candidates: Sequence[Candidate], reference: str, floor: float, also: Collection[tuple[Stage, ...]]
) -> tuple[list[Candidate], set[int]]:
    """Candidates that may become entries, from dear to cheap, and the places of those that must."""
    singles = {c.stages[0].model: c for c in candidates if len(c.stages) == 1}
    if reference not in singles:
        raise UsageError(f"the reference model {reference!r} alone is not among the candidates; search it too")
    front = [candidates[i] for i in pareto_front([c.accuracy for c in candidates], [c.work_s for c in candidates])]
    cheapest = min(singles.values(), key=lambda c: (c.work_s, -c.accuracy))
    must = [front[0], singles[reference], cheapest, *(c for c in candidates if c.stages in also)]
    front = [candidate for candidate in front if candidate.accuracy >= floor]
    along = np.concatenate(([0.0], np.cumsum(np.linalg.norm(np.diff(_on_log_axes(front), axis=0), axis=1))))
    # As many equal stretches of the front as there are places; the first point of each stands for it.
    stretches = np.floor(along * (_PLACES / max(along[-1], _ERROR_FLOOR)))
    points = {front[index] for index in np.unique(stretches[: len(front)], return_index=True)[1]}
    in_order = sorted(points.union(must), key=lambda c: (-c.work_s, -c.accuracy))
    return in_order, {in_order.index(candidate) for candidate in must}


def _on_log_axes(points: Sequence[Candidate]) -> NDArray[np.float64]:
    """Logarithms of work and of error rate, float64 [n, 2]."""
    return np.log([(point.work_s, 1.0 - point.accuracy + _ERROR_FLOOR) for point in points]).reshape(-1, 2)


def _least_squares(points: Sequence[Candidate], must: set[int], size: int) -> list[int]:
    """Places, rising, from the first to the last and through all of `must`, at most `size` of them.

    Dynamic programming: best[j] is the least sum of squares and prices over lists of k + 1 places that end at j, for k
    from 0 up; before[k][j] is the place ahead of j in that list. No list passes over a place that must be in it.
    """
    places = np.arange(len(points))
    at = _on_log_axes(points)
    squared_steps = np.sum((at[:, None] - at[None, :]) ** 2, axis=2)
    cost = np.where(places[:, None] < places[None, :], squared_steps + _PRICE, np.inf)
    for place in must:
        cost[:place, place + 1 :] = np.inf
    best = np.where(places == 0, 0.0, np.inf)
    before: list[NDArray[np.int64]] = []
    totals = [best[-1]]
    for _ in range(size - 1):
        through = best[:, None] + cost
        before.append(np.argmin(through, axis=0))
        best = through[before[-1], places]
        totals.append(best[-1])
    chosen = [len(points) - 1]
    for step in reversed(before[: int(np.argmin(totals))]):
        chosen.append(int(step[chosen[-1]]))
    return chosen[::-1]
