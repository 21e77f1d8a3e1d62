"""The command."""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import platform
import shutil
import time
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from cascadeserve.artefacts import write_json
from cascadeserve.demo import plans
from cascadeserve.demo.compare import NAMES, Bench, compare, saving, saving_of_pairs
from cascadeserve.demo.family import BASELINE_CONFIG, EXAMPLE, FAMILY, REFERENCE, REPOSITORY
from cascadeserve.demo.judging import add_ledgers, known_labels, pair_accuracies
from cascadeserve.demo.kept import alone, digest_file, digest_of
from cascadeserve.demo.measuring import RunFolder
from cascadeserve.demo.offline import OfflineTriton, draw_rows
from cascadeserve.demo.plans import PlanPair
from cascadeserve.demo.report import Certificate, DemoReport, LadderLine
from cascadeserve.demo.slo_curve import goal_multiple, make_curve, measure_curve, measured, plan_curve, simulated
from cascadeserve.demo.steps import Steps
from cascadeserve.demo.timeline import choose_steps, make_timeline
from cascadeserve.endpoint_config import endpoint_config_path
from cascadeserve.errors import CascadeServeError, UsageError
from cascadeserve.local_triton.working_copy import prepare_state_directory
from cascadeserve.virtual_machine import cores_kept_awake

if TYPE_CHECKING:
    from collections.abc import Iterable

    from numpy.typing import NDArray

    from cascadeserve.demo.compare import Findings, Name
    from cascadeserve.demo.measuring import Run
    from cascadeserve.demo.report import Pair, SloCurve, SloGap, SloPoint, Timeline
    from cascadeserve.gear_plan import GearPlan, PlannedFamily

Tier = Literal["quick", "full"]


@click.command(short_help="From rows to a certified plan on a real Triton, and what the plan is worth.")
@click.option("--output", type=click.Path(path_type=Path), default="demo", show_default=True, help="For the reports.")
@click.option("--state", type=click.Path(path_type=Path), default=".cascadeserve/demo", show_default=True)
@click.option("--tier", type=click.Choice(["quick", "full"]), default="quick", show_default=True)
def demo(output: Path, state: Path, tier: Tier) -> None:
    """Record, profile and plan the digits family on a real Triton, then measure the plan against the largest model.

    Triton is pinned to core 0, everything else to the other cores. Three systems get the same load: the largest model
    with Triton's own dynamic batching, called directly; the same model through the orchestrator; the plan's cascades.
    Tier full repeats the comparison in five interleaved pairs, and once for every other SLO of the curve. An
    interrupted demo goes on where it was; records, profile and plans are kept under --state while their inputs are
    unchanged. Run it from the top of a checkout.
    """
    if not (EXAMPLE / "data.py").exists():
        raise UsageError(f"{EXAMPLE} is not here; run the demo from the top of a checkout")
    for package in ("sklearn", "matplotlib", "jinja2", "pytriton"):
        if importlib.util.find_spec(package) is None:
            raise UsageError(f"the demo needs the package {package!r}: pip install 'cascadeserve[local,examples]'")
    console = Console()
    state = state.resolve()
    prepare_state_directory(state)
    with alone(state):
        report = asyncio.run(_Demo(output, state, tier, console).run())
    _show(report, console)
    console.print(f"{output / 'report.html'} has the plots, {output / 'report.json'} the figures")
    if report.lost or report.duplicated:
        raise CascadeServeError("requests were lost or answered twice; the logs under --state say more")


class _Demo:
    def __init__(self, output: Path, state: Path, tier: Tier, console: Console) -> None:
        self._output = output
        self._state = state
        self._tier: Tier = tier
        self._steps = Steps(console)
        self._kept_awake = False
        self._search = state / "search.npz"
        self._profile = state / "profile.json"

    async def run(self) -> DemoReport:
        async with cores_kept_awake() as self._kept_awake:
            return await self._run()

    async def _run(self) -> DemoReport:
        started_s = time.monotonic()
        self._output.mkdir(parents=True, exist_ok=True)
        plan, pair = await self._plan()
        rows = draw_rows(self._state, "replay")
        with np.load(rows) as drawn:
            truth = drawn["label"]
        family = plan.families[FAMILY]
        runs = self._run_folder("runs", rows, [pair])
        with (self._state / "load.log").open("ab") as log:
            bench = Bench(self._state, rows, log)
            async with contextlib.AsyncExitStack() as servers:
                findings = bench.findings(pair, runs, servers)
                pairs = await compare(findings, self._steps, self._tier)
                timeline = await self._timeline(findings, truth, family)

            def write(curve: SloCurve, curve_runs: list[Run]) -> DemoReport:
                self._steps.wall_s["total"] = time.monotonic() - started_s
                report = self._report(plan, findings, pairs, timeline, truth, curve, curve_runs)
                self._write(report, pair.cascade)
                return report

            # with the servers gone, so that it disturbs nothing
            own = measured(goal_multiple(plans.GOAL), pair.slo_s, findings)
            planned = await self._plan_curve(pair)
            points = [simulated(multiple, each) for multiple, each in planned.items()]
            report = write(make_curve(points, [own]), [])
            if self._tier == "full":
                # half of the time goes into this; what came before it is there to be read
                found, curve_runs = await self._measure_curve(bench, planned)
                report = write(make_curve(points, [own, *found]), curve_runs)
        runs.clear()
        return report

    def _run_folder(self, name: str, rows: Path, pairs: Iterable[PlanPair]) -> RunFolder:
        about = digest_of(
            tier=self._tier,
            plans=[digest_file(path) for pair in pairs for path in (pair.cascade, pair.single)],
            baseline=digest_file(endpoint_config_path(REPOSITORY, REFERENCE, BASELINE_CONFIG)),
            rows=digest_file(rows),
        )
        return RunFolder(self._state / name, about)

    async def _plan(self) -> tuple[GearPlan, PlanPair]:
        """Plans of the cascade and of the largest model alone, and all they are made from."""
        steps, state = self._steps, self._state
        with steps.timed("draw rows"):
            rows = draw_rows(state, "search")
            draw_rows(state, "replay")
        async with contextlib.AsyncExitStack() as servers:
            offline = OfflineTriton(state, steps, servers)
            await offline.record("search", rows, self._search)
            await offline.profile(rows, self._profile)
            seed = plans.calibration_seed(state, search=self._search, profile=self._profile)
            calibration = plans.calibration_path(state, seed)
            await offline.record("calibration", draw_rows(state, "calibration", seed), calibration)
        cascade, single = state / "gear_plan.json", state / "single_plan.json"
        make = partial(plans.make_plan, goal=plans.GOAL, search=self._search, profile=self._profile)
        with steps.timed("plan"):
            made = await make(cascade, calibration=calibration)
            baseline = await make(single, "--policy=reference", "--name=single", calibration=None)
        return made, PlanPair(
            cascade=cascade,
            single=single,
            slo_s=made.families[FAMILY].slo_s,
            cascade_per_s=plans.planned_rate_per_s(made),
            single_per_s=plans.planned_rate_per_s(baseline),
        )

    async def _plan_curve(self, pair: PlanPair) -> dict[float, PlanPair]:
        """Plans for other SLOs, and that of the demo, by multiple."""
        with self._steps.timed("SLO curve") as say:
            return await plan_curve(
                self._state / "slo-curve", pair, search_records=self._search, profile=self._profile, say=say
            )

    async def _measure_curve(
        self, bench: Bench, planned: dict[float, PlanPair]
    ) -> tuple[list[SloPoint | SloGap], list[Run]]:
        """Make the comparison under the other SLOs."""
        own = goal_multiple(plans.GOAL)
        others = {multiple: each for multiple, each in planned.items() if multiple != own}
        folder = self._run_folder("runs/slo", bench.rows, [each for each in others.values() if each.is_complete])
        with self._steps.timed("SLO curve, measured") as say:
            return await measure_curve(bench, folder, others, say)

    async def _timeline(
        self, findings: dict[Name, Findings], truth: NDArray[np.int64], family: PlannedFamily
    ) -> Timeline:
        cascade = findings["cascade"]
        with self._steps.timed("bursty timeline"):
            single_per_s = findings["best_single"].rate_per_s or findings["best_single"].predicted_per_s
            steps = choose_steps(single_per_s, cascade.rate_per_s or cascade.predicted_per_s)
            report, records = await cascade.system.load(
                "--steps=" + ",".join(f"{duration_s:g}x{rate_per_s:g}" for duration_s, rate_per_s in steps)
            )
            return make_timeline(steps, report, records, truth, family)

    def _report(
        self, plan: GearPlan, findings: dict[Name, Findings], pairs: tuple[Pair, ...], timeline: Timeline,
        truth: NDArray[np.int64], curve: SloCurve, curve_runs: list[Run],
    ) -> DemoReport:  # fmt: skip
        singles = [run.records for name in NAMES[:2] for run in findings[name].runs]
        paired = pair_accuracies(
            [run.records for run in findings["cascade"].confirmed], known_labels(singles, len(truth)), truth
        )
        rates = [findings[name].rate_per_s for name in NAMES]
        saved, saved_range = saving_of_pairs(pairs) if pairs else (saving(*rates), None)
        every = [run for each in findings.values() for run in each.runs] + curve_runs
        # a run whose generator was late says nothing about what became of its requests
        told = [run for run in every if run.probe.verdict != "void"]
        ledger = add_ledgers([*(run.probe.ledger for run in told), timeline.report.ledger])
        results = {name: each.result() for name, each in findings.items()}
        return DemoReport(
            tier=self._tier,
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            host=_host() | {"cores kept awake": "yes" if self._kept_awake else "no"},
            reference_model=REFERENCE,
            reference_accuracy=paired.reference_accuracy if paired else None,
            accuracy_drop=paired.drop if paired else None,
            paired_answers=paired.answers if paired else 0,
            slo_s=plan.families[FAMILY].slo_s,
            best_single_direct=results["best_single_direct"],
            best_single=results["best_single"],
            cascade=results["cascade"],
            saving=saved,
            saving_range=saved_range,
            pairs=pairs,
            certificate=_certificate(plan.families[FAMILY]),
            plan=plan.name,
            ladder=_ladder(plan.families[FAMILY]),
            timeline=timeline,
            slo_curve=curve,
            ledger=ledger,
            lost=ledger.lost,
            duplicated=ledger.duplicated,
            wall_s=self._steps.wall_s,
        )

    def _write(self, report: DemoReport, plan: Path) -> None:
        # matplotlib takes a second to import, which a `--help` need not wait for
        from cascadeserve.demo.page import write_page  # noqa: PLC0415

        shutil.copyfile(plan, self._output / "gear_plan.json")
        write_page(report, self._output)
        write_json(self._output / "report.json", report)


def _certificate(family: PlannedFamily) -> Certificate | None:
    found = family.certificate
    if found is None:
        return None
    return Certificate(epsilon=found.epsilon, delta=found.delta, rows=found.rows)


def _ladder(family: PlannedFamily) -> tuple[LadderLine, ...]:
    lines = []
    for entry in family.ladder:
        gears = [gear for gear in family.gears if gear.ladder_entry == entry.name]
        planned = [gear for gear in gears if not gear.degraded]
        used = planned or gears
        if used:
            top = max(gear.upper_rate_per_s for gear in used)
            lines.append(
                LadderLine(
                    entry=entry,
                    min_rate_per_s=min(gear.min_rate_per_s for gear in used),
                    max_rate_per_s=top if planned else None,
                    degraded=not planned,
                )
            )
    return tuple(sorted(lines, key=lambda line: line.min_rate_per_s))


def _host() -> dict[str, str]:
    cpu = ""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "cpu": cpu or platform.processor(),
        "cores": str(os.cpu_count()),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


def _show(report: DemoReport, console: Console) -> None:
    steps = Table("step", "seconds", title="time taken")
    for name, wall_s in report.wall_s.items():
        steps.add_row(name, f"{wall_s:.0f}")
    console.print(steps)
    table = Table(
        "system",
        "rows/s sustained",
        "p95",
        "accuracy",
        "refused",
        "lost",
        title=f"SLO: p95 of {report.slo_s * 1e3:.1f} ms",
    )
    for name in NAMES:
        result = getattr(report, name)
        table.add_row(
            name,
            f"{result.sustained_rows_per_s:.0f}",
            "-" if result.p95_s is None else f"{result.p95_s * 1e3:.1f} ms",
            "-" if result.accuracy is None else f"{result.accuracy:.2%}",
            *(str(getattr(result.ledger, count, "-")) for count in ("refused", "lost")),
        )
    console.print(table)
    if missing := [name for name in NAMES if not getattr(report, name).sustained_rows_per_s]:
        console.print(
            f"no rate was confirmed for {', '.join(missing)}, so there is no saving to tell: the machine was disturbed"
        )
        return
    note = f" ({report.saving_range[0]:.2f} to {report.saving_range[1]:.2f})" if report.saving_range else ""
    drop = "" if report.accuracy_drop is None else (
        f", {report.accuracy_drop * 100:+.2f} points less accurate on the same {report.paired_answers} answers"
    )  # fmt: skip
    console.print(f"the cascade sustains [bold]{report.saving:.2f} x[/bold] the rate of the largest model{note}{drop}")
