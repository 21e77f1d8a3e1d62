"""What the simulator says of a gear: the one place where the planner calls it.

All loads of one plan are made from the same random numbers. Arrivals are drawn once at one request per second; for a
rate they are cut to length and run faster. So two triggers, or two rates, differ in what they do and not in their luck.

Of a large cluster a sample is simulated (planner.sampling), so that the time a plan takes does not grow with it; only
at the end of its range is each gear predicted on all endpoints.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import msgspec
import numpy as np

from cascadeserve.errors import UsageError
from cascadeserve.replay import arrivals
from planner.sampling import sample

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from cascadeserve.gear_plan import Gear, GearPlan
    from planner.goal import FamilyGoal
    from planner.profile import Profile
    from planner.records import SearchRecords

# A sustained rate is one that holds this long; a rough answer needs less where many endpoints share the noise.
_SLOS = 50.0
_ROUGH_SLOS = 12.0
_FEW_ENDPOINTS = 2
# a load has at most so many requests; for many endpoints so many of each, as far as memory goes
_MOST_REQUESTS = 200_000
_MOST_PER_ENDPOINT = 50_000
_MOST_ROWS = 2_000_000
# as many rows as may come at once may come to one of the endpoints that are simulated
_BURST_PER_ENDPOINT = 4.0
_STEADY_S = 600.0
_STEADY_ROWS = 2_000_000
# many endpoints fill the window, in which the orchestrator counts, in a second
_STEADY_ROWS_OF_SAMPLE = 1_000_000
_STEADY_FROM_FRAC = 0.1


class Effort(NamedTuple):
    """How long a load is: both at least; `stream` names its random numbers.

    Of a cluster that has more of them, `endpoints` per sort are simulated, with their share of the rate.
    """

    requests: int
    duration_s: float
    stream: int
    endpoints: int


ROUGH = Effort(3_000, 0.0, 0, 4)
# other random numbers than those the triggers were chosen with, so that no lucky choice is believed
THOROUGH = Effort(15_000, 20.0, 1, 8)
CHECK = Effort(10_000, 10.0, 2, 8)
WHOLE = CHECK._replace(endpoints=sys.maxsize)


@dataclass(frozen=True)
class Prediction:
    """Latencies in seconds; `latency_s` is the one at the goal's percentile."""

    rate_per_s: float
    p50_s: float
    p95_s: float
    p99_s: float
    latency_s: float
    utilisation: float
    # latency_s within the SLO, nothing refused or cut short, no growing queue
    keeps: bool


class Predictor(Protocol):
    """What the search of gears asks."""

    def gear(self, gear: Gear, rate_per_s: float, effort: Effort) -> Prediction:
        """Predict a gear that stays in force at a steady rate."""
        ...

    def share_in_force(self, gears: Sequence[Gear], rate_per_s: float) -> float:
        """Share of the time in which the gear whose range holds a steady rate is in force."""
        ...

    def comes_down(self, gears: Sequence[Gear], calm_per_s: float, surge_per_s: float) -> bool:
        """Whether, after a surge, the gear whose range holds the calm rate is in force again."""
        ...


class MakePredictor(Protocol):
    """Makes a predictor; the arguments are those of `SimulatedGears`."""

    def __call__(
        self,
        plan: GearPlan,
        family: str,
        goal: FamilyGoal,
        records: SearchRecords,
        devices: Mapping[str, Profile],
        *,
        seed: int,
    ) -> Predictor:
        """Make it."""
        ...


class SimulatedGears:
    """The predictor that asks the simulator; `plan` has layout, models and ladder, its gears do not count."""

    def __init__(
        self,
        plan: GearPlan,
        family: str,
        goal: FamilyGoal,
        records: SearchRecords,
        devices: Mapping[str, Profile],
        *,
        seed: int,
    ) -> None:
        """`devices` is the profile of every endpoint, in the order of the cluster file; `seed` fixes every load."""
        self._plan = plan
        self._family = family
        self._goal = goal
        self._records = records
        self._devices = devices
        self._seed = seed
        self._samples: dict[tuple[bytes, str, int], Sample | None] = {}
        self._unit_times: dict[tuple[int, float, float], NDArray[np.float64]] = {}

    def gear(self, gear: Gear, rate_per_s: float, effort: Effort) -> Prediction:
        """Predict a gear that stays in force at a steady rate."""
        slo_s = self._plan.families[self._family].slo_s
        plan, devices, share = self._simulated((gear,), gear, effort.endpoints)
        requests_per_s = share * rate_per_s / self._goal.mean_rows
        rough = effort == ROUGH and len(devices) > _FEW_ENDPOINTS
        slos = _ROUGH_SLOS if rough else _SLOS
        duration_s = max(effort.requests / requests_per_s, effort.duration_s, slos * slo_s)
        more = 0.0 if rough else min(_MOST_PER_ENDPOINT * len(devices), _MOST_ROWS / self._goal.mean_rows)
        duration_s = min(duration_s, max(_MOST_REQUESTS, more) / requests_per_s)
        load = self._load(np.array([0.0, duration_s]), np.array([requests_per_s]), effort.stream, share)
        outcome = self._simulator(plan, (gear,), devices).run(load, hold_gear=gear.name)
        p50_s, p95_s, p99_s, latency_s = outcome.quantiles_s((0.5, 0.95, 0.99, self._goal.percentile))
        # By Little's law more requests than this wait only if they are late.
        growing = outcome.in_system_at_end > max(2.0, 2.0 * requests_per_s * slo_s)
        return Prediction(
            rate_per_s=rate_per_s,
            p50_s=p50_s,
            p95_s=p95_s,
            p99_s=p99_s,
            latency_s=latency_s,
            utilisation=max(
                busy_s / (duration_s * devices[endpoint].slots) for endpoint, busy_s in outcome.busy_s.items()
            ),
            keeps=latency_s <= slo_s and outcome.refused == 0 and not outcome.cut.any() and not growing,
        )

    def share_in_force(self, gears: Sequence[Gear], rate_per_s: float) -> float:
        """Share of the time in which the gear whose range holds a steady rate is in force."""
        place = _gear_at(gears, rate_per_s)
        plan, devices, share = self._simulated(gears, gears[place], CHECK.endpoints)
        rows_per_s = share * rate_per_s
        most_rows = _STEADY_ROWS if share == 1.0 else _STEADY_ROWS_OF_SAMPLE
        duration_s = min(_STEADY_S, most_rows / rows_per_s)
        requests_per_s = np.array([rows_per_s]) / self._goal.mean_rows
        load = self._load(np.array([0.0, duration_s]), requests_per_s, CHECK.stream, share)
        outcome = self._simulator(plan, _with_share(gears, share), devices).run(load)
        # not the start, in the lowest gear, nor what is left when the load has ended
        under_way = (outcome.tick_s > _STEADY_FROM_FRAC * duration_s) & (outcome.tick_s <= duration_s)
        return float(np.mean(outcome.tick_gear[under_way] == place))

    def comes_down(self, gears: Sequence[Gear], calm_per_s: float, surge_per_s: float) -> bool:
        """Whether, after a surge, the gear whose range holds the calm rate is in force again."""
        place = _gear_at(gears, calm_per_s)
        plan, devices, share = self._simulated(gears, gears[place], CHECK.endpoints)
        dwell_s = self._plan.switching.gear_dwell_s
        lengths_s = np.array([2.0, 2.0, 3.0 * dwell_s + 5.0])
        rates = share * np.array([calm_per_s, surge_per_s, calm_per_s]) / self._goal.mean_rows
        load = self._load(np.concatenate(([0.0], np.cumsum(lengths_s))), rates, THOROUGH.stream, share)
        outcome = self._simulator(plan, _with_share(gears, share), devices).run(load)
        calm = outcome.tick_s > lengths_s[0] + lengths_s[1] + dwell_s
        return bool(np.any(outcome.tick_gear[calm] <= place))

    def _simulated(self, gears: Sequence[Gear], of: Gear, most: int) -> tuple[GearPlan, Mapping[str, Profile], float]:
        """Plan and endpoints to simulate, and the share of the rate that they take in the gear `of`.

        What the orchestrator itself costs goes with the rate of all endpoints: where that is known there is no sample.
        """
        if any(profile.front is not None for profile in self._devices.values()):
            return self._plan, self._devices, 1.0
        burst_rows = self._goal.dispersion * self._goal.max_rows_per_request
        most = max(most, int(np.ceil(burst_rows / _BURST_PER_ENDPOINT)))
        alike = msgspec.json.encode([(gear.layout, gear.load) for gear in gears])
        key = (alike, of.ladder_entry, most)
        if key not in self._samples:
            family = self._plan.families[self._family]
            self._samples[key] = sample(self._plan, family, gears, of, self._devices, most)
        chosen = self._samples[key]
        if chosen is None:
            return self._plan, self._devices, 1.0
        devices = {name: profile for name, profile in self._devices.items() if name in chosen.layout.instances}
        return msgspec.structs.replace(self._plan, layouts=(chosen.layout,)), devices, chosen.share

    def _load(
        self, ends_s: NDArray[np.float64], requests_per_s: NDArray[np.float64], stream: int, share: float
    ) -> Load:
        """Load of a stepwise constant rate: `ends_s` [steps + 1] from 0, `requests_per_s` [steps].

        It is a `share` of all requests, drawn at random from them: of what comes together, as much as of the rest.
        """
        from planner.simulator import draw_load  # noqa: PLC0415 - see _simulator

        expected = np.concatenate(([0.0], np.cumsum(np.diff(ends_s) * requests_per_s)))
        unit = self._units(stream, expected[-1], _thinned(self._goal.dispersion, share))
        times_s = np.interp(unit[unit < expected[-1]], expected, ends_s)
        rng = np.random.default_rng([self._seed, stream, 1])
        rows = (self._goal.min_rows_per_request, self._goal.max_rows_per_request)
        return draw_load(times_s, float(ends_s[-1]), len(self._records), rng, rows_per_request=rows)

    def _units(self, stream: int, least: float, dispersion: float) -> NDArray[np.float64]:
        """Arrivals at one request per second, at least `least` of them."""
        length_s = max(_MOST_REQUESTS, 2.0 ** np.ceil(np.log2(least)))
        key = (stream, length_s, dispersion)
        if key not in self._unit_times:
            rng = np.random.default_rng([self._seed, stream, 0])
            # the index of dispersion of a renewal process is the squared coefficient of variation of its gaps
            cv = float(np.sqrt(dispersion))
            if cv == 1.0:
                self._unit_times[key] = arrivals.poisson(1.0, length_s, rng)
            else:
                self._unit_times[key] = arrivals.gamma(1.0, cv, length_s, rng)
        return self._unit_times[key]

    def _simulator(self, plan: GearPlan, gears: Sequence[Gear], devices: Mapping[str, Profile]) -> Simulator:
        try:
            # compiled code that `explain` and the tests of everything else need not load
            from planner.simulator import Simulator  # noqa: PLC0415
        except ModuleNotFoundError as error:
            raise UsageError(
                f"planning needs the package {error.name!r}: pip install 'cascadeserve[planner]'"
            ) from error
        family = plan.families[self._family]
        used = {gear.ladder_entry for gear in gears}
        # what no gear uses would only take time to prepare
        entries = tuple(entry for entry in family.ladder if entry.name in used)
        needed = {stage.model for entry in entries for stage in entry.stages}
        models = {name: model for name, model in family.models.items() if name in needed}
        family = msgspec.structs.replace(family, gears=tuple(gears), ladder=entries, models=models)
        named = {gear.layout for gear in gears}
        layouts = tuple(layout for layout in plan.layouts if layout.name in named)
        plan = msgspec.structs.replace(plan, families={self._family: family}, layouts=layouts)
        return Simulator(plan, self._family, self._records, devices)


def _thinned(dispersion: float, share: float) -> float:
    """Index of dispersion of requests drawn at random from others."""
    return dispersion if share == 1.0 else 1.0 + share * (dispersion - 1.0)


def _with_share(gears: Sequence[Gear], share: float) -> Sequence[Gear]:
    """Gears for a share of their rates."""
    if share == 1.0:
        return gears
    return [
        msgspec.structs.replace(
            gear,
            min_rate_per_s=share * gear.min_rate_per_s,
            max_rate_per_s=None if gear.max_rate_per_s is None else share * gear.max_rate_per_s,
        )
        for gear in gears
    ]


def _gear_at(gears: Sequence[Gear], rate_per_s: float) -> int:
    """Index of the gear whose range holds a rate."""
    return next(index for index, gear in enumerate(gears) if rate_per_s < gear.upper_rate_per_s)


if TYPE_CHECKING:
    from planner.sampling import Sample
    from planner.simulator import Load, Simulator
