"""Cascade search on the search split: which models in which order under which thresholds are worth having.

Enumerated are the subsets of up to `depth` models, each asked from cheap to dear. To ask a model after a dearer one
makes little sense, since the dearer answer is paid for and usually the better one: with `any_order` those cascades are
tried too, and on the real families of tests/planner they move the area under the front by less than 1e-4 of itself.

Single models and cascades of two are tried with every threshold there is. Longer ones start on a grid of cuts at
quantiles of the rows, every combination of which is evaluated exactly (planner.search_grid). Then, round by round, the
grid of each is halved where cascades between two neighbours on its own front could still improve the front of all
(planner.search_ways), until nothing more than `tolerance` is to be gained, or the rounds are spent. The result depends
on nothing but the arguments.

A cascade of which some stage answers no row does what a shorter one does, with more work or under another name; it is
left out. Where no row tells two thresholds apart the higher one is kept: it escalates what has not been seen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import combinations, pairwise, permutations
from typing import TYPE_CHECKING

import numpy as np

from cascadeserve.errors import UsageError
from cascadeserve.gear_plan import LadderEntry, Stage
from planner.cascade_rows import cascade_answers
from planner.search_grid import ranked
from planner.search_ways import Points, Way, search_ways

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from planner.records import HeldOutRecords, SearchRecords


@dataclass(frozen=True)
class Candidate:
    """A cascade and what it does to the rows it was evaluated on.

    `work_s` is device-seconds per entry row; `reach[k]` is the share of entry rows that reaches stage k and
    `answered[k]` the share that stage k answers.
    """

    stages: tuple[Stage, ...]
    accuracy: float
    work_s: float
    reach: tuple[float, ...]
    answered: tuple[float, ...]


def search(
    records: SearchRecords,
    row_work_s: Mapping[str, float],
    *,
    depth: int = 3,
    grid: int = 64,
    tolerance: float = 1e-3,
    rounds: int = 8,
    any_order: bool = False,
) -> list[Candidate]:
    """Find the cascades that no other one beats, and every single model, from the dearest to the cheapest.

    Args:
        records: Rows of the search split.
        row_work_s: Device-seconds that one row costs, by model.
        depth: Largest number of stages.
        grid: Cuts per stage that cascades of three stages and more start from.
        tolerance: What is not worth refining for: a gain in accuracy (fraction) or work (ratio) not above this.
        rounds: How many times the grids may be refined.
        any_order: Also ask a model before one that costs less.

    Raises:
        UsageError: nothing can be searched with these arguments.

    """
    _check(records, row_work_s, depth=depth, grid=grid)
    names = sorted(records.models, key=row_work_s.__getitem__)
    models = {name: ranked(records.models[name], records.truth) for name in names}
    orders = permutations if any_order else combinations
    ways = [
        Way(way, tuple(models[name] for name in way), tuple(row_work_s[name] for name in way))
        for num_stages in range(1, min(depth, len(names)) + 1)
        for way in orders(names, num_stages)
    ]
    front = search_ways(ways, depth=depth, grid=grid, tolerance=tolerance, rounds=rounds)
    found = [_from_point(front, point, ways[front.way[point]], len(records)) for point in range(len(front))]
    singles = [evaluate(records, [Stage(model=name)], row_work_s) for name in names]
    found += [single for single in singles if single not in found]
    return sorted(found, key=lambda candidate: (-candidate.work_s, -candidate.accuracy))


def evaluate(
    records: SearchRecords | HeldOutRecords, stages: Sequence[Stage], row_work_s: Mapping[str, float]
) -> Candidate:
    """Send all rows through one cascade, by the rule that serves (planner.cascade_rows)."""
    entry = LadderEntry(name="evaluated", stages=tuple(stages), reach=(1.0,) * len(stages))
    answers = cascade_answers(entry, records)
    answered = np.bincount(answers.stage, minlength=len(stages))
    reach = np.cumsum(answered[::-1])[::-1].tolist()
    correct = int((answers.label == records.truth).sum())
    return _candidate(stages, correct, reach, [row_work_s[stage.model] for stage in stages], len(records))


def reference_model(records: SearchRecords) -> str:
    """Name the most accurate single model; of equally accurate ones the first, which is the cheapest, of the records.

    Raises:
        UsageError: there is no model.

    """
    if not records.models:
        raise UsageError(f"the records of family {records.family!r} hold no model; record at least one")
    correct = {name: int((answers.label == records.truth).sum()) for name, answers in records.models.items()}
    return max(correct, key=correct.__getitem__)


def _from_point(points: Points, point: int, way: Way, num_rows: int) -> Candidate:
    chosen = points.cut[point]
    thresholds = [float(model.cuts[cut]) for model, cut in zip(way.models[:-1], chosen, strict=False)]
    stages = [Stage(model=name, threshold=t) for name, t in zip(way.names, [*thresholds, None], strict=True)]
    reach = points.reach[point, : len(stages)].tolist()
    return _candidate(stages, int(points.correct[point]), reach, way.work_s, num_rows)


def _candidate(
    stages: Sequence[Stage], correct: int, reach: Sequence[int], row_work_s: Sequence[float], num_rows: int
) -> Candidate:
    """Turn counts of rows, `reach[k]` of `num_rows` reaching stage k, into shares."""
    return Candidate(
        stages=tuple(stages),
        accuracy=correct / num_rows,
        work_s=sum(rows / num_rows * work_s for rows, work_s in zip(reach, row_work_s, strict=True)),
        reach=tuple(rows / num_rows for rows in reach),
        answered=tuple((before - after) / num_rows for before, after in pairwise([*reach, 0])),
    )


def _check(records: SearchRecords, row_work_s: Mapping[str, float], *, depth: int, grid: int) -> None:
    if not len(records) or not records.models:
        raise UsageError(f"the search records of family {records.family!r} are empty; record rows and models first")
    if depth < 1 or grid < 1:
        raise UsageError(f"a search needs a depth and a grid of at least 1, not {depth} and {grid}")
    for name in records.models:
        work_s = row_work_s.get(name, math.nan)
        if not 0.0 < work_s < math.inf:
            raise UsageError(f"model {name!r} needs a work per row above 0 s to be searched, not {work_s}; profile it")
