"""Do certificates hold on rows that nobody looked at? `python -m benchmarks.held_out` splits and counts.

The rows of a family are divided at random into search, calibration and test thirds, many times. On the first two the
planner goes its way: search, ladder, freeze, certify. The test third then bears witness. Rows in it are few, so a claim
counts as violated only when the one-sided 95 % lower bound of what some entry loses there exceeds what is claimed:

- *harm*: certificates on harm alone (reference right, cascade wrong; repair share 0) against harm on test;
- *gap*: certificates as the planner makes them, on harm minus repairs, against harm minus repairs on test. Such an
  epsilon may rightly lie below the harm, which is why each kind of certificate is held against its own;
- *in-sample*: plain selection, a ladder chosen on search and calibration rows together and said to lose what it lost
  there, against harm minus repairs on test. For the reader: it shows that the test can tell.

The share of splits with a violation must be at most delta for the first two, in each family. The summary over families
is left out when a family is absent.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

# One core, whoever else measures on this machine: no thread pools behind numpy.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import click
import msgspec
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.populations import FAMILIES, ROOT, Population, exceeded, present
from cascadeserve.artefacts import Artefact, write_json
from planner.bounds import gap_upper, harms, rate_lower, repairs
from planner.cascade_rows import cascade_answers
from planner.host import describe_host
from planner.profile import Host

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from planner.certificate import FrozenLadder

RESULT = ROOT / "benchmarks" / "results" / "local" / "held_out.json"
# probability with which a lower bound on test may be too high
_DOUBT = 0.05


class ClaimResult(Artefact, frozen=True, kw_only=True):
    """How many splits violated a claim, and their share."""

    violations: int
    share: float


class FamilyResult(Artefact, frozen=True, kw_only=True):
    """One family: its rows, those of each third, and the claims; means and medians are over splits."""

    population_rows: int
    third_rows: int
    models: tuple[str, ...]
    splits: int
    mean_ladder_entries: float
    median_max_epsilon: float
    median_max_test_gap: float
    harm: ClaimResult
    gap: ClaimResult
    in_sample: ClaimResult
    wall_s: float


class HeldOutResult(Artefact, frozen=True, kw_only=True):
    """The whole run; `worst_share` is over families and both certificates, None when a family is absent."""

    date: str
    command: str
    machine: Host
    delta: float
    seed: int
    families: dict[str, FamilyResult]
    worst_share: float | None


def measure(population: Population, *, splits: int, delta: float, seed: int) -> FamilyResult:
    """Split one family `splits` times."""
    started_s = time.perf_counter()
    records, rng = population.records, np.random.default_rng(seed)
    violations = {"harm": 0, "gap": 0, "in_sample": 0}
    entries, epsilons, largest_gaps = [], [], []
    for _ in track(range(splits), description=records.family, console=Console(stderr=True), transient=True):
        search_rows, calibration_rows, test_rows = thirds(len(records), rng)
        frozen = population.choose(search_rows)
        epsilon = population.epsilons(frozen, calibration_rows, delta)
        on_harm = population.epsilons(msgspec.structs.replace(frozen, repair_share=0.0), calibration_rows, delta)
        harm, gap = lower_bounds(population, frozen, test_rows)
        violations["harm"] += exceeded(on_harm, harm)
        violations["gap"] += exceeded(epsilon, gap)
        entries.append(len(frozen.ladder))
        epsilons.append(max(epsilon.values()))
        largest_gaps.append(max(population.gaps(frozen, test_rows).values()))

        seen_rows = np.concatenate([search_rows, calibration_rows])
        frozen = population.choose(seen_rows)
        _, gap = lower_bounds(population, frozen, test_rows)
        violations["in_sample"] += exceeded(population.gaps(frozen, seen_rows), gap)
    claims = {name: ClaimResult(violations=count, share=count / splits) for name, count in violations.items()}
    return FamilyResult(
        population_rows=len(records),
        third_rows=len(records) // 3,
        models=tuple(records.models),
        splits=splits,
        mean_ladder_entries=float(np.mean(entries)),
        median_max_epsilon=float(np.median(epsilons)),
        median_max_test_gap=float(np.median(largest_gaps)),
        harm=claims["harm"],
        gap=claims["gap"],
        in_sample=claims["in_sample"],
        wall_s=time.perf_counter() - started_s,
    )


def thirds(num_rows: int, rng: np.random.Generator) -> tuple[NDArray[np.int64], ...]:
    """Divide rows 0 .. num_rows - 1 at random into three parts of one size; up to two rows are left over."""
    third = num_rows // 3
    return tuple(rng.permutation(num_rows)[: 3 * third].reshape(3, third))


def lower_bounds(
    population: Population, frozen: FrozenLadder, test_rows: NDArray[np.int64]
) -> tuple[dict[str, float], dict[str, float]]:
    """Lower bounds (95 %, one-sided, exact) from test rows: of the harm of every entry, and of its gap."""
    records = population.records.take(test_rows)
    reference = records.models[frozen.reference_model].label
    harm, gap = {}, {}
    for entry in frozen.ladder:
        label = cascade_answers(entry, records).label
        harmed = int(harms(label, reference, records.truth).sum())
        repaired = int(repairs(label, reference, records.truth).sum())
        harm[entry.name] = rate_lower(harmed, len(records), _DOUBT)
        # The gap from below is the gain, repairs minus harm, from above; half of the doubt goes to each.
        gap[entry.name] = -gap_upper(repaired, harmed, len(records), _DOUBT, repair_share=0.5)
    return harm, gap


@click.command()
@click.option("--family", "families", multiple=True, type=click.Choice(list(FAMILIES)), help="Default: all of them.")
@click.option("--splits", type=click.IntRange(min=1), default=200, show_default=True)
@click.option("--delta", type=click.FloatRange(0, 1, min_open=True, max_open=True), default=0.05, show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option("--result", type=click.Path(path_type=Path), default=RESULT)
def main(families: tuple[str, ...], splits: int, delta: float, seed: int, result: Path) -> None:
    """Count how often certificates do not hold on test rows, and write it down."""
    wanted = families or tuple(FAMILIES)
    found = {
        name: measure(population, splits=splits, delta=delta, seed=seed)
        for name, population in present(wanted, lambda line: click.echo(line, err=True))
    }
    table = Table("family", "harm", "gap", "in-sample", "max epsilon", "max test gap", "s")
    for name, family in found.items():
        table.add_row(
            name,
            f"{family.harm.share:.1%}",
            f"{family.gap.share:.1%}",
            f"{family.in_sample.share:.1%}",
            f"{family.median_max_epsilon:.2%}",
            f"{family.median_max_test_gap:.2%}",
            f"{family.wall_s:.0f}",
        )
    Console().print(table)
    shares = [claim.share for family in found.values() for claim in (family.harm, family.gap)]
    document = HeldOutResult(
        date=datetime.now(UTC).date().isoformat(),
        command=shlex.join(["python", "-m", "benchmarks.held_out", *sys.argv[1:]]),
        machine=describe_host(),
        delta=delta,
        seed=seed,
        families=found,
        worst_share=max(shares) if len(found) == len(set(wanted)) else None,
    )
    write_json(result, document)


if __name__ == "__main__":
    main()
