"""`cascadeserve simulate`."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from cascadeserve.artefacts import write_json
from cascadeserve.cluster import read_cluster
from cascadeserve.errors import InvalidArtefact, UsageError
from cascadeserve.gear_plan import read_gear_plan
from cascadeserve.replay import settings
from planner.at_share import plan_at_share, slowed
from planner.chrome_trace import MOST, write_trace
from planner.fits import check_fit
from planner.profile import read_profiles
from planner.records_files import read_held_out, read_search
from planner.timeline_plot import check_plot, draw_timeline

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from cascadeserve.gear_plan import GearPlan, PlannedFamily
    from cascadeserve.report import ServingReport
    from planner.records import HeldOutRecords, SearchRecords
    from planner.simulator import Simulation

_FILE = click.Path(dir_okay=False, path_type=Path)
_PROFILE_HELP = "Profile of the models (JSON); one for every kind of device in the cluster."
_SHOWN_GEARS = 8

# those of `replay`, so that one load can be simulated and sent
_LOAD_OPTIONS = (
    click.option("--trace", type=_FILE, help="CSV trace: times of requests, or counts per minute."),
    click.option("--trace-column", help="Column of the times: its name, or its index from 0."),
    click.option("--trace-from", help="Start of a window of the trace, written like its times."),
    click.option("--trace-to", help="End of that window (exclusive)."),
    click.option("--rate", type=float, help="Mean rate, rows per second."),
    click.option("--duration", type=float, help="Duration of the load, seconds."),
    click.option("--process", type=click.Choice(["poisson", "gamma", "bursty"]), help="Arrivals; default poisson."),
    click.option("--cv", type=float, default=4.0, show_default=True, help="gamma: coefficient of variation of gaps."),
    click.option("--burst-factor", type=float, default=4.0, show_default=True, help="bursty: burst rate / base rate."),
    click.option("--base-dwell", type=float, default=8.0, show_default=True, help="bursty: mean seconds at base rate."),
    click.option("--burst-dwell", type=float, default=2.0, show_default=True, help="bursty: mean seconds of a burst."),
    click.option("--steps", help='Steps of seconds x rows per second: "5x100,5x400,5x100".'),
    click.option("--rows-per-request", default="1", show_default=True, help="Rows of a request: 4, or 1-8 uniformly."),
    click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Same seed, same bytes."),
)


def _load_options(command: Callable[..., None]) -> Callable[..., None]:
    for option in reversed(_LOAD_OPTIONS):
        command = option(command)
    return command


@click.command(short_help="Simulate what a gear plan does under a load.")
@click.argument("plan_path", metavar="PLAN", type=_FILE)
@click.option("--profile", "profile_paths", type=_FILE, multiple=True, required=True, help=_PROFILE_HELP)
@click.option("--cluster", "cluster_path", type=_FILE, required=True, help="Cluster file.")
@click.option("--records", "records_path", type=_FILE, required=True, help="Search or test records to draw rows from.")
@click.option("--family", "family_name", default=None, help="Family to simulate, if the plan has several.")
@_load_options
@click.option("--timeout", type=float, help="Deadline of a request, seconds; default 4 x SLO.")
@click.option("--gear", default=None, help="Hold this gear whatever the demand.")
@click.option("--report", "report_path", type=_FILE, help="Write the serving report here (JSON).")
@click.option("--plot", "plot_path", type=_FILE, help="Draw the timeline here (.svg or .png).")
@click.option("--chrome-trace", "chrome_trace_path", type=_FILE, help="Write the run here for ui.perfetto.dev (JSON).")
def simulate(
    *,
    plan_path: Path,
    profile_paths: tuple[Path, ...],
    cluster_path: Path,
    records_path: Path,
    family_name: str | None,
    timeout: float | None,
    gear: str | None,
    report_path: Path | None,
    plot_path: Path | None,
    chrome_trace_path: Path | None,
    seed: int,
    rows_per_request: str,
    **load: Any,  # noqa: ANN401 - the options of the load, by name
) -> None:
    """Send a load to the simulated endpoints of a gear plan and report what becomes of it.

    Takes the load options of `replay`; a seed gives the same arrivals there and here. The same files and options give
    the same report, byte by byte. The first run on a machine compiles the simulator, which takes half a minute.
    """
    asked = _load_settings(**load)
    per_request = settings.parse_range(rows_per_request)
    if timeout is not None and not 0 < timeout < math.inf:
        raise UsageError(f"--timeout is {timeout}; it must be a positive number of seconds")
    if plot_path is not None:
        check_plot(plot_path)
    cluster = read_cluster(cluster_path)
    plan = read_gear_plan(plan_path, cluster)
    name = _choose_family(plan, family_name)
    family = plan.families[name]
    _check_gear(family, gear)
    profiles = read_profiles(profile_paths)
    records = _read_records(records_path)
    used = dict.fromkeys(stage.model for entry in family.ladder for stage in entry.stages)
    devices = check_fit(records, profiles, cluster, family=name, models=used)
    try:
        # compiled code, which nothing else needs
        from planner.simulator import Simulator, draw_load  # noqa: PLC0415
        from planner.simulator.report import summarise  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise UsageError(f"simulating needs the package {error.name!r}: pip install 'cascadeserve[planner]'") from error
    share = family.guaranteed_share
    if share < 1.0:
        click.echo(
            f"{name} is simulated alone, with the {share:.0%} of the device time that it is guaranteed; what the other "
            "families leave would be more"
        )
    slow = {endpoint: slowed(profile, share) for endpoint, profile in devices.items()}
    simulator = Simulator(plan_at_share(plan, name), name, records, slow)
    # as in `replay`: arrivals and rows have their own streams
    arrivals_rng, rows_rng = (np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(2))
    times_s, duration_s = asked.draw(sum(per_request) / 2, arrivals_rng)
    drawn = draw_load(times_s, duration_s, len(records), rows_rng, per_request)
    with Console(stderr=True).status("simulating (the first run of all compiles for half a minute)"):
        logged = 0 if chrome_trace_path is None else MOST
        simulation = simulator.run(drawn, timeout_s=timeout, hold_gear=gear, logged_batches=logged)
    report = summarise(simulation, family)
    if report_path is not None:
        write_json(report_path, report)
    if plot_path is not None:
        draw_timeline(plot_path, simulation, plan, name, _title(plan, name, report))
    Console().print(_tabulate(simulation, family, report, {name: each.slots for name, each in devices.items()}))
    if chrome_trace_path is not None:
        covered_s = write_trace(chrome_trace_path, simulation, plan, name)
        if covered_s is not None:
            click.echo(
                f"{chrome_trace_path} holds only the first {covered_s:.1f} s: a trace has room for {MOST:,} batches, "
                "as many ticks and as many refusals; give a shorter load"
            )


def _load_settings(
    *,
    rate: float | None,
    duration: float | None,
    steps: str | None,
    base_dwell: float,
    burst_dwell: float,
    **others: Any,  # noqa: ANN401 - named alike there
) -> settings.LoadSettings:
    asked = settings.LoadSettings(
        rate_per_s=rate,
        duration_s=duration,
        steps=None if steps is None else settings.parse_steps(steps),
        mean_base_s=base_dwell,
        mean_burst_s=burst_dwell,
        **others,
    )
    asked.check()
    return asked


def _choose_family(plan: GearPlan, name: str | None) -> str:
    if name is None and len(plan.families) == 1:
        return next(iter(plan.families))
    if name not in plan.families:
        asked = "the plan has several families" if name is None else f"the plan has no family {name!r}"
        raise UsageError(f"{asked}; say --family with one of {', '.join(plan.families)}")
    return name


def _check_gear(family: PlannedFamily, gear: str | None) -> None:
    names = [each.name for each in family.gears]
    if gear is not None and gear not in names:
        raise UsageError(f"the plan has no gear {gear!r}; --gear takes one of {', '.join(names)}")


def _read_records(path: Path) -> SearchRecords | HeldOutRecords:
    """Records of either split that may be looked at."""
    for read in (read_search, read_held_out):
        try:
            return read(path)
        except InvalidArtefact as error:
            if error.field is None or not error.field.endswith("$.split"):
                raise
    raise InvalidArtefact(
        "holds calibration rows, which only a certificate looks at; give search or test records", path=path
    )


def _title(plan: GearPlan, family: str, report: ServingReport) -> str:
    accuracy = "" if report.accuracy is None else f", {report.accuracy:.2%} right"
    return (
        f"{plan.name}: {family}, simulated - {report.offered_rate_per_s:.0f} rows/s on average, "
        f"p95 {_ms(report.p95_s)}, {_percent(report.goodput)} within {_ms(report.slo_s)}{accuracy}"
    )


def _tabulate(simulation: Simulation, family: PlannedFamily, report: ServingReport, slots: Mapping[str, int]) -> Table:
    ledger = report.ledger
    last_s = float(np.nanmax(simulation.load.times_s + simulation.latency_s)) if ledger.refused < ledger.sent else 0.0
    span_s = max(simulation.load.duration_s, last_s)
    table = Table(show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    lines = [
        ("load", f"{ledger.sent} requests, {report.rows_sent} rows in {report.duration_s:.1f} s"),
        ("offered / answered", f"{report.offered_rate_per_s:.1f} / {report.answered_rate_per_s:.1f} rows/s"),
        ("p50 / p95 / p99", " / ".join(map(_ms, (report.p50_s, report.p95_s, report.p99_s)))),
        ("goodput", f"{_percent(report.goodput)} in {_ms(report.slo_s)}"),
        ("accuracy", _percent(report.accuracy)),
        ("refused", f"{ledger.refused} requests, {_percent(ledger.refused / ledger.sent)}"),
        ("gears, of the time", "\n".join(_gear_lines(simulation, family))),
        *((f"stage {stage.stage}", f"{stage.rows} rows, {_percent(stage.share)}") for stage in report.stages),
        *(
            (f"{endpoint} busy", _percent(busy_s / (span_s * slots[endpoint])))
            for endpoint, busy_s in simulation.busy_s.items()
        ),
        *(
            (f"{model} batches", f"{batches} of {simulation.batch_rows[model] / batches:.2f} rows")
            for model, batches in simulation.batches.items()
            if batches
        ),
    ]
    for name, value in lines:
        table.add_row(name, value)
    return table


def _gear_lines(simulation: Simulation, family: PlannedFamily) -> list[str]:
    """Gears by their share of the load's duration, and how often they changed."""
    gears = simulation.tick_gear[simulation.tick_s <= simulation.load.duration_s]
    if not len(gears):
        return ["-"]
    counts = np.bincount(gears, minlength=len(family.gears))
    ranked = [int(index) for index in np.argsort(-counts, kind="stable") if counts[index]]
    switches = int(np.count_nonzero(np.diff(gears)))
    shown = [f"{family.gears[index].name} {_percent(counts[index] / len(gears))}" for index in ranked[:_SHOWN_GEARS]]
    return [*shown, f"{switches} switch{'' if switches == 1 else 'es'}"]


def _ms(value_s: float | None) -> str:
    return "-" if value_s is None else f"{value_s * 1e3:.1f} ms"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.2%}"
