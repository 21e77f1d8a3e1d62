"""Do gears stand still, follow surges and come back? `python -m benchmarks.policy`, on the compiled simulator.

A made plan of four gears whose ranges double, with cascades of falling work and a degraded gear above them, gets

- *steady* loads at 0.5, 0.75 and 0.9 of every gear's range for 20 minutes, counted after the first: the share of time
  in that gear, and switches per minute;
- *surges* to 8 times the rate, begun at any phase of a tick. Where at least 30 requests arrive in the first 0.3 s: is
  the gear of the new rate, or a higher one, in force by then? The rates are not those at which the surge ends on a
  border between two gears, where either would be right. Switches count from the start of the surge to 10 s after its
  end, per gear crossed;
- *overloads* of 3 times what the plan is for, so that requests queue up and expire: is the gear of the calm rate in
  force again within 30 s after a surge or an overload, and when?

All of it for single rows at two speeds, for requests of 64 rows, and for Gamma arrivals with a coefficient of
variation of 3, of which the plan states the index of dispersion, 9.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

# One core, whoever else measures on this machine: no thread pools behind numpy.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import click
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.policy_plan import DEGRADED, GEARS, RECORDS, Case, ends_per_s, make_simulator
from cascadeserve.artefacts import Artefact, write_json
from cascadeserve.replay import arrivals
from planner.host import describe_host
from planner.profile import Host
from planner.simulator import draw_load

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from planner.simulator import Load, Simulation, Simulator

RESULT = Path(__file__).parents[1] / "benchmarks" / "results" / "local" / "policy.json"
CASES = {
    "poisson": Case(top_per_s=2000.0),
    "poisson-slow": Case(top_per_s=400.0),
    "rows-64": Case(top_per_s=64 * 120.0, rows=64, load_frac=0.7, slo_services=20.0),
    "gamma": Case(top_per_s=2000.0, cv=3.0, load_frac=0.6, slo_services=80.0),
}
STEADY_SHARES = (0.5, 0.75, 0.9)
SURGE_SHARES = (0.6, 0.75, 0.9)
WARM_UP_S = 60.0
SURGE_FACTOR = 8.0
OVERLOAD_FACTOR = 3.0
FOLLOW_WITHIN_S = 0.3
FOLLOW_ARRIVALS = 30
BACK_WITHIN_S = 30.0
_SETTLED_AFTER_S = 10.0
_CALM_S = (60.0, 65.0)
_SURGE_S = 5.0
_OVERLOAD_S = 10.0


class Steady(Artefact, frozen=True, kw_only=True):
    """Worst run at one share of one gear's range; latency is the p95 as a share of the SLO."""

    gear: str
    share: float
    rate_per_s: float
    in_gear: float
    switches_per_min: float
    p95_of_slo: float


class Surges(Artefact, frozen=True, kw_only=True):
    """All surges from one rate; `counted` of `surges` had enough arrivals, `followed_within_s` is that of the slowest.

    switches_per_crossed: most switches in one surge, per gear between the two. back_s: the longest and the median time
    from the end of a surge until the gear of the calm rate was in force.
    """

    gear: str
    to_gear: str
    share: float
    rate_per_s: float
    to_rate_per_s: float
    surges: int
    counted: int
    followed: int
    followed_within_s: float | None
    switches_per_crossed: float
    mean_switches: float
    back_s: float | None
    median_back_s: float | None
    latched: int


class CaseResult(Artefact, frozen=True, kw_only=True):
    """One kind of load; what stands first is the worst of the tables after it, `followed` over all surges."""

    in_gear: float
    switches_per_min: float
    followed: float
    counted_surges: int
    switches_per_crossed: float
    back_s: float | None
    latched: int
    steady: list[Steady]
    surges: list[Surges]
    overloads: list[Surges]


class PolicyResult(Artefact, frozen=True, kw_only=True):
    """The whole run; `worst` is over all cases."""

    date: str
    command: str
    machine: Host
    seeds: int
    steady_s: float
    wall_s: float
    worst_in_gear: float
    worst_switches_per_min: float
    worst_switches_per_crossed: float
    latched: int
    cases: dict[str, CaseResult]


def hold(case: Case, rate_per_s: float, duration_s: float, rng: np.random.Generator) -> NDArray[np.float64]:
    """Times of the requests of a steady load, `rate_per_s` being that of rows."""
    if case.cv == 1.0:
        return arrivals.poisson(rate_per_s / case.rows, duration_s, rng)
    return arrivals.gamma(rate_per_s / case.rows, case.cv, duration_s, rng)


def steady(
    simulator: Simulator, case: Case, gear: int, share: float, *, seeds: Sequence[int], duration_s: float
) -> Steady:
    """Hold one rate."""
    ends = ends_per_s(case)
    rate_per_s = ends[gear] + share * (ends[gear + 1] - ends[gear])
    in_gear, switches, latency = [], [], []
    for seed in seeds:
        rng = np.random.default_rng([seed, gear, int(100 * share), 0])
        times_s = hold(case, rate_per_s, duration_s, rng)
        outcome = simulator.run(draw_load(times_s, duration_s, RECORDS, rng, (case.rows, case.rows)))
        gears = outcome.tick_gear[(outcome.tick_s > WARM_UP_S) & (outcome.tick_s <= duration_s)]
        in_gear.append(float(np.mean(gears == gear)))
        switches.append(np.count_nonzero(np.diff(gears)) * 60.0 / (duration_s - WARM_UP_S))
        latency.append(outcome.quantile_s(0.95, from_s=WARM_UP_S) / simulator.family.slo_s)
    return Steady(
        gear=GEARS[gear],
        share=share,
        rate_per_s=rate_per_s,
        in_gear=min(in_gear),
        switches_per_min=max(switches),
        p95_of_slo=max(latency),
    )


@dataclass(frozen=True)
class _Surge:
    """What one surge did."""

    arrivals: int
    followed_s: float
    switches: int
    back_s: float


def surges(
    simulator: Simulator, case: Case, gear: int, share: float, *, seeds: Sequence[int], count: int, overload: bool
) -> Surges:
    """Raise one rate `count` times per seed."""
    ends = ends_per_s(case)
    calm_per_s = ends[gear] + share * (ends[gear + 1] - ends[gear])
    surge_per_s = OVERLOAD_FACTOR * case.top_per_s if overload else SURGE_FACTOR * calm_per_s
    wanted = int(np.searchsorted(ends[1:], surge_per_s, side="right"))
    surge_s = _OVERLOAD_S if overload else _SURGE_S
    seen: list[_Surge] = []
    for seed in seeds:
        rng = np.random.default_rng([seed, gear, int(100 * share), 2 if overload else 1])
        load, starts_s = _surging(case, (calm_per_s, surge_per_s), surge_s, count, rng)
        outcome = simulator.run(load)
        seen.extend(_watch(outcome, start_s, start_s + surge_s, gear, wanted) for start_s in starts_s)
    counted = [surge for surge in seen if surge.arrivals >= FOLLOW_ARRIVALS]
    back_s = [surge.back_s for surge in seen]
    return Surges(
        gear=GEARS[gear],
        to_gear=GEARS[wanted],
        share=share,
        rate_per_s=calm_per_s,
        to_rate_per_s=surge_per_s,
        surges=len(seen),
        counted=len(counted),
        followed=sum(surge.followed_s <= FOLLOW_WITHIN_S for surge in counted),
        followed_within_s=_finite(max((surge.followed_s for surge in counted), default=np.inf)),
        switches_per_crossed=max(surge.switches for surge in seen) / (wanted - gear),
        mean_switches=float(np.mean([surge.switches for surge in seen])),
        back_s=_finite(max(back_s)),
        median_back_s=_finite(float(np.median(back_s))),
        latched=sum(each > BACK_WITHIN_S for each in back_s),
    )


def _finite(seconds: float) -> float | None:
    """Seconds, None for never."""
    return float(seconds) if np.isfinite(seconds) else None


def _surging(
    case: Case, rates_per_s: tuple[float, float], surge_s: float, count: int, rng: np.random.Generator
) -> tuple[Load, list[float]]:
    """Load of calm stretches with surges between them, and when the surges begin."""
    calm_per_s, surge_per_s = rates_per_s
    pieces, starts_s, now_s = [], [], 0.0
    for _ in range(count):
        calm_s = float(rng.uniform(*_CALM_S))
        pieces += [
            now_s + hold(case, calm_per_s, calm_s, rng),
            now_s + calm_s + hold(case, surge_per_s, surge_s, rng),
        ]
        starts_s.append(now_s + calm_s)
        now_s += calm_s + surge_s
    pieces.append(now_s + hold(case, calm_per_s, _CALM_S[0], rng))
    times_s = np.concatenate(pieces)
    return draw_load(times_s, now_s + _CALM_S[0], RECORDS, rng, (case.rows, case.rows)), starts_s


def _watch(outcome: Simulation, start_s: float, end_s: float, gear: int, wanted: int) -> _Surge:
    times_s, tick_s, gears = outcome.load.times_s, outcome.tick_s, outcome.tick_gear
    first, settled = np.searchsorted(tick_s, [start_s, end_s + _SETTLED_AFTER_S])
    followed = tick_s[(tick_s >= start_s) & (tick_s < end_s) & (gears >= wanted)]
    back = tick_s[(tick_s >= end_s) & (gears == gear)]
    return _Surge(
        arrivals=int(np.diff(np.searchsorted(times_s, [start_s, start_s + FOLLOW_WITHIN_S]))[0]),
        followed_s=float(followed[0]) - start_s if len(followed) else np.inf,
        switches=int(np.count_nonzero(np.diff(gears[first - 1 : settled]))),
        back_s=float(back[0]) - end_s if len(back) else np.inf,
    )


def measure(case: Case, *, seeds: Sequence[int], steady_s: float, count: int, name: str = "") -> CaseResult:
    """Measure one kind of load; `steady_s` and `count` are how long each steady load is and how many surges a run."""
    simulator = make_simulator(case)
    lines: list[Steady] = []
    risen: dict[bool, list[Surges]] = {False: [], True: []}
    for gear in track(range(DEGRADED), description=name, console=Console(stderr=True), transient=True):
        lines += [
            steady(simulator, case, gear, share, seeds=seeds, duration_s=steady_s + WARM_UP_S)
            for share in STEADY_SHARES
        ]
        for overload, found in risen.items():
            found += [
                surges(simulator, case, gear, share, seeds=seeds, count=count, overload=overload)
                for share in SURGE_SHARES
            ]
    every = risen[False] + risen[True]
    counted = sum(line.counted for line in risen[False])
    slowest = [line.back_s for line in every]
    return CaseResult(
        in_gear=min(line.in_gear for line in lines),
        switches_per_min=max(line.switches_per_min for line in lines),
        followed=sum(line.followed for line in risen[False]) / max(counted, 1),
        counted_surges=counted,
        switches_per_crossed=max(line.switches_per_crossed for line in risen[False]),
        back_s=None if None in slowest else max(seconds for seconds in slowest if seconds is not None),
        latched=sum(line.latched for line in every),
        steady=lines,
        surges=risen[False],
        overloads=risen[True],
    )


@click.command()
@click.option("--case", "names", multiple=True, type=click.Choice(list(CASES)), help="Default: all of them.")
@click.option("--seeds", type=click.IntRange(min=1), default=3, show_default=True)
@click.option("--steady-s", type=click.FloatRange(min=10.0), default=1200.0, show_default=True, help="After warm-up.")
@click.option("--surges", "count", type=click.IntRange(min=1), default=10, show_default=True, help="Per rate and seed.")
@click.option("--result", type=click.Path(path_type=Path), default=RESULT)
def main(names: tuple[str, ...], seeds: int, steady_s: float, count: int, result: Path) -> None:
    """Run all loads, write down what the gears did and print the worst of it."""
    started_s = time.perf_counter()
    found = {
        name: measure(CASES[name], seeds=range(seeds), steady_s=steady_s, count=count, name=name)
        for name in names or CASES
    }
    table = Table("load", "in gear", "switches/min", "surges", "followed", "switches/crossed", "back after", "latched")
    for name, case in found.items():
        table.add_row(
            name,
            f"{case.in_gear:.2%}",
            f"{case.switches_per_min:.2f}",
            str(case.counted_surges),
            f"{case.followed:.2%}",
            f"{case.switches_per_crossed:.2f}",
            "never" if case.back_s is None else f"{case.back_s:.1f} s",
            str(case.latched),
        )
    Console().print(table)
    document = PolicyResult(
        date=datetime.now(UTC).date().isoformat(),
        command=shlex.join(["python", "-m", "benchmarks.policy", *sys.argv[1:]]),
        machine=describe_host(),
        seeds=seeds,
        steady_s=steady_s,
        wall_s=time.perf_counter() - started_s,
        worst_in_gear=min(case.in_gear for case in found.values()),
        worst_switches_per_min=max(case.switches_per_min for case in found.values()),
        worst_switches_per_crossed=max(case.switches_per_crossed for case in found.values()),
        latched=sum(case.latched for case in found.values()),
        cases=found,
    )
    write_json(result, document)


if __name__ == "__main__":
    main()
