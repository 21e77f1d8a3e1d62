"""The best and the worst plan of a small question, by trying all: nothing here chooses as the planner does.

What is tried, with the predictor, the ladder and the tuning of triggers that the planner has, too:

- every layout whose endpoints are filled so that nothing more fits (with `benchmarks.fluid` more never does harm);
- every chain of one to three of them with rising highest rates, each of which can become the next one and the former;
- in each layout every assignment of ladder entries to the rates of the prior that it serves, and every entry that
  carries on to its highest rate. A range that begins where another one ends is as wide as `planner.gears` asks; the
  lower end of a range is as high as it may be, since that leaves most room below.

The highest rate counts first. Then counts the **value**: the accuracy over rows at the rates of the prior, less what
the planner says that it asks for each gear and for each further layout. Gears count that are in force at a rate of the
prior, or at the highest rate of their layout; an entry with two sorts of triggers is one.
"""

from __future__ import annotations

import functools
import math
from collections import deque
from dataclasses import dataclass, replace
from itertools import combinations, combinations_with_replacement, groupby, product
from typing import TYPE_CHECKING

from cascadeserve.gear_plan import Layout
from planner.gears import GEAR_PRICE, least_width_per_s
from planner.rank_layouts import LAYOUT_PRICE
from planner.triggers import Device, tune

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from cascadeserve.cluster import Endpoint
    from cascadeserve.gear_plan import GearPlan, LadderEntry
    from planner.inputs import Inputs
    from planner.predict import Predictor

Instances = dict[str, dict[str, int]]
# a lower layout is in force up to this share of its highest rate, and ends at this share of the next one's at most
DOWN_FRAC = 0.8
_LOWER_FRAC = 0.98
_SAME = 1e-9
_MOST_LAYOUTS = 3


@dataclass(frozen=True)
class Served:
    """An entry that serves alone in a layout up to a rate, in rows per second."""

    entry: LadderEntry
    upper_per_s: float


@dataclass(frozen=True)
class Stretch:
    """Gears of a layout for some rates of the prior in a row: where they end, and what they are worth."""

    top_per_s: float
    value: float
    # (layout, ladder entry, where its range ends) from the highest rate down
    gears: tuple[tuple[str, str, float], ...]


@dataclass(frozen=True)
class Bounds:
    """The highest rate that any plan reaches, and the values of the best and the worst plans that reach it."""

    top_per_s: float
    least_top_per_s: float
    best: float
    worst: float
    num_layouts: int
    best_gears: tuple[tuple[str, str, float], ...]


class BruteForce:
    """All plans of one question; `draft` is a plan with its models and its whole ladder."""

    def __init__(
        self, inputs: Inputs, draft: GearPlan, predict: Callable[[Sequence[Layout]], Predictor], *, floor: float
    ) -> None:
        """`predict` makes the predictor for some layouts; entries below the `floor` in accuracy may not serve."""
        family = draft.families[inputs.family]
        self._inputs = inputs
        self._goal = inputs.goal
        self._accuracy = {entry.name: entry.accuracy or 0.0 for entry in family.ladder}
        entries = [entry for entry in family.ladder if self._accuracy[entry.name] >= floor]
        self._endpoints = inputs.cluster.endpoints
        self._sizes = {
            kind: {name: model.memory_bytes or 0 for name, model in profile.models.items()}
            for kind, profile in inputs.profiles.items()
        }
        self._prior = inputs.prior or ()
        total = sum(rate * share for rate, share in self._prior)
        self._weights = [rate * share / total for rate, share in self._prior]
        self.layouts = [
            Layout(name=f"layout-{number}", instances=instances)
            for number, instances in enumerate(self._all_layouts(list(family.models)))
        ]
        device = Device(
            models=family.models,
            slots={endpoint.name: endpoint.slots for endpoint in self._endpoints},
            slo_s=family.slo_s,
            layout="",
        )
        predictor = predict(self.layouts)
        self.served = [self._served(entries, replace(device, layout=each.name), predictor) for each in self.layouts]
        self._linked: dict[tuple[int, int], bool] = {}
        self._width_per_s = functools.cache(lambda upper_per_s: least_width_per_s(upper_per_s, inputs.goal))

    def top_per_s(self) -> float:
        """Highest rate that any layout reaches; 0: there is no plan."""
        return max((served.upper_per_s for here in self.served for served in here), default=0.0)

    def bounds(self) -> Bounds:
        """Try all plans."""
        top_per_s = self.top_per_s()
        least = min(served.upper_per_s for here in self.served for served in here)
        best, worst = (self._best(top_per_s, sign) for sign in (1.0, -1.0))
        return Bounds(top_per_s, least, best.value, -worst.value, len(self.layouts), best.gears)

    def _all_layouts(self, models: Sequence[str]) -> Iterator[Instances]:
        ways = {endpoint.name: self._fullest(endpoint, models) for endpoint in self._endpoints}

        def sort_of(endpoint: Endpoint) -> tuple[str, int, int]:
            return endpoint.kind, endpoint.slots, endpoint.memory_bytes or 0

        alike = [list(group) for _, group in groupby(sorted(self._endpoints, key=sort_of), key=sort_of)]
        for chosen in product(*(combinations_with_replacement(ways[group[0].name], len(group)) for group in alike)):
            yield {
                endpoint.name: counts
                for group, taken in zip(alike, chosen, strict=True)
                for endpoint, counts in zip(group, taken, strict=True)
            }

    def _fullest(self, endpoint: Endpoint, models: Sequence[str]) -> list[dict[str, int]]:
        sizes = self._sizes[endpoint.kind]
        room = math.inf if endpoint.memory_bytes is None else endpoint.memory_bytes
        fitting = [
            counts
            for counts in product(range(endpoint.slots + 1), repeat=len(models))
            if sum(count * sizes[name] for name, count in zip(models, counts, strict=True)) <= room
        ]
        fullest = [
            counts
            for counts in fitting
            if not any(
                other != counts and all(more >= count for more, count in zip(other, counts, strict=True))
                for other in fitting
            )
        ]
        return [{name: count for name, count in zip(models, counts, strict=True) if count} for counts in fullest]

    def _served(self, entries: Sequence[LadderEntry], device: Device, predictor: Predictor) -> list[Served]:
        """Entries that can serve in a layout, without those that another one beats in both rate and accuracy."""
        found: list[Served] = []
        for entry in entries:
            sustained = [tuned.sustained_per_s for tuned in tune(entry, device, predictor)]
            if sustained:
                upper_per_s = self._goal.headroom * max(sustained)
                found.append(Served(entry, min(upper_per_s, self._goal.max_rate_per_s or math.inf)))
        return found

    def _beaten(self, served: Served, others: Sequence[Served], sign: float) -> bool:
        def rank(each: Served) -> tuple[float, float, str]:
            return sign * self._accuracy[each.entry.name], each.upper_per_s, each.entry.name

        mine = rank(served)
        return any(rank(other) > mine and rank(other)[:2] >= mine[:2] and rank(other)[1] >= mine[1] for other in others)

    def _best(self, top_per_s: float, sign: float) -> Stretch:
        """The value, times the sign, of the best chain of layouts; with sign -1 of the worst."""
        useful = [[each for each in here if not self._beaten(each, here, sign)] for here in self.served]
        count = len(self._prior)
        last = {
            (index, first): self._last(index, here, first, top_per_s, sign)
            for index, here in enumerate(useful)
            for first in range(count + 1)
        }
        lower = {
            (index, first, end): self._lower(index, here, first, end, top_per_s, sign)
            for index, here in enumerate(useful)
            for first, end in combinations(range(count + 1), 2)
        }
        # chains of up to `length` layouts that serve from a rate on, by the first of them
        chains: dict[tuple[int, int], dict[int, Stretch]] = {}
        for length in range(1, _MOST_LAYOUTS + 1):
            for first in range(count + 1):
                found: dict[int, Stretch] = {}
                for index in range(len(useful)):
                    ways = [last[index, first]]
                    ways += [
                        self._above(lower[index, first, end], index, chains[length - 1, end], sign)
                        for end in range(first + 1, count + 1 if length > 1 else 0)
                    ]
                    kept = [way for way in ways if way is not None]
                    if kept:
                        found[index] = max(kept, key=lambda way: way.value)
                chains[length, first] = dict(sorted(found.items(), key=lambda item: -item[1].value))
        return next(iter(chains[_MOST_LAYOUTS, 0].values()))

    def _above(self, lower: Stretch | None, index: int, higher: Mapping[int, Stretch], sign: float) -> Stretch | None:
        """The best of some chains that may follow a layout, which are from the best down."""
        if lower is None:
            return None
        for following, rest in higher.items():
            if (
                following != index
                and lower.top_per_s <= _LOWER_FRAC * rest.top_per_s
                and self._is_linked(index, following)
                and self._is_linked(following, index)
            ):
                value = lower.value + rest.value - sign * LAYOUT_PRICE
                return Stretch(lower.top_per_s, value, (*rest.gears, *lower.gears))
        return None

    def _last(self, index: int, useful: Sequence[Served], first: int, top_per_s: float, sign: float) -> Stretch | None:
        """Best gears for the rates from `first` on in a layout that reaches the highest rate."""
        rates = [rate for rate, _ in self._prior]
        # what is above all ranges is served like the highest rate
        end = max(first, sum(rate < top_per_s for rate in rates))
        best: Stretch | None = None
        for carrying in useful:
            if carrying.upper_per_s < top_per_s * (1.0 - _SAME):
                continue
            above = sign * self._accuracy[carrying.entry.name] * sum(self._weights[end:])
            for value, gears in self._below(index, useful, carrying, top_per_s, first, end, sign, alone=True):
                if best is None or above + value > best.value:
                    best = Stretch(top_per_s, above + value, gears)
        return best

    def _lower(
        self, index: int, useful: Sequence[Served], first: int, end: int, top_per_s: float, sign: float
    ) -> Stretch | None:
        """Best gears for some rates in a layout that ends where the next one takes over."""
        rates = [rate for rate, _ in self._prior]
        least_per_s = rates[end - 1] / DOWN_FRAC
        most_per_s = rates[end] / DOWN_FRAC if end < len(rates) else math.inf
        best: Stretch | None = None
        for carrying in useful:
            ends_per_s = min(carrying.upper_per_s, most_per_s, _LOWER_FRAC * top_per_s)
            if ends_per_s <= least_per_s:
                continue
            for value, gears in self._below(index, useful, carrying, ends_per_s, first, end, sign, alone=True):
                if best is None or value > best.value:
                    best = Stretch(ends_per_s, value, gears)
        return best

    def _below(
        self,
        index: int,
        useful: Sequence[Served],
        gear: Served,
        upper_per_s: float,
        first: int,
        end: int,
        sign: float,
        *,
        alone: bool,
    ) -> Iterator[tuple[float, tuple[tuple[str, str, float], ...]]]:
        """Values of a gear that ends at a rate and of all that may stand below it, for rates `first` to `end`."""
        accuracy = sign * self._accuracy[gear.entry.name]
        value = -sign * GEAR_PRICE
        here = (self.layouts[index].name, gear.entry.name, upper_per_s)
        width_per_s = self._width_per_s(upper_per_s)
        # it goes down to 0
        if alone or upper_per_s >= width_per_s:
            yield value + accuracy * sum(self._weights[first:end]), (here,)
        for mine in range(end, first, -1):
            # the rates from `mine` on are its own, those before are served further down
            if mine < end:
                value += accuracy * self._weights[mine]
            highest_per_s = upper_per_s - width_per_s
            if mine < len(self._prior):
                highest_per_s = min(highest_per_s, self._prior[mine][0])
            for below in useful:
                ends_per_s = min(highest_per_s, below.upper_per_s)
                if below is not gear and ends_per_s > self._prior[mine - 1][0]:
                    for rest, gears in self._below(index, useful, below, ends_per_s, first, mine, sign, alone=False):
                        yield value + rest, (here, *gears)

    def _is_linked(self, former: int, target: int) -> bool:
        """Whether some entry that serves in a layout can serve all the while until the other one stands."""
        if (former, target) not in self._linked:
            self._linked[former, target] = any(
                self._leads(served.entry, self.layouts[former].instances, self.layouts[target].instances)
                for served in self.served[former]
            )
        return self._linked[former, target]

    def _leads(
        self, entry: LadderEntry, former: Mapping[str, Mapping[str, int]], target: Mapping[str, Mapping[str, int]]
    ) -> bool:
        """Whether the models of an entry can be moved one by one, all else being unloaded first and loaded last."""
        models = [stage.model for stage in entry.stages]

        def of(instances: Mapping[str, Mapping[str, int]]) -> tuple[tuple[bool, ...], ...]:
            return tuple(
                tuple(bool(instances[endpoint.name].get(model)) for model in models) for endpoint in self._endpoints
            )

        def allowed(state: tuple[tuple[bool, ...], ...]) -> bool:
            stand = all(any(row[place] for row in state) for place in range(len(models)))
            return stand and all(
                endpoint.memory_bytes is None
                or sum(self._sizes[endpoint.kind][model] for model, here in zip(models, row, strict=True) if here)
                <= endpoint.memory_bytes
                for endpoint, row in zip(self._endpoints, state, strict=True)
            )

        start, goal = of(former), of(target)
        if not (allowed(start) and allowed(goal)):
            return False
        seen, waiting = {start}, deque([start])
        while waiting:
            state = waiting.popleft()
            if state == goal:
                return True
            for row, place in product(range(len(state)), range(len(models))):
                flipped = tuple(here != (at == place) for at, here in enumerate(state[row]))
                after = (*state[:row], flipped, *state[row + 1 :])
                if after not in seen and allowed(after):
                    seen.add(after)
                    waiting.append(after)
        return False


def value_of(plan: GearPlan, inputs: Inputs, *, priced: bool = True) -> tuple[float, float]:
    """Highest rate and value of a plan that the planner made, by the same rule."""
    family = plan.families[inputs.family]
    accuracy = {entry.name: entry.accuracy or 0.0 for entry in family.ladder}
    gears = {layout.name: [gear for gear in family.gears if gear.layout == layout.name] for layout in plan.layouts}
    tops = {name: max(gear.max_rate_per_s or 0.0 for gear in here if not gear.degraded) for name, here in gears.items()}
    last = plan.layouts[-1].name
    used = {
        (name, max((gear for gear in here if not gear.degraded), key=lambda gear: gear.min_rate_per_s).ladder_entry)
        for name, here in gears.items()
    }
    prior = inputs.prior or ()
    total = sum(rate * share for rate, share in prior)
    value = 0.0
    for rate, share in prior:
        layout = next(name for name, top in tops.items() if name == last or rate < DOWN_FRAC * top)
        entry = next(
            gear.ladder_entry for gear in gears[layout] if gear.max_rate_per_s is None or rate < gear.max_rate_per_s
        )
        value += rate * share / total * accuracy[entry]
        # the degraded gear is the last one's entry
        used.add((layout, entry))
    if priced:
        value -= GEAR_PRICE * len(used) + LAYOUT_PRICE * (len(plan.layouts) - 1)
    return tops[last], value
