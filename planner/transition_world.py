"""What a transition moves through: counts of instances, the steps between them, and what must hold of each.

A **cell** is a part on an endpoint whose count may change: where two placements differ, and, as a **detour**, where
neither has a part, but one instance of it may stand for a while so that its model stands somewhere. A **state** is the
counts of all cells. In every state the memory of every endpoint suffices, and every model in use stands somewhere.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from planner.load_split import capacity_per_s

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from planner.placement_inputs import EndpointRoom, Instances, ModelLoad, Part

State = tuple[int, ...]
# microseconds of loading, steps, and growths that are still to come at each shrinkage: less is better, in this order
Cost = tuple[int, int, int]


@dataclass(frozen=True)
class Cell:
    """A part on an endpoint, with what one instance of it takes there."""

    endpoint: str
    part: str
    present: int
    wanted: int
    memory_bytes: int
    load_us: int

    @property
    def is_detour(self) -> bool:
        """Whether neither placement has the part here."""
        return self.present == self.wanted == 0


class World:
    """All that a search of steps has to know; `parts` are all that either placement or a model names."""

    def __init__(
        self,
        former: Instances,
        target: Instances,
        endpoints: Sequence[EndpointRoom],
        models: Sequence[ModelLoad],
        parts: Mapping[str, Part],
        rate_per_s: float,
    ) -> None:
        """Models are those in use: each stands in both placements."""
        self._endpoints, self._models = endpoints, models
        # what stays is in no state
        self._fixed: dict[str, dict[str, int]] = {}
        for each in endpoints:
            before, after = former.get(each.name, {}), target.get(each.name, {})
            self._fixed[each.name] = {name: n for name, n in before.items() if n and after.get(name, 0) == n}
        moving = [
            model for model in models if not any(model.stands(self._fixed[each.name], each.kind) for each in endpoints)
        ]
        may_detour = {part.name for model in moving for part in model.parts}
        self.cells: list[Cell] = []
        self._memory: dict[str, tuple[int | None, list[int]]] = {}
        for each in endpoints:
            fixed = self._fixed[each.name]
            spare, mine = each.memory_bytes, []
            for name, part in parts.items():
                size = part.memory_bytes.get(each.kind)
                if name in fixed:
                    spare = None if spare is None else spare - fixed[name] * (size or 0)
                    continue
                present, wanted = former.get(each.name, {}).get(name, 0), target.get(each.name, {}).get(name, 0)
                if present != wanted or (name in may_detour and size is not None):
                    mine.append(len(self.cells))
                    load_us = round(part.load_s.get(each.kind, 0.0) * 1e6)
                    self.cells.append(Cell(each.name, name, present, wanted, size or 0, load_us))
            self._memory[each.name] = (spare, mine)
        self.start: State = tuple(cell.present for cell in self.cells)
        self.goal: State = tuple(cell.wanted for cell in self.cells)
        self._hosts = [self._hosts_of(model) for model in moving]
        self._bounds = [self._bounds_of(model) for model in models if model.reach > 0.0]
        self._known: dict[State, float] = {}
        # neither end can be improved
        self.hoped_per_s = min(rate_per_s, self.capacity_per_s(self.start), self.capacity_per_s(self.goal))

    def _hosts_of(self, model: ModelLoad) -> list[list[int]]:
        """Cells that must all be above 0 for the model to stand, by endpoint."""
        at = {(cell.endpoint, cell.part): i for i, cell in enumerate(self.cells)}
        hosts = []
        for each in self._endpoints:
            places = [(each.name, part.name) for part in model.parts if part.name not in self._fixed[each.name]]
            if each.kind in model.row_busy_s and all(place in at for place in places):
                hosts.append([at[place] for place in places])
        return hosts

    def _bounds_of(self, model: ModelLoad) -> list[tuple[float, int, list[int]]]:
        """Rows per second and instance, most instances, cells with them, by endpoint that may host a model."""
        at = {(cell.endpoint, cell.part): i for i, cell in enumerate(self.cells)}
        bounds = []
        for each in self._endpoints:
            fixed = self._fixed[each.name]
            names = [part.name for part in model.parts]
            cells = [at[each.name, name] for name in names if (each.name, name) in at]
            busy_s = model.reach * model.row_busy_s.get(each.kind, 0.0)
            if busy_s > 0.0 and len(cells) + sum(name in fixed for name in names) == len(names):
                most = min([each.slots, *(fixed[name] for name in names if name in fixed)])
                bounds.append((1.0 / busy_s, most, cells))
        return bounds

    @property
    def num_differences(self) -> int:
        """Cells in which the two placements differ."""
        return sum(not cell.is_detour for cell in self.cells)

    def to_do(self, state: State) -> tuple[int, int]:
        """(microseconds of loading, steps) that are needed from here at least."""
        pairs = list(zip(self.cells, state, strict=True))
        load_us = sum(cell.load_us for cell, count in pairs if count < cell.wanted)
        return load_us, sum(count != cell.wanted for cell, count in pairs)

    def growing(self, state: State) -> list[int]:
        """Cells that lack instances."""
        return [i for i, cell in enumerate(self.cells) if state[i] < cell.wanted]

    def shrinking(self, state: State) -> list[int]:
        """Cells that have instances too many, detours included."""
        return [i for i, cell in enumerate(self.cells) if state[i] > cell.wanted]

    def after(self, state: State, cell: int, count: int) -> State | None:
        """Set the count of a cell; None: that must not be."""
        changed = (*state[:cell], count, *state[cell + 1 :])
        if count > state[cell]:
            return changed if self._fits(changed, self.cells[cell].endpoint) else None
        return changed if count or self._covers(changed) else None

    def moves(self, state: State, *, detours: bool) -> Iterator[tuple[State, Cost]]:
        """States that one step leads to: a count as far towards its aim as may be, or less far; detours to and fro."""
        growing = len(self.growing(state))
        for i, cell in enumerate(self.cells):
            if cell.is_detour and not detours:
                continue
            count = state[i]
            aim = 1 - count if cell.is_detour else cell.wanted
            for changed in range(aim, count, 1 if aim < count else -1):
                after = self.after(state, i, changed)
                if after is not None:
                    yield after, ((cell.load_us, 1, 0) if changed > count else (0, 1, growing))

    def capacity_per_s(self, state: State) -> float:
        """Rows per second that can enter while the state lasts."""
        if state not in self._known:
            standing = {endpoint: dict(counts) for endpoint, counts in self._fixed.items()}
            for cell, count in zip(self.cells, state, strict=True):
                if count:
                    standing[cell.endpoint][cell.part] = count
            self._known[state] = capacity_per_s(standing, self._endpoints, self._models)
        return self._known[state]

    def at_most_per_s(self, state: State) -> float:
        """What the capacity of a state cannot exceed: that of each model, had it all slots for itself."""
        return min(
            (
                sum(per_s * min([most, *(state[i] for i in cells)]) for per_s, most, cells in bounds)
                for bounds in self._bounds
                if bounds
            ),
            default=math.inf,
        )

    def carries(self, state: State, least_per_s: float) -> bool:
        """Whether a state has a capacity, which is no more than either end has."""
        for end in (self.start, self.goal):
            if all(count >= there for count, there in zip(state, end, strict=True)):
                return True  # more instances never carry less
        least_per_s *= 1.0 - 1e-9
        return self.at_most_per_s(state) >= least_per_s and self.capacity_per_s(state) >= least_per_s

    def _fits(self, state: State, endpoint: str) -> bool:
        spare, mine = self._memory[endpoint]
        return spare is None or sum(state[i] * self.cells[i].memory_bytes for i in mine) <= spare

    def _covers(self, state: State) -> bool:
        return all(any(all(state[i] for i in host) for host in hosts) for hosts in self._hosts)
