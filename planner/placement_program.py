"""The mixed-integer program of a placement, solved by HiGHS.

Whole numbers: how many endpoints of a group take each pattern. Others: which share of a model's rows goes to the
endpoints of one group and pattern. All is in endpoints: a share of rows needs so many endpoints of a pattern for its
work, within the utilisation that is allowed, and there are as many as take the pattern.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from planner.patterns import hosting

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from planner.patterns import Alike
    from planner.placement_inputs import Problem

# of branch and bound, where the best so far will do; not a time, so that the same question has the same answer
_MOST_NODES = 100
# from the least cost, as a share of it
_GAP = 1e-3

# by group, of one endpoint with each pattern
Costs = list["NDArray[np.float64]"]
Free = Literal["nothing", "rate", "endpoints"]


@dataclass(frozen=True)
class Choice:
    """Endpoints that take each pattern, by group [patterns]; the multiple of the rate; endpoints to add, by group."""

    taken: list[NDArray[np.int64]]
    scale: float
    added: list[int]

    def instances(
        self, groups: Sequence[Alike], patterns: Sequence[NDArray[np.int64]], names: Sequence[str]
    ) -> dict[str, dict[str, int]]:
        """By endpoint and part; members of a group take the patterns in order."""
        standing: dict[str, dict[str, int]] = {}
        for group, counts, taken in zip(groups, patterns, self.taken, strict=True):
            for endpoint, row in zip(group.names, np.repeat(counts, taken, axis=0), strict=True):
                standing[endpoint] = {name: int(count) for name, count in zip(names, row, strict=True) if count}
        return standing


class _Rows:
    """Rows of a sparse matrix with their limits."""

    def __init__(self) -> None:
        self._entries: list[tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]] = []
        self.low: list[NDArray[np.float64]] = []
        self.high: list[NDArray[np.float64]] = []
        self._count = 0

    def add(
        self,
        low: NDArray[np.float64],
        high: NDArray[np.float64],
        *entries: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64] | float],
    ) -> None:
        """Rows with limits [rows] and entries (row of these, column, value)."""
        for rows, columns, values in entries:
            self._entries.append((rows + self._count, columns, np.broadcast_to(values, rows.shape)))
        self.low.append(low)
        self.high.append(high)
        self._count += len(low)

    def constraint(self, num_columns: int) -> LinearConstraint:
        rows, columns, values = (np.concatenate([entry[i] for entry in self._entries]) for i in range(3))
        matrix = coo_array((values, (rows, columns)), (self._count, num_columns)).tocsr()
        return LinearConstraint(matrix, np.concatenate(self.low), np.concatenate(self.high))


class Program:
    """The program for some groups with some patterns each, and the utilisation that no device may exceed.

    Columns: endpoints by pattern, group after group; flows; the multiple of the rate; endpoints to add, by group.
    """

    def __init__(
        self, problem: Problem, groups: Sequence[Alike], patterns: Sequence[NDArray[np.int64]], utilisation: float
    ) -> None:
        """Build the matrix."""
        self._ends = np.cumsum([len(counts) for counts in patterns])
        num_patterns = int(self._ends[-1])
        group_of = np.repeat(np.arange(len(groups)), [len(counts) for counts in patterns])
        hosts = np.vstack(
            [hosting(c, g.kind, problem.models, problem.parts) for g, c in zip(groups, patterns, strict=True)]
        )
        work_s, wanted = _work(problem, groups)
        load, at, model = np.nonzero(hosts[None] & wanted[:, None])
        flows = num_patterns + np.arange(len(at))
        flow_work_s = work_s[load, group_of[at], model]
        slots = np.array([group.slots for group in groups])[group_of]
        self._num_patterns, self._scale = num_patterns, num_patterns + len(at)
        self._num_columns = self._scale + 1 + len(groups)
        every, sizes = np.arange(num_patterns), np.array([len(group.names) for group in groups], float)

        matrix = _Rows()
        added = self._scale + 1 + np.arange(len(groups))
        matrix.add(sizes, sizes, (group_of, every, 1.0), (np.arange(len(groups)), added, -1.0))
        pairs = np.flatnonzero(wanted)
        nothing, scale = np.zeros(len(pairs)), np.full(len(pairs), self._scale)
        pair = np.searchsorted(pairs, load * len(problem.models) + model)
        matrix.add(nothing, nothing, (pair, flows, 1.0), (np.arange(len(pairs)), scale, -1.0))
        column, host = np.nonzero(hosts)
        fewest = np.array([each.min_hosts for each in problem.models], float)
        matrix.add(fewest, np.full(len(fewest), np.inf), (host, column, 1.0))
        again = np.arange(len(problem.loads))[:, None]
        needed = flow_work_s / (utilisation * slots[at])
        _add_needs(matrix, (load * num_patterns + at, flows, needed), (again * num_patterns + every, every))
        all_counts = np.vstack(patterns)
        for p, part in enumerate(problem.parts):
            # with more instances than the device may be busy, they are no limit
            few = np.flatnonzero((all_counts[:, p] > 0) & (all_counts[:, p] < utilisation * slots))
            uses = np.array([part in each.parts for each in problem.models])
            mine = np.flatnonzero(np.isin(at, few) & uses[model])
            needed = flow_work_s[mine] / all_counts[at[mine], p]
            place = load[mine] * len(few) + np.searchsorted(few, at[mine])
            _add_needs(matrix, (place, flows[mine], needed), (again * len(few) + np.arange(len(few)), few))
        self._constraint = matrix.constraint(self._num_columns)
        self._integrality = np.concatenate((np.ones(num_patterns), np.zeros(len(at) + 1), np.ones(len(groups))))

    def solve(self, costs: Costs | None = None, *, free: Free = "nothing") -> Choice | None:
        """Find the choice of least cost, or any; None: there is none.

        With `free` "rate" the largest multiple of the rate is
        sought, with "endpoints" the fewest endpoints to add.
        """
        weights = np.zeros(self._num_columns)
        low, high = np.zeros(self._num_columns), np.full(self._num_columns, np.inf)
        low[self._scale] = high[self._scale] = 1.0
        high[self._scale + 1 :] = 0.0
        if costs is not None:
            weights[: self._num_patterns] = np.concatenate(costs)
        if free == "rate":
            low[self._scale], high[self._scale], weights[self._scale] = 0.0, np.inf, -1.0
        elif free == "endpoints":
            high[self._scale + 1 :], weights[self._scale + 1 :] = np.inf, 1.0
        options = {} if costs is None else {"mip_rel_gap": _GAP, "node_limit": _MOST_NODES}
        result = milp(
            weights,
            integrality=self._integrality,
            bounds=Bounds(low, high),
            constraints=self._constraint,
            options=options,
        )
        if result.x is None:  # stopped early, there may be one
            return None
        whole = np.rint(result.x).astype(np.int64)
        return Choice(
            taken=np.split(whole[: self._num_patterns], self._ends[:-1]),
            scale=float(result.x[self._scale]),
            added=[int(number) for number in whole[self._scale + 1 :]],
        )


def _work(problem: Problem, groups: Sequence[Alike]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Slot-seconds per second if all rows of a model went to a group [loads, groups, models]; what has rows."""
    work_s = np.zeros((len(problem.loads), len(groups), len(problem.models)))
    wanted = np.zeros((len(problem.loads), len(problem.models)), bool)
    place = {model.name: index for index, model in enumerate(problem.models)}
    for index, load in enumerate(problem.loads):
        for model in load.models:
            rows_per_s = load.rate_per_s * model.reach
            wanted[index, place[model.name]] = rows_per_s > 0.0
            busy_s = [model.row_busy_s.get(group.kind, 0.0) for group in groups]
            work_s[index, :, place[model.name]] = rows_per_s * np.array(busy_s)
    return work_s, wanted


def _add_needs(
    matrix: _Rows,
    needs: tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]],
    taken: tuple[NDArray[np.int64], NDArray[np.int64]],
) -> None:
    """Rows, as many as in taken[0] [loads, patterns], in each of which the needs are at most the endpoints taken."""
    rows, columns = np.broadcast_arrays(*taken)
    count = rows.size
    matrix.add(np.full(count, -np.inf), np.zeros(count), needs, (rows.ravel(), columns.ravel(), -1.0))
