"""Layouts to plan for: what may stand where, and which of the ways are worth a simulation.

Where all models fit everywhere there is one layout, with all of them everywhere: whatever the load is, nothing has to
be loaded for it. Where memory binds, or a device is too slow for a model, it has to be chosen. A **fluid** figure does
that: the rate at which the devices of a layout would be busy all the time with a ladder entry, a linear program. What
the fluid figures make of a layout is not believed; they rank, and the simulator decides between what they rank first.

A plan has one to three layouts, from the one for the lowest rates to the one for the highest, which reaches as far as
any. Those before it are there for accuracy: they hold the larger models in the memory that small ones take at high
rates. A layout is in force up to the share of its highest rate at which the orchestrator comes back to it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from itertools import combinations, combinations_with_replacement, product
from typing import TYPE_CHECKING

import numpy as np

from cascadeserve.errors import UsageError
from planner.infeasible import Infeasible
from planner.load_split import capacity_per_s
from planner.patterns import alike, fullest, patterns
from planner.placement import Placement, place
from planner.placement_inputs import EndpointRoom, Load, ModelLoad, Part, distinct_parts
from planner.rank_layouts import RankedLayouts
from planner.triggers import BATCH_SLO_FRAC, batch_sizes

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from cascadeserve.cluster import Cluster
    from cascadeserve.gear_plan import LadderEntry, PlannedModel
    from planner.patterns import Alike
    from planner.placement_inputs import Instances
    from planner.profile import Profile
    from planner.rank_layouts import Wanted

# Of several kinds of device one may be too slow for a model: a row takes longer than these shares of the SLO. Beyond
# the first it is useless there, beyond the second often better left out.
_SLOW_SLO_FRACS = (1.0, 0.25)
# all ways to fill the endpoints are looked at, if there are no more
_MOST_WAYS = 256
# shares of its highest rate at which a dear entry is placed together with a cheap one
_SHARES = (1.0, 0.5, 0.25)
# what is kept of a fluid rate if answers are to come within an SLO, as a rule
_KEPT_FRAC = 0.85


@dataclass(frozen=True)
class Sites:
    """What may stand where: endpoints, and models with the work of a row and the memory of an instance by kind."""

    rooms: tuple[EndpointRoom, ...]
    models: Mapping[str, ModelLoad]

    @property
    def parts(self) -> tuple[Part, ...]:
        """All that has instances."""
        return distinct_parts(part for model in self.models.values() for part in model.parts)

    def loads(self, entry: LadderEntry) -> tuple[ModelLoad, ...]:
        """What a row that enters brings to the models of an entry."""
        return tuple(
            replace(self.models[stage.model], reach=reach)
            for stage, reach in zip(entry.stages, entry.reach, strict=True)
        )

    def runs(self, entry: LadderEntry, instances: Instances) -> bool:
        """Whether all models of an entry stand somewhere."""
        return all(
            any(self.models[stage.model].stands(instances.get(room.name, {}), room.kind) for room in self.rooms)
            for stage in entry.stages
        )


def make_sites(
    cluster: Cluster,
    devices: Mapping[str, Profile],
    models: Mapping[str, PlannedModel],
    slo_s: float,
    slow_slo_frac: float = math.inf,
) -> Sites:
    """Make the sites of a cluster; `devices` is the profile of every endpoint.

    No rows go to devices on which one takes longer than `slow_slo_frac` SLOs.

    Raises:
        UsageError: an endpoint limits the memory, and it is not known what a model takes.

    """
    rooms = tuple(
        EndpointRoom(name=each.name, kind=each.kind, slots=each.slots, memory_bytes=each.memory_bytes)
        for each in cluster.endpoints
    )
    for room in rooms:
        if room.memory_bytes is not None:
            _check_memory_known(room, devices[room.name], models)
    first = {room.kind: room.name for room in reversed(rooms)}
    known = {
        part: _part(part, {kind: devices[endpoint] for kind, endpoint in first.items()})
        for name, model in models.items()
        for part in model.composed_of or (name,)
    }
    return Sites(
        rooms,
        {
            name: ModelLoad(
                name=name,
                parts=tuple(known[part] for part in model.composed_of or (name,)),
                row_busy_s={
                    kind: _row_s(model, endpoint, slo_s)
                    for kind, endpoint in first.items()
                    if model.batch_busy_s(1, endpoint) <= slow_slo_frac * slo_s
                },
            )
            for name, model in models.items()
        },
    )


def _check_memory_known(room: EndpointRoom, profile: Profile, models: Mapping[str, PlannedModel]) -> None:
    for name, model in models.items():
        for part in model.composed_of or (name,):
            if profile.instance_bytes(part) is None:
                raise UsageError(
                    f"endpoint {room.name!r} has a memory_bytes, but the profile of its device kind {room.kind!r} does "
                    f"not say what an instance of model {part!r} takes; profile it, write its memory_bytes, or leave "
                    "out that of the endpoint"
                )


def _part(name: str, profiles: Mapping[str, Profile]) -> Part:
    found = {kind: profile.part(name) for kind, profile in profiles.items()}
    return Part(
        name=name,
        memory_bytes={kind: (each and each.memory_bytes) or 0 for kind, each in found.items()},
        load_s={kind: each.load_s for kind, each in found.items() if each is not None and each.load_s is not None},
    )


def _row_s(model: PlannedModel, endpoint: str, slo_s: float) -> float:
    """Work of a row in a batch of the size that is met under load, as in `planner.triggers.greedy`."""
    sizes = batch_sizes(model)
    rows = max((size for size in sizes if model.batch_busy_s(size, endpoint) <= BATCH_SLO_FRAC * slo_s), default=1)
    return model.batch_busy_s(rows, endpoint) / rows


def everywhere(sites: Sites) -> dict[str, dict[str, int]] | None:
    """As many instances of everything as there are slots; None: they do not fit, or a device is too slow for one."""
    for room in sites.rooms:
        if any(room.kind not in model.row_busy_s for model in sites.models.values()):
            return None
        held = sum(part.memory_bytes[room.kind] for part in sites.parts) * room.slots
        if room.memory_bytes is not None and held > room.memory_bytes:
            return None
    return {room.name: dict.fromkeys((part.name for part in sites.parts), room.slots) for room in sites.rooms}


class LayoutSearch:
    """Layouts that may be worth a simulation, and which of them are worth the first ones.

    `found` are instances by endpoint and part. `entries` are those that may serve, `one_entry` says that one of them
    has to serve all rates.

    Raises:
        Infeasible: no entry can stand, with what is missing.
        UsageError: it is not known what memory a model takes.

    """

    def __init__(
        self,
        cluster: Cluster,
        devices: Mapping[str, Profile],
        models: Mapping[str, PlannedModel],
        entries: Sequence[LadderEntry],
        wanted: Wanted,
        *,
        one_entry: bool,
    ) -> None:
        self.sites = make_sites(cluster, devices, models, wanted.slo_s)
        self._entries = entries
        self._wanted = wanted
        self._one_entry = one_entry
        several = len({room.kind for room in self.sites.rooms}) > 1
        careful = [make_sites(cluster, devices, models, wanted.slo_s, frac) for frac in _SLOW_SLO_FRACS if several]
        self.found: list[dict[str, dict[str, int]]] = []
        self._fluids: list[tuple[list[int], NDArray[np.float64]]] = []
        whole = everywhere(self.sites)
        if whole is not None and all(everywhere(each) is not None for each in careful):
            self.found.append(whole)
            return
        for sites in (self.sites, *careful):
            here = _candidates(sites, entries)
            if here:
                self.found += [each for each in here if each not in self.found]
                fluid = np.array([[_fluid_per_s(sites, each, entry) for entry in entries] for each in here])
                self._fluids.append(([self.found.index(each) for each in here], fluid))
        if not self.found:
            raise Infeasible(_why_none(self.sites, entries), "memory")

    def first(self) -> list[list[int]]:
        """Alternatives to simulate: places in `found`, by rising rate.

        Among them are the layouts of plans with fewer candidates: of single models, and of one entry for all rates.
        """
        if not self._fluids:
            return [[0]]
        singles = np.array([len(entry.stages) == 1 for entry in self._entries])
        every = np.ones(len(self._entries), bool)
        rows: list[list[int]] = []
        for number, (places, fluid) in enumerate(self._fluids):
            rates = _KEPT_FRAC * self._wanted.headroom * fluid
            questions = [(every, self._one_entry)]
            if number == 0 and not self._one_entry:
                questions += [(every, True), (singles, False), (singles, True)]
            for taken, alone in questions:
                rows += self._best(places, rates, taken, alone=alone)
            # the fluid figures may be wrong about which layout reaches the rate; this one goes furthest
            rows.append([places[int(rates.max(axis=1).argmax())]])
        return [row for index, row in enumerate(rows) if row not in rows[:index]]

    def next(self, upper_per_s: Mapping[int, Mapping[str, float]]) -> list[list[int]]:
        """Alternatives as in `first`, in view of the rates that entries serve in layouts that were simulated.

        Those are rows per second by place in `found` and entry. From what an entry keeps of its fluid rates in these
        follows what it should keep elsewhere.
        """
        if not self._fluids:
            return []
        places, fluid = self._fluids[0]
        known = np.array([place in upper_per_s for place in places])
        seen = np.array([[upper_per_s.get(place, {}).get(e.name, 0.0) for e in self._entries] for place in places])
        kept = np.full(len(self._entries), _KEPT_FRAC * self._wanted.headroom)
        for column in range(len(self._entries)):
            able = known & (fluid[:, column] > 0.0)
            if able.any():
                kept[column] = np.median(seen[able, column] / fluid[able, column])
        rates = np.where(known[:, None], seen, kept * fluid)
        every = np.ones(len(self._entries), bool)
        return self._best(places, rates, every, alone=self._one_entry)

    def _best(
        self, places: Sequence[int], rates: NDArray[np.float64], taken: NDArray[np.bool_], *, alone: bool
    ) -> list[list[int]]:
        if not rates[:, taken].any():
            return []
        runs = rates > 0.0
        together = (runs[:, None, :] & runs[None, :, :]).any(axis=2)
        accuracy = np.array([entry.accuracy or 0.0 for entry in self._entries])[taken]
        ranked = RankedLayouts(rates[:, taken], accuracy, self._wanted, alone=alone)
        return [[places[index] for index in row] for row in ranked.best(1 if alone else self._wanted.most, together)]


def _fluid_per_s(sites: Sites, instances: Instances, entry: LadderEntry) -> float:
    return capacity_per_s(instances, sites.rooms, sites.loads(entry)) if sites.runs(entry, instances) else 0.0


def _candidates(sites: Sites, entries: Sequence[LadderEntry]) -> list[dict[str, dict[str, int]]]:
    """All ways to fill the endpoints, if they are few; otherwise what is best for an entry, or for two."""
    every = _all_ways(sites)
    found = _placed(sites, entries) if every is None else every
    return [each for each in found if any(sites.runs(entry, each) for entry in entries)]


def _useful(counts: NDArray[np.int64], group: Alike, sites: Sites) -> NDArray[np.int64]:
    """Patterns without what no rows can go to: a part that stands alone of several, or is too slow here."""
    column = {part.name: index for index, part in enumerate(sites.parts)}
    needed = np.zeros(counts.shape, bool)
    for model in sites.models.values():
        places = [column[part.name] for part in model.parts]
        here = (counts[:, places] > 0).all(axis=1) & (group.kind in model.row_busy_s)
        needed[np.ix_(here, places)] = True
    useful: NDArray[np.int64] = np.unique(counts * needed, axis=0)
    return useful


def _all_ways(sites: Sites) -> Iterator[dict[str, dict[str, int]]] | None:
    """All ways to fill the endpoints as far as they go; None: there are too many."""
    parts = sites.parts
    groups = alike(sites.rooms, parts, {})
    try:
        ways = [_useful(fullest(patterns(group, parts), group, parts), group, sites) for group in groups]
    except UsageError:
        return None
    sizes = [math.comb(len(group.names) + len(way) - 1, len(way) - 1) for group, way in zip(groups, ways, strict=True)]
    return None if math.prod(sizes) > _MOST_WAYS else _filled(groups, ways, parts)


def _filled(
    groups: Sequence[Alike], ways: Sequence[NDArray[np.int64]], parts: Sequence[Part]
) -> Iterator[dict[str, dict[str, int]]]:
    choices = [
        combinations_with_replacement(range(len(way)), len(group.names))
        for group, way in zip(groups, ways, strict=True)
    ]
    for chosen in product(*choices):
        instances: dict[str, dict[str, int]] = {}
        for group, way, taken in zip(groups, ways, chosen, strict=True):
            for name, index in zip(group.names, taken, strict=True):
                instances[name] = _counts(way[index], parts)
        yield instances


def _counts(pattern: NDArray[np.int64], parts: Sequence[Part]) -> dict[str, int]:
    return {part.name: int(count) for part, count in zip(parts, pattern, strict=True) if count}


def _placed(sites: Sites, entries: Sequence[LadderEntry]) -> Iterator[dict[str, dict[str, int]]]:
    """What is best for each entry, and for each two of them at shares of the rates that they reach alone."""
    alone: dict[str, float] = {}
    for entry in entries:
        found = _place(sites, [(entry, 1.0)])
        if found is not None:
            alone[entry.name] = _fluid_per_s(sites, found, entry)
            yield found
    able = [entry for entry in entries if alone.get(entry.name)]
    for dear, cheap in combinations(able, 2):
        for share in _SHARES:
            both = _place(sites, [(dear, share * alone[dear.name]), (cheap, alone[cheap.name])])
            if both is not None:
                yield both


def _place(sites: Sites, rates: Sequence[tuple[LadderEntry, float]]) -> dict[str, dict[str, int]] | None:
    # so little that every placement carries it: what is asked is only which one is least busy with it
    little = 1e-6 / max(rate for _, rate in rates)
    longest_s = max(max(model.row_busy_s.values(), default=0.0) for model in sites.models.values())
    loads = [Load(little * rate / longest_s, sites.loads(entry)) for entry, rate in rates]
    found = place(sites.rooms, loads)
    return found.instances if isinstance(found, Placement) else None


def _why_none(sites: Sites, entries: Sequence[LadderEntry]) -> str:
    reasons = [place(sites.rooms, [Load(1e-9, sites.loads(entry))]) for entry in entries]
    return next((str(reason) for reason in reversed(reasons) if not isinstance(reason, Placement)), "nothing can stand")
