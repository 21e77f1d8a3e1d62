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
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.optimize import linprog
from scipy.sparse import block_array, coo_array

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
    found = flows.lowest(np.full(len(flows.groups), math.inf))
    return math.inf if found is None else found[0]


def capacity_per_s(
    instances: Instances,
    endpoints: Sequence[EndpointRoom],
    models: Sequence[ModelLoad],
    *,
    most_utilisation: float = 1.0,
) -> float:
    """Largest rate of rows that enter which these endpoints carry: give those that are up.

    0 where a model that rows reach stands on none of them; infinite where rows reach no model.
    """
    flows = _Flows(instances, endpoints, models, 1.0)
    if not flows.models:
        return math.inf
    if any(model.name not in flows.hosts for model in flows.models):
        return 0.0
    return flows.largest_scale(most_utilisation)


class _Flows:
    """Linear programs over the flows: shares of one model's rows that go to one group of endpoints, all members alike.

    `_util` [flows] is the utilisation of each of them if all rows of the model went there.
    `_limits` [groups + .., flows] says how busy devices are, group by group, then how busy the instances are of parts
    that have fewer of them than there are slots. `_demand` [models, flows] says which flows are of which model.
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
        work_s: list[float] = []
        entries: list[tuple[int, int, float]] = []
        num_limits = len(self.groups)
        for g, group in enumerate(self.groups):
            counts = {part.name: count for part, count in zip(parts, group.standing, strict=True)}
            here = [model.name for model in models if model.stands(counts, group.kind)]
            for name in here:
                self.hosts.setdefault(name, []).extend(group.names)
            first = len(flows)
            users = [(m, model) for m, model in enumerate(self.models) if model.name in here]
            flows += [(g, m) for m, _ in users]
            # slot-seconds per second and endpoint of the group, if all rows of the model went to it
            work_s += [rate_per_s * each.reach * each.row_busy_s[group.kind] / len(group.names) for _, each in users]
            entries += [(g, flow, work_s[flow] / group.slots) for flow in range(first, len(flows))]
            for part, count in zip(parts, group.standing, strict=True):
                if 0 < count < group.slots:
                    entries += [
                        (num_limits, first + i, work_s[first + i] / count)
                        for i, (_, model) in enumerate(users)
                        if part in model.parts
                    ]
                    num_limits += 1
        self._util = np.array([work_s[flow] / self.groups[g].slots for flow, (g, _) in enumerate(flows)])
        self._group_of = np.array([g for g, _ in flows], np.int64)
        self._model_of = np.array([m for _, m in flows], np.int64)
        self._limits = _sparse(entries, num_limits, len(flows))
        self._demand = _sparse([(m, flow, 1.0) for flow, (_, m) in enumerate(flows)], len(self.models), len(flows))
        self._spare = np.ones(num_limits - len(self.groups))

    def lowest(self, caps: NDArray[np.float64]) -> tuple[float, NDArray[np.bool_]] | None:
        """Lowest utilisation for all groups that have no cap yet [groups: inf], and which of them hold it up."""
        if not self.models:
            return 0.0, np.zeros(len(caps), bool)
        free = np.isinf(caps)
        level = np.append(np.where(free, -1.0, 0.0), 0.0 * self._spare)
        result = self._solve(
            [[self._limits, coo_array(level[:, None])]],
            np.append(np.where(free, 0.0, caps * (1.0 + _LEAST_SHARE)), self._spare),
            costs=np.array([1.0]),
        )
        if result is None:
            return None
        duals = -result.ineqlin.marginals[: len(caps)]
        return float(result.x[-1]), free & (duals > _LEAST_DUAL)

    def levels(self) -> NDArray[np.float64] | None:
        """Utilisation by group, from the busiest down each as low as those before allow; None: it cannot be done."""
        caps = np.full(len(self.groups), math.inf)
        while np.isinf(caps).any():
            found = self.lowest(caps)
            if found is None:
                return None
            level, binding = found
            caps[binding if binding.any() else np.isinf(caps)] = level
        return caps

    def spread(self, caps: NDArray[np.float64]) -> NDArray[np.float64]:
        """Shares [flows] within the levels, with the least peaks: of each model, the most work it has per slot."""
        if not self.models:
            return np.zeros(0)
        places = np.arange(len(self._model_of))
        peaks = _sparse([(f, int(m), -1.0) for f, m in enumerate(self._model_of)], len(places), len(self.models))
        own = coo_array((self._util, (places, places)), (len(places), len(places)))
        result = self._solve(
            [[self._limits, coo_array((self._limits.shape[0], len(self.models)))], [own, peaks]],
            np.concatenate((caps * (1.0 + SLACK) + _LEAST_SHARE, self._spare, np.zeros(len(places)))),
            costs=np.ones(len(self.models)),
        )
        assert result is not None, "the levels come from shares"
        shares = np.where(result.x[: len(places)] < _LEAST_SHARE, 0.0, result.x[: len(places)])
        return shares / np.bincount(self._model_of, shares)[self._model_of]

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

    def largest_scale(self, most_utilisation: float) -> float:
        """Multiple of the load that can be carried."""
        most = np.append(np.full(len(self.groups), most_utilisation), self._spare)
        nothing = coo_array((self._limits.shape[0], 1))
        result = self._solve([[self._limits, nothing]], most, costs=np.array([-1.0]), scaled=True)
        return 0.0 if result is None else float(result.x[-1])

    def _solve(self, blocks: Any, most: NDArray[np.float64], *, costs: NDArray[np.float64], scaled: bool = False) -> Any:
        """Minimise the costs of the columns behind the flows; `scaled`: the flows of a model add up to the last one."""
        added = np.zeros((len(self.models), len(costs)))
        if scaled:
            added[:, -1] = -1.0
        result = linprog(
            np.append(np.zeros(len(self._model_of)), costs),
            A_ub=block_array(blocks).tocsr(),
            b_ub=most,
            A_eq=block_array([[self._demand, coo_array(added)]]).tocsr(),
            b_eq=np.full(len(self.models), 0.0 if scaled else 1.0),
        )
        return result if result.status == 0 else None


def _sparse(entries: Sequence[tuple[int, int, float]], num_rows: int, num_columns: int) -> Any:
    rows, columns, values = (np.array([entry[i] for entry in entries]) for i in range(3))
    places = (rows.astype(np.int64), columns.astype(np.int64))
    return coo_array((values.astype(np.float64), places), (num_rows, num_columns))
