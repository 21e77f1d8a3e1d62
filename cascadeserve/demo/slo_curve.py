"""The saving over SLOs: the comparison again at other multiples of the largest model's busy time for one row.

Every SLO gets plans of its own. They are drafts: nothing is certified for them, and no calibration rows are spent.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from typing import TYPE_CHECKING, Any

from cascadeserve.artefacts import read_toml, write_atomically
from cascadeserve.demo.compare import NAMES, saving
from cascadeserve.demo.family import FAMILY
from cascadeserve.demo.plans import GOAL, PlanPair, make_plan, planned_rate_per_s
from cascadeserve.demo.rate_search import search
from cascadeserve.demo.report import SloCurve, SloGap, SloPoint
from cascadeserve.errors import InvalidArtefact, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from cascadeserve.demo.compare import Bench, Findings, Name
    from cascadeserve.demo.measuring import Run, RunFolder

MULTIPLES = (3.0, 5.0, 10.0, 20.0, 40.0)

_KEY = "slo_per_reference_batch"
_LINE = re.compile(rf"^{_KEY}\s*=.*$", re.MULTILINE)
_WHO: dict[Name, str] = {
    "best_single_direct": "the largest model with Triton alone",
    "best_single": "the largest model through the orchestrator",
    "cascade": "the cascade",
}


async def plan_curve(
    folder: Path, own: PlanPair, *, search_records: Path, profile: Path, say: Callable[[str], None]
) -> dict[float, PlanPair]:
    """Plans by multiple, made under `folder` or kept there; `own` are those of the demo's own goal, which are reused.

    A rate is 0 where the planner refuses: nothing keeps that SLO. Every core makes a plan at a time.
    """
    own_multiple = goal_multiple(GOAL)
    limit = asyncio.Semaphore(len(os.sched_getaffinity(0)))

    async def rate_per_s(path: Path, *options: str) -> float:
        goal = path.with_name("goal.toml")
        with path.with_suffix(".log").open("ab") as log, contextlib.suppress(UsageError):
            async with limit:
                plan = await make_plan(
                    path, *options, goal=goal, search=search_records, profile=profile, calibration=None, log=log
                )
            return planned_rate_per_s(plan)
        return 0.0

    async def plan_pair(multiple: float) -> PlanPair:
        made = own
        if multiple != own_multiple:
            here = folder / f"{multiple:g}x"
            here.mkdir(parents=True, exist_ok=True)
            write_atomically(here / "goal.toml", goal_text(GOAL, multiple).encode())
            cascade, single = here / "cascade.json", here / "single.json"
            cascade_per_s, single_per_s = await asyncio.gather(
                rate_per_s(cascade), rate_per_s(single, "--policy=reference", "--name=single")
            )
            slo_s = own.slo_s * multiple / own_multiple
            made = PlanPair(cascade, single, slo_s=slo_s, cascade_per_s=cascade_per_s, single_per_s=single_per_s)
        say(f"  {describe(simulated(multiple, made))}")
        return made

    pairs = await asyncio.gather(*(plan_pair(multiple) for multiple in MULTIPLES))
    return dict(zip(MULTIPLES, pairs, strict=True))


async def measure_curve(
    bench: Bench, runs: RunFolder, plans: Mapping[float, PlanPair], say: Callable[[str], None]
) -> tuple[list[SloPoint | SloGap], list[Run]]:
    """Search the rates of the three systems at every SLO that has plans; returns all points and all runs."""
    found: list[SloPoint | SloGap] = []
    every: list[Run] = []
    for multiple, pair in plans.items():
        if not pair.is_complete:
            found.append(SloGap(slo_multiple=multiple, of="measured", reason="there are no plans for it"))
            continue
        async with contextlib.AsyncExitStack() as servers:
            findings = bench.findings(pair, runs, servers, note=f"-{multiple:g}x")
            for name, each in findings.items():
                say(f"{multiple:g}x: {name}")
                each.add(*await each.system.search(search(each.predicted_per_s), say))
        found.append(measured(multiple, pair.slo_s, findings))
        every += [run for each in findings.values() for run in each.runs]
    return found, every


def simulated(multiple: float, plans: PlanPair) -> SloPoint | SloGap:
    """Say what plans predict."""
    rates = {_WHO["cascade"]: plans.cascade_per_s, "the largest model": plans.single_per_s}
    missing = [who for who, rate_per_s in rates.items() if not rate_per_s]
    if missing:
        reason = f"no plan of {' and '.join(missing)} keeps the SLO"
        return SloGap(slo_multiple=multiple, of="simulated", reason=reason)
    return _point(multiple, plans.slo_s, plans.single_per_s, plans.cascade_per_s)


def measured(multiple: float, slo_s: float, findings: Mapping[Name, Findings]) -> SloPoint | SloGap:
    """Say what was found about the three systems."""
    missing = [name for name in NAMES if not findings[name].rate_per_s]
    if missing:
        late = [name for name in missing if (found := findings[name].found) and found.limited_by == "generator"]
        why = "; the load generator could not keep up" if late else ""
        reason = f"no rate of {' and '.join(_WHO[name] for name in missing)} was confirmed{why}"
        return SloGap(slo_multiple=multiple, of="measured", reason=reason)
    direct_per_s, single_per_s, cascade_per_s = (findings[name].rate_per_s for name in NAMES)
    return _point(multiple, slo_s, max(direct_per_s, single_per_s), cascade_per_s)


def _point(multiple: float, slo_s: float, single_per_s: float, cascade_per_s: float) -> SloPoint:
    return SloPoint(
        slo_multiple=multiple,
        slo_s=slo_s,
        single_rows_per_s=single_per_s,
        cascade_rows_per_s=cascade_per_s,
        saving=saving(single_per_s, single_per_s, cascade_per_s),
    )


def make_curve(found: Sequence[SloPoint | SloGap], measurements: Sequence[SloPoint | SloGap]) -> SloCurve:
    """Put the curve together: simulated points, measured ones by rising SLO, and those that are missing."""
    ordered = sorted(measurements, key=lambda each: each.slo_multiple)
    return SloCurve(
        simulated=tuple(each for each in found if isinstance(each, SloPoint)),
        measured=tuple(each for each in ordered if isinstance(each, SloPoint)),
        left_out=tuple(each for each in (*found, *ordered) if isinstance(each, SloGap)),
    )


def describe(found: SloPoint | SloGap) -> str:
    """One line about a point."""
    if isinstance(found, SloGap):
        return f"{found.slo_multiple:3g}x  left out: {found.reason}"
    return (
        f"{found.slo_multiple:3g}x  {found.slo_s * 1e3:5.1f} ms  largest model {found.single_rows_per_s:5.0f} rows/s, "
        f"cascade {found.cascade_rows_per_s:5.0f} rows/s, saving {found.saving:.2f}"
    )


def goal_multiple(path: Path) -> float:
    """Read the SLO of a goal file as a multiple of the largest model's busy time for one row.

    Raises:
        InvalidArtefact: it states the SLO in another way.

    """
    families: Any = read_toml(path, dict[str, Any]).get("families", {})
    found = families.get(FAMILY, {}).get(_KEY)
    if not isinstance(found, int | float):
        raise InvalidArtefact(
            "is not a number; the demo states its SLO so", path=path, field=f"families.{FAMILY}.{_KEY}"
        )
    return float(found)


def goal_text(path: Path, multiple: float) -> str:
    """Text of a goal file with another SLO.

    Raises:
        InvalidArtefact: the SLO is not stated once, on a line of its own.

    """
    text, count = _LINE.subn(f"{_KEY} = {multiple}", path.read_text())
    if count != 1:
        raise InvalidArtefact(f"states {_KEY} on {count} lines; the demo needs one", path=path)
    return text
