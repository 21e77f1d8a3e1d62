"""Does it pay to change layouts? `python -m benchmarks.relayout`.

The cluster, goal and profile of examples/two_layouts: two devices whose memory the largest of four models takes for
itself; their busy times are stated, the answers are those of model_repository's digits models. `cascadeserve plan`
makes two plans, `two` as it is and `one` with --max-layouts 1, and both serve the same load in the simulator: the rates
of the goal, up and down again, each for a minute, arriving as a Poisson process. Changes of the layout are in it, with
what is gone and not there yet. `gain_points` is what the plan with two layouts has in accuracy over all rows.

`steps`: each moment of each transition, held in the simulator at the highest rate at which it is begun, with the gear
that serves meanwhile. `keeps` says that the SLO is kept then and nothing is refused.
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import click
import msgspec
import numpy as np
from click.testing import CliRunner

from benchmarks.populations import FAMILIES
from cascadeserve.artefacts import write_json
from cascadeserve.cluster import read_cluster
from cascadeserve.gear_plan import GearPlan, read_gear_plan
from cascadeserve.replay.arrivals import steps
from planner.cli_plan import plan
from planner.goal import read_goal
from planner.host import describe_host
from planner.predict import THOROUGH, SimulatedGears
from planner.profile import Profile, read_profiles
from planner.records import SearchRecords
from planner.records_files import write_records
from planner.simulator import Simulation, Simulator, draw_load

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

EXAMPLE = Path("examples/two_layouts")
_FAMILY = "digits"
# how long the load stays at a rate of the goal, for a weight of one
_EACH_S = 240.0
_SEED = 7


def make_plans(folder: Path, search: Path) -> dict[str, GearPlan]:
    """Plans of the example by `cascadeserve plan`, written into a folder."""
    made = {}
    for name, options in (("two", []), ("one", ["--max-layouts", "1"])):
        path = folder / f"{name}.json"
        arguments = [
            f"--{what}={EXAMPLE / file}"
            for what, file in (("goal", "goal.toml"), ("cluster", "cluster.toml"), ("profile", "profile.json"))
        ]
        run = CliRunner().invoke(plan, [*arguments, f"--search={search}", f"--output={path}", *options])
        if run.exit_code != 0:
            raise click.ClickException(run.output)
        made[name] = read_gear_plan(path)
    return made


def serve(made: GearPlan, records: SearchRecords, devices: Mapping[str, Profile]) -> Simulation:
    """Simulate the rates of the example's goal, up and down again."""
    prior = read_goal(EXAMPLE / "goal.toml").families[_FAMILY].rate_prior or ()
    up = [(weight * _EACH_S, rate) for rate, weight in prior]
    rng = np.random.default_rng(_SEED)
    times_s = steps([*up, *reversed(up)], rng)
    duration_s = 2.0 * sum(length_s for length_s, _ in up)
    return Simulator(made, _FAMILY, records, devices).run(draw_load(times_s, duration_s, len(records), rng))


def check_steps(made: GearPlan, records: SearchRecords, devices: Mapping[str, Profile]) -> Iterator[dict[str, Any]]:
    """Hold every moment of every transition."""
    goal = read_goal(EXAMPLE / "goal.toml").families[_FAMILY]
    family = made.families[_FAMILY]
    names = [layout.name for layout in made.layouts]
    for each in made.transitions:
        low = min(each.from_layout, each.to_layout, key=names.index)
        rate_per_s = family.max_rate_per_s(low)
        if each.to_layout == low:
            rate_per_s *= made.switching.layout_down_fraction
        gear = next(gear for gear in family.gears if gear.name == each.gears[_FAMILY])
        before = made.layout(each.from_layout)
        for number, instances in enumerate([before.instances, *each.states(before.instances)]):
            moment = msgspec.structs.replace(before, instances=instances)
            held = msgspec.structs.replace(made, layouts=(moment,), transitions=())
            found = SimulatedGears(held, _FAMILY, goal, records, devices, seed=_SEED).gear(gear, rate_per_s, THOROUGH)
            yield {
                "from": each.from_layout,
                "to": each.to_layout,
                "after_steps": number,
                "gear": gear.name,
                "rate_per_s": rate_per_s,
                "p95_s": found.p95_s,
                "keeps": found.keeps,
            }


def _figures(made: GearPlan, outcome: Simulation, slo_s: float) -> dict[str, Any]:
    changes = int(np.count_nonzero(np.diff(outcome.tick_layout)))
    late = np.isnan(outcome.latency_s) | (outcome.latency_s > slo_s)
    return {
        "layouts": len(made.layouts),
        "planned_per_s": made.families[_FAMILY].max_rate_per_s(made.layouts[-1].name),
        "accuracy": outcome.accuracy,
        "expected_accuracy": getattr(made.families[_FAMILY].expected, "accuracy", None),
        "p95_s": outcome.quantile_s(0.95),
        "late": float(late.mean()),
        "refused": outcome.refused,
        "layout_changes": changes,
    }


@click.command()
@click.option("--result", type=click.Path(path_type=Path), default="benchmarks/results/local/relayout.json")
@click.option("--plan", "plan_path", type=click.Path(path_type=Path), default=None, help="Where to put the plan, too.")
def main(result: Path, plan_path: Path | None) -> None:
    """Plan, serve, compare, and write the result."""
    records = SearchRecords(**vars(FAMILIES[_FAMILY]().records))
    cluster = read_cluster(EXAMPLE / "cluster.toml")
    profiles = read_profiles([EXAMPLE / "profile.json"])
    devices = {endpoint.name: profiles[endpoint.kind] for endpoint in cluster.endpoints}
    with TemporaryDirectory() as folder:
        write_records(Path(folder) / "search.npz", records)
        made = make_plans(Path(folder), Path(folder) / "search.npz")
    if plan_path is not None:
        write_json(plan_path, made["two"])
    slo_s = made["two"].families[_FAMILY].slo_s
    served = {name: _figures(each, serve(each, records, devices), slo_s) for name, each in made.items()}
    moments = list(check_steps(made["two"], records, devices))
    gain_points = 100.0 * (served["two"]["accuracy"] - served["one"]["accuracy"])
    all_keep = bool(moments) and all(each["keeps"] for each in moments)
    write_json(
        result,
        {"host": describe_host(), **served, "gain_points": gain_points, "steps": moments, "all_steps_keep": all_keep},
    )
    click.echo(
        f"two layouts answer {gain_points:.2f} points more rows rightly than one; each of {len(moments)} moments of "
        f"the transitions keeps the SLO: {'yes' if all_keep else 'no'}"
    )


if __name__ == "__main__":
    main()
