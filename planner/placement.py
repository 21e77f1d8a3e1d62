"""Placement: which models stand with how many instances on which endpoints, and how the load is split over them.

What is wanted, each within what the former leaves open:

1. the busiest device, under the load that makes it so, as idle as possible. A limit on utilisation is tried, halving
   the range, until it is known within a fourth of the tolerance; what is then held is within the whole of it.
2. if something stands already, as few moves from there as possible, weighted by their load times; and few instances,
   weighted by their memory, of which a hundred count as much as one move.
3. the load spread evenly, as `planner.load_split` says.

The first two are mixed-integer programs over the patterns of an endpoint. The first is exact as long as these are few
(`planner.patterns.MOST_PATTERNS`). The second is within a thousandth of the least cost, or the best that was found
where the proof takes long; where endpoints of many sorts have many patterns, it takes the cheapest of each sort. The
same question has the same answer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from planner.load_split import SLACK, LoadSplit, least_utilisation, split_load
from planner.patterns import alike, fullest, patterns, undominated
from planner.placement_inputs import Problem
from planner.placement_program import Program
from planner.unplaced import Unplaced, why_unplaced

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from planner.patterns import Alike
    from planner.placement_inputs import EndpointRoom, Instances, Load, Part

# utilisation that may be given up for fewer moves and instances, as a share of it: no profile is more exact
TOLERANCE = 0.01
# what a move costs beside the load time, and what an instance costs that need not stand, in seconds of load time
_MOVE_S = 0.1
_INSTANCE_S = 1e-3
# below it a device is idle
_LEAST_UTILISATION = 1e-9
# patterns of all groups that moves and instances are chosen from, and of each group in any case
_MOST_PATTERNS = 512
_LEAST_PATTERNS = 16


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Instances by endpoint and part, and how each load is split over them, in the order of the loads."""

    instances: dict[str, dict[str, int]]
    splits: tuple[LoadSplit, ...]

    @property
    def busiest(self) -> float:
        """Utilisation of the busiest device under any of the loads."""
        return max((level for split in self.splits for level in split.utilisation.values()), default=0.0)


def place(
    endpoints: Sequence[EndpointRoom],
    loads: Sequence[Load],
    *,
    former: Instances | None = None,
    most_utilisation: float = 1.0,
    tolerance: float = TOLERANCE,
) -> Placement | Unplaced:
    """Place models so that each of the loads can be carried, one at a time; `former` is what stands now.

    No device is busier than `most_utilisation`, a share of its slots of at most 1. The busiest is within `tolerance`,
    a share, of the least that it could be.

    Raises:
        ValueError: a name is used twice, or for two different things.
        UsageError: there are too many ways to fill an endpoint.

    """
    problem = Problem(tuple(endpoints), tuple(loads))
    found = _least_utilisation(problem, most_utilisation, tolerance / 4)
    if found is None:
        return why_unplaced(problem, most_utilisation)
    least, full = found
    held = min(max(least, _LEAST_UTILISATION) * (1.0 + tolerance / 2), most_utilisation)
    instances = _with_few_moves(problem, held, former, full) or full
    splits = []
    for load in problem.loads:
        split = split_load(instances, endpoints, load, most_utilisation=max(held, least))
        assert split is not None, "the instances are such that there is one"
        splits.append(split)
    return Placement(instances={name: dict(counts) for name, counts in instances.items()}, splits=tuple(splits))


def _least_utilisation(problem: Problem, most: float, ratio: float) -> tuple[float, Instances] | None:
    """Least utilisation of the busiest device, up to a ratio, and instances that have it; None: it exceeds `most`.

    Only the fullest patterns are looked at: instances that are not needed do no harm here.
    """
    groups = alike(problem.endpoints, problem.parts, {})
    full = [fullest(patterns(group, problem.parts), group, problem.parts) for group in groups]
    low = max(_bound(problem), _LEAST_UTILISATION)
    best: tuple[float, Instances] | None = None
    tried = min(low * (1.0 + ratio), most)  # the bound itself can often be met
    while True:
        found = _within(problem, groups, full, tried)
        if found is not None and (best is None or found[0] < best[0]):
            best = found
        elif tried >= most:
            return None
        else:
            low = max(low, tried)
        if best is None:
            tried = most
        elif best[0] <= low * (1.0 + ratio):
            return best
        else:
            tried = math.sqrt(low * best[0])


def _bound(problem: Problem) -> float:
    """Utilisation if memory were no limit."""
    everywhere = {
        each.name: {part.name: each.slots for part in problem.parts if each.kind in part.memory_bytes}
        for each in problem.endpoints
    }
    return _busiest(problem, everywhere)


def _busiest(problem: Problem, instances: Instances) -> float:
    """Utilisation of the busiest device under any of the loads, each split as well as can be."""
    return max((least_utilisation(instances, problem.endpoints, load) for load in problem.loads), default=0.0)


def _within(
    problem: Problem, groups: Sequence[Alike], full: Sequence[NDArray[np.int64]], utilisation: float
) -> tuple[float, Instances] | None:
    """Instances with which no device need be busier, and how busy the busiest is then; None: there are none."""
    choice = Program(problem, groups, full, utilisation).solve()
    if choice is None:
        return None
    instances = choice.instances(groups, full, [part.name for part in problem.parts])
    busiest = _busiest(problem, instances)
    return (busiest, instances) if busiest <= utilisation * (1.0 + SLACK) else None


def _with_few_moves(
    problem: Problem, utilisation: float, former: Instances | None, known: Instances
) -> dict[str, dict[str, int]] | None:
    """Instances within a utilisation with the fewest moves and few instances; None: nothing was found.

    Where there are many groups, it is chosen from the cheapest patterns of each, and those that are `known` to do.
    """
    groups = alike(problem.endpoints, problem.parts, former or {})
    most = max(_MOST_PATTERNS // len(groups), _LEAST_PATTERNS)
    ways, costs = [], []
    for group in groups:
        counts = patterns(group, problem.parts)
        cost = _costs(group, counts, problem.parts, is_former=former is not None)
        keeps = undominated(counts, cost)
        keeps[keeps] = np.argsort(np.argsort(cost[keeps], kind="stable")) < most
        for there in {tuple(known[name].get(part.name, 0) for part in problem.parts) for name in group.names}:
            keeps |= (counts == there).all(axis=1)
        ways.append(counts[keeps])
        costs.append(cost[keeps])
    choice = Program(problem, groups, ways, utilisation).solve(costs)
    if choice is None:
        return None
    instances = choice.instances(groups, ways, [part.name for part in problem.parts])
    return instances if _busiest(problem, instances) <= utilisation * (1.0 + SLACK) else None


def _costs(group: Alike, counts: NDArray[np.int64], parts: Sequence[Part], *, is_former: bool) -> NDArray[np.float64]:
    """Cost of each pattern for an endpoint of a group, in seconds [patterns].

    A move is a part whose count changes. An instance costs as much as another one, and as much again if it holds as
    much memory as the largest there is.
    """
    sizes = np.array([part.memory_bytes.get(group.kind, 0) for part in parts])
    largest = max((size for part in parts for size in part.memory_bytes.values()), default=0) or 1
    costs = np.asarray(counts @ (1.0 + sizes / largest)) * _INSTANCE_S
    if is_former:
        load_s = np.array([part.load_s.get(group.kind, 0.0) for part in parts])
        standing = np.array(group.standing)
        costs = costs + (counts != standing) @ np.full(len(parts), _MOVE_S) + (counts > standing) @ load_s
    return costs
