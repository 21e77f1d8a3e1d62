"""How rows are split over the endpoints, once it is given what stands where: linear programs.

The busiest device is made as idle as it can be, then the next busiest, and so on down: where one device is bound to be
busy, the others need not be. What that leaves open goes to an even spread of each model over the endpoints where it
stands. Endpoints that are alike get alike.

A device can do as many slot-seconds of work per second as it has slots, and the models that use a part as many as it
has instances. Of a part that several ensembles share this asks more than need be, since it is busy with each batch for
a part of the time only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from scipy.optimize import LinearConstraint, linprog, milp
from scipy.sparse import csr_array

from planner.patterns import alike
from planner.placement_inputs import distinct_parts

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from planner.placement_inputs import EndpointRoom, Instances, Load, ModelLoad

# what a solver may exceed a limit by, as a share of it
SLACK = 1e-6
# a dual value below it is noise; those of all groups add up to one
_LEAST_DUAL = 1e-7
_LEAST_SHARE = 1e-9


@dataclass(frozen=True, kw_only=True)
class LoadSplit:
    """Shares of each model's rows, by model and endpoint, summing to one per model; utilisation by endpoint."""

    load: dict[str, dict[str, float]]
    utilisation: dict[str, float]


def split_load(
    instances: Instances,
    endpoints: Sequence[EndpointRoom],
    load: Load,
    *,
    most_utilisation: float = 1.0,
) -> LoadSplit | None:
    """Split a load; None: these instances cannot carry it."""
    flows = _Flows(instances, endpoints, load.models, load.rate_per_s)
    if not all(model.name in flows.hosts for model in load.models):
        return None
    levels = flows.levels()
    if levels is None or levels.max(initial=0.0) > most_utilisation * (1.0 + SLACK):
        return None
    return flows.split(flows.spread(levels))


def least_utilisation(instances: Instances, endpoints: Sequence[EndpointRoom], load: Load) -> float:
    """Utilisation of the busiest device under the best split.

    Above 1 where there is too much work; infinite where a model stands nowhere or has too few instances.
    """
    flows = _Flows(instances, endpoints, load.models, load.rate_per_s)
    return flows.lowest()


def capacity_per_s(
    instances: Instances,
    endpoints: Sequence[EndpointRoom],
    models: Sequence[ModelLoad],
    *,
    most_utilisation: float = 1.0,
) -> float:
    """Largest rate of rows that enter which these endpoints carry: give those that are up.

    0 where a model that rows reach stands on none of them; infinite where no row is any work.
    """
    # a rate at which the dearest model alone would be a slot's work: the solver takes small numbers for none
    row_s = max((model.reach * max(model.row_busy_s.values(), default=0.0) for model in models), default=0.0)
    unit_per_s = 1.0 / row_s if row_s else 1.0
    flows = _Flows(instances, endpoints, models, unit_per_s)
    if any(model.name not in flows.hosts for model in flows.models):
        return 0.0
    return flows.largest_scale(most_utilisation) * unit_per_s if row_s else math.inf


class _Flows:
    """Linear programs over the flows: shares of one model's rows that go to one group of endpoints, all members alike.

    Rows of a program say how busy the devices are, group by group, then how busy the instances are of parts that have
    fewer of them than there are slots, and last that the shares of each model add up. `_util` [flows] is how busy the
    device is with all rows of a flow's model. In the programs the
    largest of these is one, so that no work is so little that the solver takes it for none.
    """

    def __init__(
        self,
        instances: Instances,
        endpoints: Sequence[EndpointRoom],
        models: Sequence[ModelLoad],
        rate_per_s: float,
    ) -> None:
        parts = distinct_parts(part for model in models for part in model.parts)
        self.groups = alike(endpoints, parts, instances)
        self.models = [model for model in models if model.reach * rate_per_s > 0.0]
        self.hosts: dict[str, list[str]] = {}
        flows: list[tuple[int, int]] = []
        util: list[float] = []
        entries: list[tuple[int, int, float]] = []
        limits = len(self.groups)
        for g, group in enumerate(self.groups):
            counts = {part.name: count for part, count in zip(parts, group.standing, strict=True)}
            here = [model.name for model in models if model.stands(counts, group.kind)]
            for name in here:
                self.hosts.setdefault(name, []).extend(group.names)
            first = len(flows)
            users = [(m, model) for m, model in enumerate(self.models) if model.name in here]
            flows += [(g, m) for m, _ in users]
            slots = group.slots * len(group.names)
            util += [rate_per_s * model.reach * model.row_busy_s[group.kind] / slots for _, model in users]
            entries += [(g, flow, util[flow]) for flow in range(first, len(flows))]
            for part, count in zip(parts, group.standing, strict=True):
                if 0 < count < group.slots:
                    entries += [
                        (limits, first + i, util[first + i] * group.slots / count)
                        for i, (_, model) in enumerate(users)
                        if part in model.parts
                    ]
                    limits += 1
        self._util = np.array(util)
        self._unit = max(util, default=0.0) or 1.0
        self._group_of = np.array([g for g, _ in flows], np.int64)
        self._model_of = np.array([m for _, m in flows], np.int64)
        self._num_limits = limits
        self._entries = [
            *((row, flow, busy / self._unit) for row, flow, busy in entries),
            *((limits + m, flow, 1.0) for flow, (_, m) in enumerate(flows)),
        ]

    def lowest(self) -> float:
        """Lowest utilisation of the busiest device, infinite if there is no split."""
        if not self.models:
            return 0.0
        high = np.append(np.zeros(len(self.groups)), np.full(self._num_limits - len(self.groups), 1.0 / self._unit))
        level = [(g, len(self._util), -1.0) for g in range(len(self.groups))]
        found = self._solve(level, high, costs=[1.0])
        return math.inf if found is None else float(found[-1]) * self._unit

    def largest_scale(self, most_utilisation: float) -> float:
        """Multiple of the load that can be carried where all models stand; infinite if that is no work."""
        high = np.full(self._num_limits, 1.0 / self._unit)
        high[: len(self.groups)] *= most_utilisation
        scale = [(self._num_limits + m, len(self._util), -1.0) for m in range(len(self.models))]
        found = self._solve(scale, high, costs=[-1.0], demand=0.0)
        return math.inf if found is None else float(found[-1])

    def levels(self) -> NDArray[np.float64] | None:
        """Utilisation by group, from the busiest down each as low as those before allow; None: there is no split.

        A group that holds a level up, as its dual value says, is at that level in every split.
        """
        caps = np.full(len(self.groups), math.inf)
        while self.models and np.isinf(caps).any():
            free = np.isinf(caps)
            level = [(int(g), len(self._util), -1.0) for g in np.flatnonzero(free)]
            matrix = self._matrix(level, self._num_limits, 1)
            high = np.full(self._num_limits, 1.0 / self._unit)
            high[: len(caps)] = np.where(free, 0.0, caps * (1.0 + _LEAST_SHARE) / self._unit)
            result = linprog(
                np.append(np.zeros(len(self._util)), 1.0),
                A_ub=matrix[: self._num_limits],
                b_ub=high,
                A_eq=matrix[self._num_limits :],
                b_eq=np.ones(len(self.models)),
            )
            if result.status != 0:
                return None
            binding = free & (-result.ineqlin.marginals[: len(caps)] > _LEAST_DUAL)
            caps[binding if binding.any() else free] = result.x[-1] * self._unit
        return np.where(np.isinf(caps), 0.0, caps)

    def spread(self, caps: NDArray[np.float64]) -> NDArray[np.float64]:
        """Shares [flows] within the levels, with the least peaks: of each model, the most work it has per slot."""
        if not self.models:
            return np.zeros(0)
        num_flows, first = len(self._util), self._num_limits + len(self.models)
        own = [(first + flow, flow, self._util[flow] / self._unit) for flow in range(num_flows)]
        peaks = [(first + flow, num_flows + int(m), -1.0) for flow, m in enumerate(self._model_of)]
        high = np.full(self._num_limits, 1.0 / self._unit)
        high[: len(caps)] = caps * (1.0 + SLACK) / self._unit + _LEAST_SHARE
        found = self._solve([*own, *peaks], high, costs=[1.0] * len(self.models), below=num_flows)
        assert found is not None, "the levels come from shares"
        shares = np.where(found[:num_flows] < _LEAST_SHARE, 0.0, found[:num_flows])
        return np.asarray(shares / np.bincount(self._model_of, shares)[self._model_of])

    def split(self, shares: NDArray[np.float64]) -> LoadSplit:
        """By endpoint; models without rows evenly."""
        load = {name: dict.fromkeys(hosts, 1.0 / len(hosts)) for name, hosts in self.hosts.items()}
        load |= {model.name: {} for model in self.models}
        for g, m, share in zip(self._group_of, self._model_of, shares, strict=True):
            names = self.groups[g].names
            if share:
                load[self.models[m].name] |= dict.fromkeys(names, float(share) / len(names))
        busy = np.bincount(self._group_of, shares * self._util, len(self.groups))
        utilisation = {name: float(busy[g]) for g, group in enumerate(self.groups) for name in group.names}
        return LoadSplit(load=load, utilisation=utilisation)

    def _matrix(self, entries: Sequence[tuple[int, int, float]], num_rows: int, num_costs: int) -> csr_array:
        """Program with further entries (row, column, value); the models' rows follow `num_rows`."""
        rows, columns, values = zip(*self._entries, *entries, strict=True)
        shape = (max(num_rows + len(self.models), 1 + max(rows)), len(self._util) + num_costs)
        return csr_array((values, (rows, columns)), shape)

    def _solve(
        self,
        entries: Sequence[tuple[int, int, float]],
        high: NDArray[np.float64],
        *,
        costs: Sequence[float],
        demand: float = 1.0,
        below: int = 0,
    ) -> NDArray[np.float64] | None:
        """Minimise the costs of the columns behind the flows, with `below` further rows that are at most 0."""
        matrix = self._matrix(entries, self._num_limits, len(costs))
        equal = np.full(len(self.models), demand)
        low = np.concatenate((np.full(len(high), -np.inf), equal, np.full(below, -np.inf)))
        limits = LinearConstraint(matrix, low, np.concatenate((high, equal, np.zeros(below))))
        # a program without whole numbers: milp is the shorter way to the same solver than linprog
        result = milp(np.append(np.zeros(len(self._util)), costs), constraints=limits)
        return np.asarray(result.x) if result.status == 0 else None
