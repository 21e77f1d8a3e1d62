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
from planner.load_split import capacity_per_s
from planner.patterns import alike, fullest, patterns
from planner.placement import Placement, place
from planner.placement_inputs import EndpointRoom, Load, ModelLoad, Part, distinct_parts

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from cascadeserve.cluster import Cluster
    from cascadeserve.gear_plan import LadderEntry, PlannedModel
    from planner.goal import RatePrior
    from planner.patterns import Alike
    from planner.placement_inputs import Instances
    from planner.profile import Profile

# in a plan, unless fewer are asked for
MOST_LAYOUTS = 3
# accuracy over rows that a further layout has to gain: it costs loads, and a while in which less stands
LAYOUT_PRICE = 2e-3
# a row in a batch of the size that is met under load: one that keeps a slot busy for at most this share of the SLO
_BATCH_SLO_FRAC = 0.25
# Of several kinds of device one may be too slow for a model: a row takes longer than these shares of the SLO. Beyond
# the first it is useless there, beyond the second often better left out.
_SLOW_SLO_FRACS = (1.0, 0.25)
# all ways to fill the endpoints are looked at, if there are no more
_MOST_WAYS = 256
# shares of its highest rate at which a dear entry is placed together with a cheap one
_SHARES = (1.0, 0.5, 0.25)
_NEARLY = 0.995
# what is kept of a fluid rate if answers are to come within an SLO, as a rule
_KEPT_FRAC = 0.85
_RATES = 64


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
    found = {kind: profile.models.get(name) or profile.parts.get(name) for kind, profile in profiles.items()}
    return Part(
        name=name,
        memory_bytes={kind: (each and each.memory_bytes) or 0 for kind, each in found.items()},
        load_s={kind: each.load_s for kind, each in found.items() if each is not None and each.load_s is not None},
    )


def _row_s(model: PlannedModel, endpoint: str, slo_s: float) -> float:
    sizes = {2**power for power in range(model.max_batch.bit_length())} | {model.max_batch}
    rows = max((size for size in sizes if model.batch_busy_s(size, endpoint) <= _BATCH_SLO_FRAC * slo_s), default=1)
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


@dataclass(frozen=True)
class Wanted:
    """What layouts are chosen for: rates in rows per second; `top_per_s` has to be reached, None: as much as can be.

    There may be up to `most` of them.
    """

    slo_s: float
    headroom: float
    top_per_s: float | None
    prior: RatePrior | None
    down_frac: float
    most: int = MOST_LAYOUTS


def layout_sets(
    cluster: Cluster,
    devices: Mapping[str, Profile],
    models: Mapping[str, PlannedModel],
    entries: Sequence[LadderEntry],
    wanted: Wanted,
    *,
    one_entry: bool,
) -> tuple[Sites, list[list[dict[str, dict[str, int]]]]]:
    """Sites, and alternatives to simulate: layouts (instances by endpoint and part) by rising rate.

    `entries` are those that may serve, `one_entry` says that one of them has to serve all rates. Among the alternatives
    are the layouts of plans with fewer candidates: of single models, and of one entry for all rates.

    Raises:
        UsageError: no entry can stand, with what is missing; or it is not known what memory a model takes.

    """
    sites = make_sites(cluster, devices, models, wanted.slo_s)
    several = len({room.kind for room in sites.rooms}) > 1
    careful = [make_sites(cluster, devices, models, wanted.slo_s, frac) for frac in _SLOW_SLO_FRACS if several]
    whole = everywhere(sites)
    if whole is not None and all(everywhere(each) is not None for each in careful):
        return sites, [[whole]]
    rows = _rows(sites, entries, wanted, one_entry=one_entry, thorough=True)
    if not rows:
        raise UsageError(_why_none(sites, entries))
    for each in careful:
        rows += _rows(each, entries, wanted, one_entry=one_entry, thorough=False)
    return sites, [row for index, row in enumerate(rows) if row not in rows[:index]]


def _rows(
    sites: Sites, entries: Sequence[LadderEntry], wanted: Wanted, *, one_entry: bool, thorough: bool
) -> list[list[dict[str, dict[str, int]]]]:
    """Alternatives on some sites; `thorough`: also those of plans with fewer candidates. Empty: nothing can stand."""
    found = _candidates(sites, entries)
    if not found:
        return []
    fluid = np.array([[_fluid_per_s(sites, each, entry) for entry in entries] for each in found])
    rates = _KEPT_FRAC * wanted.headroom * fluid
    runs = rates > 0.0
    together = (runs[:, None, :] & runs[None, :, :]).any(axis=2)
    singles = np.array([len(entry.stages) == 1 for entry in entries])
    every = np.ones(len(entries), bool)
    questions = [(every, one_entry)]
    if thorough and not one_entry:
        questions += [(every, True), (singles, False), (singles, True)]
    chosen: list[list[int]] = []
    for taken, alone in questions:
        if rates[:, taken].any():
            accuracy = np.array([entry.accuracy or 0.0 for entry in entries])[taken]
            ranked = _Ranked(rates[:, taken], accuracy, wanted, alone=alone)
            chosen += ranked.best(1 if alone else wanted.most, together)
    # the fluid figures may be wrong about which layout reaches the rate; this one goes furthest
    chosen.append([int(rates.max(axis=1).argmax())])
    return [[found[index] for index in row] for row in chosen]


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


class _Ranked:
    """Layouts by what they are worth one after the other; `rates_per_s` [layouts, entries], `accuracy` [entries]."""

    def __init__(
        self, rates_per_s: NDArray[np.float64], accuracy: NDArray[np.float64], wanted: Wanted, *, alone: bool
    ) -> None:
        """`alone`: one entry has to serve all rates."""
        self._max_per_s = rates_per_s.max(axis=1)
        highest = float(self._max_per_s.max())
        self._top_per_s = highest if wanted.top_per_s is None else min(highest, wanted.top_per_s)
        if alone:
            self._at_per_s, self._weight = np.array([_NEARLY * self._top_per_s]), np.ones(1)
        elif wanted.prior is None:
            self._at_per_s = self._top_per_s * (np.arange(_RATES) + 0.5) / _RATES
            self._weight = np.ones(_RATES)
        else:
            self._at_per_s = np.array([rate for rate, _ in wanted.prior])
            self._weight = np.array([rate * share for rate, share in wanted.prior])
        able = rates_per_s[:, :, None] >= self._at_per_s
        best = np.where(able, accuracy[None, :, None], -np.inf).max(axis=1)
        # above all of its rates a layout answers with the fastest of its entries
        fastest = accuracy[rates_per_s.argmax(axis=1)]
        self._accuracy = np.where(np.isfinite(best), best, fastest[:, None])
        self._in_force = self._at_per_s < wanted.down_frac * self._max_per_s[:, None]

    def best(self, most: int, together: NDArray[np.bool_]) -> list[list[int]]:
        """Best single layout; then two and three in a row, if each further one is worth its price."""
        last = [index for index, rate in enumerate(self._max_per_s) if rate >= _NEARLY * self._top_per_s]
        alone = max(last, key=lambda index: (self._worth([index]), -index))
        found = [[alone]]
        rows = [[index] for index in last]
        for _ in range(1, most):
            longer = [
                [index, *row]
                for row in sorted(rows, key=lambda row: -self._worth(row))[:_RATES]
                for index in range(len(self._max_per_s))
                if together[index, row[0]] and self._max_per_s[index] < _NEARLY * self._max_per_s[row[0]]
            ]
            if not longer:
                break
            best = max(longer, key=lambda row: (self._worth(row), [-index for index in row]))
            if self._worth(best) < self._worth(found[-1]) + LAYOUT_PRICE:
                break
            found.append(best)
            rows = longer
        return found

    def _worth(self, row: Sequence[int]) -> float:
        """Accuracy over rows of layouts by rising rate."""
        accuracy = self._accuracy[row[-1]]
        for index in reversed(row[:-1]):
            accuracy = np.where(self._in_force[index], self._accuracy[index], accuracy)
        return float(np.average(accuracy, weights=self._weight)) if self._weight.any() else 0.0
