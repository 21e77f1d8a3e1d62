"""Do certificates come true? `python -m benchmarks.coverage` resamples real predictions and counts.

The rows of a family stand for a finite population, in which the gap of every cascade is known. One resample draws
search rows and calibration rows from it, independently and with replacement, and goes the way of the planner: search,
ladder, freeze, certify. Claims about the entries of the ladder are then held against the population:

- *certified*: the certificate of the frozen ladder from the calibration rows, all entries at once at 1 - delta;
- *in-sample*: plain selection on all rows of the resample: a ladder is chosen on search and calibration rows together,
  and each entry is said to lose what it lost there;
- *reused*: the certificate of that second ladder from the very rows on which it was chosen. For the reader: it may hold
  by the slack of the bounds, but nothing says that it does.

A claim is violated when any entry loses more in the population than it says. The certificate passes when the one-sided
99 % lower bound of its violation rate is at most delta; the in-sample claim must fail the same test, or the test could
not tell. The summary over families is left out when a family is absent.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

# One core, whoever else measures on this machine: no thread pools behind numpy.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import click
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.populations import FAMILIES, ROOT, Population, exceeded, present
from cascadeserve.artefacts import Artefact, write_json
from planner.bounds import rate_lower
from planner.host import describe_host
from planner.profile import Host

RESULT = ROOT / "benchmarks" / "results" / "local" / "coverage.json"
CONFIDENCE = 0.99


class ClaimResult(Artefact, frozen=True, kw_only=True):
    """How often a claim was violated; `rate_lower_99` is the one-sided 99 % lower bound of the violation rate."""

    violations: int
    rate: float
    rate_lower_99: float
    within_delta: bool


class FamilyResult(Artefact, frozen=True, kw_only=True):
    """One family: rows of its population and of each split, and the claims; means and medians are over resamples."""

    population_rows: int
    split_rows: int
    models: tuple[str, ...]
    resamples: int
    mean_ladder_entries: float
    median_max_epsilon: float
    median_max_gap: float
    certified: ClaimResult
    in_sample: ClaimResult
    reused: ClaimResult
    wall_s: float


class CoverageResult(Artefact, frozen=True, kw_only=True):
    """The whole run; the two summaries are the lower bounds that decide, None when a family is absent."""

    date: str
    command: str
    machine: Host
    delta: float
    seed: int
    families: dict[str, FamilyResult]
    largest_certified_rate_lower_99: float | None
    smallest_in_sample_rate_lower_99: float | None


def measure(population: Population, *, split_rows: int, resamples: int, delta: float, seed: int) -> FamilyResult:
    """Resample one family `resamples` times, with `split_rows` rows in each of the two splits."""
    started_s = time.perf_counter()
    records, rng = population.records, np.random.default_rng(seed)
    violations = {"certified": 0, "in_sample": 0, "reused": 0}
    entries, epsilons, largest_gaps = [], [], []
    for _ in track(range(resamples), description=records.family, console=Console(stderr=True), transient=True):
        search_rows, calibration_rows = rng.integers(len(records), size=(2, split_rows))
        frozen = population.choose(search_rows)
        epsilon = population.epsilons(frozen, calibration_rows, delta)
        truth = population.gaps(frozen)
        violations["certified"] += exceeded(epsilon, truth)
        entries.append(len(frozen.ladder))
        epsilons.append(max(epsilon.values()))
        largest_gaps.append(max(truth.values()))

        all_rows = np.concatenate([search_rows, calibration_rows])
        frozen = population.choose(all_rows)
        truth = population.gaps(frozen)
        violations["in_sample"] += exceeded(population.gaps(frozen, all_rows), truth)
        violations["reused"] += exceeded(population.epsilons(frozen, all_rows, delta), truth)
    claims = {name: judged(count, resamples, delta) for name, count in violations.items()}
    return FamilyResult(
        population_rows=len(records),
        split_rows=split_rows,
        models=tuple(records.models),
        resamples=resamples,
        mean_ladder_entries=float(np.mean(entries)),
        median_max_epsilon=float(np.median(epsilons)),
        median_max_gap=float(np.median(largest_gaps)),
        certified=claims["certified"],
        in_sample=claims["in_sample"],
        reused=claims["reused"],
        wall_s=time.perf_counter() - started_s,
    )


def judged(violations: int, resamples: int, delta: float) -> ClaimResult:
    """Judge a claim by how often it was violated."""
    lower = rate_lower(violations, resamples, 1.0 - CONFIDENCE)
    return ClaimResult(
        violations=violations, rate=violations / resamples, rate_lower_99=lower, within_delta=lower <= delta
    )


@click.command()
@click.option("--family", "families", multiple=True, type=click.Choice(list(FAMILIES)), help="Default: all of them.")
@click.option("--resamples", type=click.IntRange(min=1), default=2000, show_default=True)
@click.option("--split-rows", type=click.IntRange(min=10), default=1000, show_default=True)
@click.option("--delta", type=click.FloatRange(0, 1, min_open=True, max_open=True), default=0.05, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--result", type=click.Path(path_type=Path), default=RESULT)
def main(families: tuple[str, ...], resamples: int, split_rows: int, delta: float, seed: int, result: Path) -> None:
    """Count how often certificates are violated, and write it down."""
    wanted = families or tuple(FAMILIES)
    found = {
        name: measure(population, split_rows=split_rows, resamples=resamples, delta=delta, seed=seed)
        for name, population in present(wanted, lambda line: click.echo(line, err=True))
    }
    table = Table("family", "violated", "99 % lower bound", "in-sample", "reused", "max epsilon", "max gap", "s")
    for name, family in found.items():
        table.add_row(
            name,
            f"{family.certified.rate:.2%}",
            f"{family.certified.rate_lower_99:.2%}",
            f"{family.in_sample.rate:.1%}",
            f"{family.reused.rate:.1%}",
            f"{family.median_max_epsilon:.2%}",
            f"{family.median_max_gap:.2%}",
            f"{family.wall_s:.0f}",
        )
    Console().print(table)
    whole = len(found) == len(set(wanted))
    document = CoverageResult(
        date=datetime.now(UTC).date().isoformat(),
        command=shlex.join(["python", "-m", "benchmarks.coverage", *sys.argv[1:]]),
        machine=describe_host(),
        delta=delta,
        seed=seed,
        families=found,
        largest_certified_rate_lower_99=max(f.certified.rate_lower_99 for f in found.values()) if whole else None,
        smallest_in_sample_rate_lower_99=min(f.in_sample.rate_lower_99 for f in found.values()) if whole else None,
    )
    write_json(result, document)


if __name__ == "__main__":
    main()
