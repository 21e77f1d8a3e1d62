"""The endpoints that cost least among those that reach a rate.

Endpoints of one **sort** (kind of device, slots, memory, cost) can be exchanged: it is only asked how many there are of
each. First some that do are looked for, by taking endpoints from the one that gives most for its cost on down. Then all
numbers that would cost less are tried, the cheapest first. Two kinds need no try: less of some sort and no more of any
other than what was seen to fail; and what full batches of no model make the rate with.
"""

from __future__ import annotations

import heapq
import math
from typing import TYPE_CHECKING

from planner.least import least_count
from planner.profile import batch_busy_s

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from cascadeserve.cluster import Endpoint
    from planner.profile import Profile
    from planner.time_limit import TimeLimit

    # of each sort, how many
    Numbers = tuple[int, ...]

# models side by side may get this much more out of a device than full batches one after the other
_SHARING = 1.25


def cost_of(endpoints: Sequence[Endpoint]) -> tuple[float, int]:
    """Cost per hour, and the number, which decides where that is the same or nobody said what endpoints cost."""
    return math.fsum(endpoint.cost_per_hour for endpoint in endpoints), len(endpoints)


def least_cost(
    endpoints: Sequence[Endpoint],
    profiles: Mapping[str, Profile],
    rate_per_s: float,
    can: Callable[[tuple[Endpoint, ...]], bool],
    limit: TimeLimit,
) -> tuple[Endpoint, ...] | None:
    """Cheapest endpoints, in their order, that `can` reach a rate in rows per second; None: all together cannot.

    `can` is taken to stay true if endpoints are added. Past the `limit` it is the cheapest that was found by then.
    """
    search = _Search(endpoints, profiles, rate_per_s, can)
    prefixes = search.prefixes()
    count = least_count(lambda count: search.tried(prefixes[count]), known=0, most=len(endpoints), limit=limit)
    if count is None:
        return None
    best = search.chosen(prefixes[count])
    for numbers in search.by_cost():
        if cost_of(search.chosen(numbers)) >= cost_of(best) or limit.reached:
            break
        if search.tried(numbers):
            return search.chosen(numbers)
    return best


class _Search:
    """Numbers of endpoints of each sort, and which were seen to fail."""

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        profiles: Mapping[str, Profile],
        rate_per_s: float,
        can: Callable[[tuple[Endpoint, ...]], bool],
    ) -> None:
        self._endpoints = endpoints
        self._rate_per_s = rate_per_s
        self._can = can
        sorts: dict[tuple[str, int, int | None, float], list[Endpoint]] = {}
        for each in endpoints:
            sorts.setdefault((each.kind, each.slots, each.memory_bytes, each.cost_per_hour), []).append(each)
        self._members = list(sorts.values())
        # by model and sort, rows per second of one endpoint; no rate is reached whose rows no model could all begin
        self._most_per_s = [
            [here[0].slots * _most_per_s(profiles[here[0].kind], model) for here in self._members]
            for model in profiles[endpoints[0].kind].models
        ]
        self._failed: list[Numbers] = []

    def chosen(self, numbers: Numbers) -> tuple[Endpoint, ...]:
        """Endpoints in the order of the cluster file, which breaks ties between them."""
        names = {each.name for here, count in zip(self._members, numbers, strict=True) for each in here[:count]}
        return tuple(each for each in self._endpoints if each.name in names)

    def tried(self, numbers: Numbers) -> bool:
        """Whether they reach the rate, by trial if need be."""
        most = max(sum(n * per_s for n, per_s in zip(numbers, row, strict=True)) for row in self._most_per_s)
        if _SHARING * most < self._rate_per_s:
            return False
        if any(all(n <= m for n, m in zip(numbers, other, strict=True)) for other in self._failed):
            return False
        if self._can(self.chosen(numbers)):
            return True
        self._failed.append(numbers)
        return False

    def prefixes(self) -> list[Numbers]:
        """None to all endpoints, one more at a time, those first that give most for what they cost."""
        fastest = max(self._most_per_s, key=sum)
        order = sorted(range(len(self._members)), key=lambda sort: self._members[sort][0].cost_per_hour / fastest[sort])
        found: list[Numbers] = [(0,) * len(self._members)]
        for sort in order:
            for _ in self._members[sort]:
                found.append(_with_one_more(found[-1], sort))
        return found

    def by_cost(self) -> Iterator[Numbers]:
        """All numbers, by rising cost."""
        none = (0,) * len(self._members)
        waiting, seen = [(cost_of(self.chosen(none)), none)], {none}
        while waiting:
            _, numbers = heapq.heappop(waiting)
            yield numbers
            for sort, count in enumerate(numbers):
                more = _with_one_more(numbers, sort)
                if count < len(self._members[sort]) and more not in seen:
                    seen.add(more)
                    heapq.heappush(waiting, (cost_of(self.chosen(more)), more))


def _with_one_more(numbers: Numbers, sort: int) -> Numbers:
    return (*numbers[:sort], numbers[sort] + 1, *numbers[sort + 1 :])


def _most_per_s(profile: Profile, model: str) -> float:
    measured = profile.models[model]
    sizes = {entry.batch for entry in measured.busy}
    return max(rows / batch_busy_s(measured, rows, profile.slots + 1) for rows in sizes)
