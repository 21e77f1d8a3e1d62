"""The same load against three systems: sustained rates, one after the other, and in tier full in interleaved pairs."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from typing import IO, TYPE_CHECKING, Literal

from cascadeserve.demo.family import BASELINE_CONFIG, FAMILY, REFERENCE, REPOSITORY
from cascadeserve.demo.judging import median_range
from cascadeserve.demo.measuring import System
from cascadeserve.demo.rate_search import Found, search, search_near
from cascadeserve.demo.report import Pair, SystemResult
from cascadeserve.local_stack import LocalStack

if TYPE_CHECKING:
    import contextlib
    from pathlib import Path

    from cascadeserve.demo.measuring import Run, RunFolder
    from cascadeserve.demo.plans import PlanPair
    from cascadeserve.demo.steps import Steps

Name = Literal["best_single_direct", "best_single", "cascade"]
NAMES: tuple[Name, ...] = ("best_single_direct", "best_single", "cascade")
_PAIRS = 5


@dataclass
class Findings:
    """Runs and results of a system so far; `confirmed` are the runs that rates rest on."""

    system: System
    predicted_per_s: float
    found: Found | None = None
    runs: list[Run] = field(default_factory=list)
    confirmed: list[Run] = field(default_factory=list)
    rates_per_s: list[float] = field(default_factory=list)

    @property
    def rate_per_s(self) -> float:
        """The sustained rate: 0 where none was confirmed, the median where it was found several times."""
        return statistics.median(self.rates_per_s) if self.rates_per_s else 0.0

    def add(self, found: Found, runs: list[Run]) -> None:
        """Add what one search found."""
        self.found = found
        self.runs += runs
        self.rates_per_s.append(found.rate_per_s or 0.0)
        sure = [run for run in runs if (run.probe.kind, run.probe.verdict) == ("confirmation", "sustained")]
        self.confirmed += [run for run in sure if run.probe.rate_per_s == found.rate_per_s][-1:]

    def result(self) -> SystemResult:
        """What the report says; p95, accuracy and ledger of the confirming run with the median p95."""
        by_p95 = sorted(self.confirmed, key=lambda run: run.probe.p95_s or 0.0)
        middle = by_p95[(len(by_p95) - 1) // 2].probe if by_p95 else None
        return SystemResult(
            sustained_rows_per_s=self.rate_per_s,
            p95_s=middle.p95_s if middle else None,
            accuracy=middle.accuracy if middle else None,
            ledger=middle.ledger if middle else None,
            limited_by=self.found.limited_by if self.found else "nothing",
            probes=tuple(run.probe for run in self.runs),
        )


@dataclass(frozen=True)
class Bench:
    """What all measurements share: where servers keep their files, the rows of the load and where its output goes."""

    state: Path
    rows: Path
    log: IO[bytes]

    def findings(
        self, plans: PlanPair, runs: RunFolder, servers: contextlib.AsyncExitStack, note: str = ""
    ) -> dict[Name, Findings]:
        """The three systems under the plans' SLO, with nothing found yet; `note` tells their runs from others.

        They use the same files as those of another SLO, so only the systems of one SLO run at a time.
        """
        direct = LocalStack(
            self.state / "direct", repository=REPOSITORY, models=[REFERENCE], config_name=BASELINE_CONFIG
        )
        single = LocalStack(self.state / "single", repository=REPOSITORY, plan=plans.single)
        cascade = LocalStack(self.state / "cascade", repository=REPOSITORY, plan=plans.cascade)
        served: dict[Name, tuple[LocalStack, str, float]] = {
            "best_single_direct": (direct, REFERENCE, plans.single_per_s),
            "best_single": (single, FAMILY, plans.single_per_s),
            "cascade": (cascade, FAMILY, plans.cascade_per_s),
        }
        return {
            name: Findings(
                System(name + note, stack, model, self.rows, plans.slo_s, runs, servers, self.log), predicted
            )
            for name, (stack, model, predicted) in served.items()
        }


async def compare(findings: dict[Name, Findings], steps: Steps, tier: Literal["quick", "full"]) -> tuple[Pair, ...]:
    """Search the rate of every system; in tier full again in pairs, from which the rates are then taken."""
    for name, each in findings.items():
        with steps.timed(f"sustained rate: {name}") as say:
            each.add(*await each.system.search(search(each.predicted_per_s), say))
    if tier == "quick":
        return ()
    starts = {name: each.rate_per_s or each.predicted_per_s for name, each in findings.items()}
    for each in findings.values():
        each.rates_per_s, each.confirmed = [], []
    with steps.timed("pairs") as say:
        for number in range(_PAIRS):
            for name, each in findings.items():
                say(f"pair {number + 1} of {_PAIRS}: {name}")
                each.add(*await each.system.search(search_near(starts[name]), say))
                starts[name] = each.rates_per_s[-1] or starts[name]
    rates = [
        dict(zip(findings, numbers, strict=True))
        for numbers in zip(*(f.rates_per_s for f in findings.values()), strict=True)
    ]
    return tuple(
        Pair(**each, saving=saving(each["best_single_direct"], each["best_single"], each["cascade"])) for each in rates
    )


def saving(direct_per_s: float, single_per_s: float, cascade_per_s: float) -> float:
    """How many times the rate of the better single the cascade sustains; 0 where any of them was not found."""
    if not (direct_per_s and single_per_s and cascade_per_s):
        return 0.0
    return cascade_per_s / max(direct_per_s, single_per_s)


def saving_of_pairs(pairs: tuple[Pair, ...]) -> tuple[float, tuple[float, float]]:
    """Median over the pairs, and the ends of its bootstrap interval."""
    savings = [pair.saving for pair in pairs]
    return statistics.median(savings), median_range(savings)
