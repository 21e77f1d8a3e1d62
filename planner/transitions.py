"""Transitions: ordered steps from one placement to another, under load.

At every moment the memory of every endpoint suffices, every model in use stands on an endpoint at least, and the
weakest moment is as strong as it can be. What grows goes first where memory allows it, else growth and shrinkage
alternate, by single instances if need be. Where two models wait for each other's room, one of them stands for a while
on an endpoint where neither placement has it: a detour.

Up to EXACT_DIFFERENCES counts that differ, the order is searched exactly (A*): the best of all orders without a detour,
by the weakest moment up to the rate that is to be kept, then by time spent loading, number of steps and growth before
shrinkage; with detours only if there is no order without. Beyond, or where the search grows too large, it is greedy:
whatever can grow does; else what shrinks is chosen by the capacity that it leaves and by what can then grow in its
room; and where nothing can shrink, a search looks ahead for a way to be done with one count more.
"""

from __future__ import annotations

import heapq
import itertools
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from planner.placement_inputs import distinct_parts
from planner.transition_world import World

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence

    from planner.placement_inputs import EndpointRoom, Instances, ModelLoad, Part
    from planner.transition_world import Cell, Cost, State

EXACT_DIFFERENCES = 10
# of one search
_MOST_STATES = 2000


@dataclass(frozen=True)
class Step:
    """Bring `part` at `endpoint` from `present` to `wanted` instances; 0 means not loaded."""

    endpoint: str
    part: str
    present: int
    wanted: int

    @property
    def action(self) -> Literal["load", "set count", "unload"]:
        """What Triton is asked for; an unload waits until the part is drained."""
        if self.present == 0:
            return "load"
        return "unload" if self.wanted == 0 else "set count"


@dataclass(frozen=True, kw_only=True)
class Transition:
    """Steps, one after the other; how long their loads take; the capacity of the weakest moment in rows per second.

    `exact` says that no other order is better in the sense of this module.
    """

    steps: tuple[Step, ...]
    duration_s: float
    least_capacity_per_s: float
    exact: bool


@dataclass(frozen=True)
class NoTransition:
    """There is no order of steps, or none was found, and why."""

    sentence: str

    def __str__(self) -> str:
        return self.sentence


class _TooLarge(Exception):  # noqa: N818 - named by what happened
    """A search has seen too many states."""


def transition(
    former: Instances,
    target: Instances,
    endpoints: Sequence[EndpointRoom],
    models: Sequence[ModelLoad],
    *,
    others: Sequence[Part] = (),
    rate_per_s: float = math.inf,
) -> Transition | NoTransition:
    """Find the steps from one placement to another.

    `models` are those in use meanwhile, with the reach that is then in force; one that stands nowhere yet is not in
    use. `others` are parts that only other models have. `rate_per_s` rows that enter are to be carried all the while;
    capacity beyond that is worth nothing. Instances on endpoints that are not given are left alone.

    Raises:
        ValueError: two different parts have one name, or a part that stands or is to stand is not given.

    """
    parts = {part.name: part for part in distinct_parts([*(p for m in models for p in m.parts), *others])}
    for each in endpoints:
        for name in (*former.get(each.name, {}), *target.get(each.name, {})):
            if name not in parts:
                raise ValueError(f"{name!r} is named on endpoint {each.name!r}, but is no part that is given")
    in_use = [model for model in models if _stands(model, former, endpoints)]
    impossible = _impossible(target, endpoints, in_use, parts)
    if impossible is not None:
        return NoTransition(impossible)
    world = World(former, target, endpoints, in_use, parts, rate_per_s)
    path, exact = _path(world)
    if path is None:
        return NoTransition(_why_none(former, target, endpoints, in_use, parts))
    steps = tuple(_step(world.cells, before, after) for before, after in itertools.pairwise(path))
    kinds = {each.name: each.kind for each in endpoints}
    return Transition(
        steps=steps,
        duration_s=sum(
            parts[step.part].load_s.get(kinds[step.endpoint], 0.0) for step in steps if step.wanted > step.present
        ),
        least_capacity_per_s=min(map(world.capacity_per_s, path)),
        exact=exact,
    )


def _stands(model: ModelLoad, instances: Instances, endpoints: Sequence[EndpointRoom]) -> bool:
    return any(model.stands(instances.get(each.name, {}), each.kind) for each in endpoints)


def _impossible(
    target: Instances, endpoints: Sequence[EndpointRoom], in_use: Sequence[ModelLoad], parts: Mapping[str, Part]
) -> str | None:
    """Why no steps could lead to the target."""
    for each in endpoints:
        over = _over_bytes(each, [target], parts)
        if over > 0:
            return f"the target needs {over:,} bytes more memory than endpoint {each.name!r} has; place anew"
    for model in in_use:
        if not _stands(model, target, endpoints):
            return (
                f"model {model.name!r} is in use, but stands nowhere in the target; shift to a gear without it before, "
                "or keep it"
            )
    return None


def _over_bytes(endpoint: EndpointRoom, placements: Sequence[Instances], parts: Mapping[str, Part]) -> int:
    """Memory that is missing for the largest count of each part among some placements."""
    if endpoint.memory_bytes is None:
        return 0
    there = [each.get(endpoint.name, {}) for each in placements]
    sizes = {name: part.memory_bytes.get(endpoint.kind, 0) for name, part in parts.items()}
    needed = sum(max(counts.get(name, 0) for counts in there) * size for name, size in sizes.items())
    return needed - endpoint.memory_bytes


def _path(world: World) -> tuple[list[State] | None, bool]:
    """States from start to goal; whether that was searched exactly."""
    if world.num_differences <= EXACT_DIFFERENCES:
        try:
            for detours in (False, True):
                path = _strongest(world, world.start, lambda state: state == world.goal, detours=detours)
                if path is not None:
                    return path, True
        except _TooLarge:
            pass
        else:
            return None, True
    return _greedy(world), False


def _strongest(world: World, start: State, done: Callable[[State], bool], *, detours: bool) -> list[State] | None:
    """Find the cheapest of the paths whose weakest state is strongest.

    What is asked of every state starts at what is hoped for. A search that fails has looked at all that can be reached
    without a weaker state; one of those that it turned down has to be passed, so the strongest of them is asked next.
    """
    least_per_s = world.hoped_per_s
    while True:
        path, turned_down = _cheapest(world, start, done, least_per_s, detours=detours)
        if path is not None or not turned_down:
            return path
        least_per_s = _strongest_of(world, turned_down)


def _cheapest(
    world: World, start: State, done: Callable[[State], bool], least_per_s: float, *, detours: bool
) -> tuple[list[State] | None, set[State]]:
    """A* over states that carry a rate; also the states next to them that do not."""
    spent: dict[State, Cost] = {start: (0, 0, 0)}
    before: dict[State, State] = {}
    seen: set[State] = set()
    turned_down: set[State] = set()
    order = itertools.count()
    # of equally cheap ways, the one that is nearest to its end goes on
    open_states = [((*world.to_do(start), 0), world.to_do(start)[1], next(order), start)]
    while open_states:
        _, _, _, state = heapq.heappop(open_states)
        if state in seen:
            continue
        seen.add(state)
        # asked as late as here, since it takes a linear program
        if state != start and not world.carries(state, least_per_s):
            turned_down.add(state)
            continue
        if done(state):
            return _back(before, state), turned_down
        if len(seen) > _MOST_STATES:
            raise _TooLarge
        load_us, steps, early = spent[state]
        for after, step in world.moves(state, detours=detours):
            cost = (load_us + step[0], steps + step[1], early + step[2])
            if after in seen or (after in spent and spent[after] <= cost):
                continue
            spent[after], before[after] = cost, state
            rest_us, rest = world.to_do(after)
            heapq.heappush(open_states, ((cost[0] + rest_us, cost[1] + rest, cost[2]), rest, next(order), after))
    return None, turned_down


def _strongest_of(world: World, states: Collection[State]) -> float:
    """Capacity of the strongest of some states."""
    strongest = 0.0
    for state in sorted(states, key=world.at_most_per_s, reverse=True):
        if world.at_most_per_s(state) <= strongest:
            break
        strongest = max(strongest, world.capacity_per_s(state))
    return strongest


def _back(before: Mapping[State, State], state: State) -> list[State]:
    path = [state]
    while path[-1] in before:
        path.append(before[path[-1]])
    return path[::-1]


def _greedy(world: World) -> list[State] | None:
    """States from start to goal, each step chosen for itself; None: stuck."""
    path = [world.start]
    while path[-1] != world.goal:
        state = path[-1]
        after = _grown(world, state) or _shrunk(world, state)
        ahead = [after] if after is not None else _look_ahead(world, state)
        if not ahead:
            return None
        path += ahead
    return path


def _grown(world: World, state: State) -> State | None:
    """Grow what can, first come, first served."""
    grown = (world.after(state, i, world.cells[i].wanted) for i in world.growing(state))
    return next((after for after in grown if after is not None), None)


def _shrunk(world: World, state: State) -> State | None:
    """Shrink where something waits for the room: what leaves the most capacity, then what lets the most grow."""
    growing = world.growing(state)
    waiting = {world.cells[i].endpoint for i in growing}
    best: tuple[tuple[float, int], State] | None = None
    for i in world.shrinking(state):
        if growing and world.cells[i].endpoint not in waiting:
            continue
        after = world.after(state, i, world.cells[i].wanted)
        if after is None:
            continue
        if not growing:
            return after
        fits = sum(world.after(after, j, world.cells[j].wanted) is not None for j in growing)
        value = (min(world.capacity_per_s(after), world.hoped_per_s), fits)
        if best is None or value > best[0]:
            best = (value, after)
    return None if best is None else best[1]


def _look_ahead(world: World, state: State) -> list[State]:
    """States on the way to one count less to do; empty: none was found."""
    steps = world.to_do(state)[1]
    try:
        path = _strongest(world, state, lambda other: world.to_do(other)[1] < steps, detours=True)
    except _TooLarge:
        return []
    return path[1:] if path else []


def _step(cells: Sequence[Cell], before: State, after: State) -> Step:
    i = next(i for i in range(len(cells)) if before[i] != after[i])
    return Step(cells[i].endpoint, cells[i].part, before[i], after[i])


def _why_none(
    former: Instances,
    target: Instances,
    endpoints: Sequence[EndpointRoom],
    in_use: Sequence[ModelLoad],
    parts: Mapping[str, Part],
) -> str:
    """Say what would have helped: memory for both placements on one endpoint, if that does."""
    sentence = (
        "no order of steps was found in which no endpoint exceeds its memory and every model in use stands somewhere; "
    )
    over = {i: _over_bytes(each, [former, target], parts) for i, each in enumerate(endpoints)}
    for i in sorted((i for i in over if over[i] > 0), key=lambda i: over[i]):
        wider = list(endpoints)
        wider[i] = replace(wider[i], memory_bytes=(wider[i].memory_bytes or 0) + over[i])
        if _path(World(former, target, wider, in_use, parts, 0.0))[0] is not None:
            return f"{sentence}{over[i]:,} bytes more on endpoint {wider[i].name!r} would do"
    return f"{sentence}give several endpoints more memory, or an endpoint for the time of the change"
