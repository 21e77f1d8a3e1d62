"""Does the planner use INT8 where it pays, and only there? `python -m benchmarks.int8`.

The digits family with `digits_resnet_int8` beside `digits_resnet`: recorded and profiled on a real Triton by the
commands, then planned three times for the same SLO and accuracy:

    with      as measured
    without   from the search records of the other models
    dear      with INT8 measured, and its busy times made DEAR times as long: then it pays nowhere

`top_per_s` is the rate up to which a plan has gears, `gain` what the plan with INT8 has over that without; `apart` says
that both are models of their own in records and profile, and each in a plan. Drafts: no certificate is wanted here.
What takes long is kept under --state; the same command goes on where it was interrupted.
"""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import click
import msgspec
from rich.console import Console

from cascadeserve.artefacts import write_atomically, write_json
from cascadeserve.demo.family import EXAMPLE, FAMILY, MODELS, REFERENCE, REPOSITORY
from cascadeserve.demo.kept import digest_file
from cascadeserve.demo.offline import OfflineTriton, draw_rows, run_command
from cascadeserve.demo.plans import planned_rate_per_s
from cascadeserve.demo.steps import Steps
from cascadeserve.gear_plan import GearPlan, read_gear_plan
from cascadeserve.local_triton.working_copy import prepare_state_directory
from planner.host import describe_host
from planner.profile import Profile, batch_busy_s, read_profile
from planner.records_files import read_search

INT8 = f"{REFERENCE}_int8"
DEAR = 4.0
_SLO_PER_BATCH = 10.0
# what `cascadeserve plan` asks of every gear, as in examples/digits/goal.toml
_BELOW_REFERENCE = 0.003


def made_dear(profile: Profile, model: str, factor: float) -> Profile:
    """Profile in which a model takes `factor` times as long; what it does to others side by side is left out."""
    measured = profile.models[model]
    busy = tuple(
        msgspec.structs.replace(entry, busy_s=entry.busy_s * factor, wall_s=entry.wall_s and entry.wall_s * factor)
        for entry in measured.busy
    )
    models = profile.models | {model: msgspec.structs.replace(measured, busy=busy)}
    return msgspec.structs.replace(profile, models=models, pairs=())


def most_reaching(plan: GearPlan, model: str) -> float:
    """Largest share of entry rows that a gear sends to a model; 0 where none does."""
    family = plan.families[FAMILY]
    entries = [family.entry(gear.ladder_entry) for gear in family.gears]
    return max(
        (
            share
            for entry in entries
            for stage, share in zip(entry.stages, entry.reach, strict=True)
            if stage.model == model
        ),
        default=0.0,
    )


async def _measure(state: Path) -> tuple[Path, Path, Path]:
    """Records with and without INT8, and the profile."""
    steps = Steps(Console())
    rows = draw_rows(state, "search")
    whole, floats, profile = state / "search.npz", state / "search-without.npz", state / "profile.json"
    async with contextlib.AsyncExitStack() as servers:
        offline = OfflineTriton(state, steps, servers, models=(*MODELS[:-1], INT8, REFERENCE))
        await offline.record("search", rows, whole)
        await offline.profile(rows, profile)
    async with contextlib.AsyncExitStack() as servers:
        await OfflineTriton(state / "without", steps, servers).record("search", rows, floats)
    return whole, floats, profile


async def _plan(state: Path, name: str, goal: Path, search: Path, profile: Path) -> GearPlan:
    output = state / f"{name}.json"
    await run_command(
        "plan", f"--goal={goal}", f"--cluster={EXAMPLE / 'cluster.toml'}", f"--repository={REPOSITORY}",
        f"--profile={profile}", f"--search={search}", f"--name={name}", f"--output={output}",
    )  # fmt: skip
    return read_gear_plan(output)


async def _run(state: Path) -> dict[str, object]:
    whole, floats, profile = await _measure(state)
    measured = read_profile(profile)
    dear = state / "profile-dear.json"
    write_json(dear, made_dear(measured, INT8, DEAR))
    slo_s = _SLO_PER_BATCH * batch_busy_s(measured.models[REFERENCE], 1, 1)
    goal = state / "goal.toml"
    text = f"schema_version = 1\n[families.{FAMILY}]\nslo_s = {slo_s:.6f}\nbelow_reference = {_BELOW_REFERENCE}\n"
    write_atomically(goal, text.encode())
    asked = {"with": (whole, profile), "without": (floats, profile), "dear": (whole, dear)}
    plans = {name: await _plan(state, name, goal, *files) for name, files in asked.items()}
    both = {INT8, REFERENCE}
    planned = [plan.families[FAMILY].models.keys() for plan in plans.values()]
    top_per_s = {name: planned_rate_per_s(plan) for name, plan in plans.items()}
    return {
        "machine": describe_host(),
        "slo_s": slo_s,
        "busy_s": {
            model: {str(rows): batch_busy_s(measured.models[model], rows, 1) for rows in (1, 32)}
            for model in sorted(both)
        },
        "apart": both <= read_search(whole).models.keys()
        and both <= measured.models.keys()
        and all(any(model in models for models in planned) for model in both),
        "gears": {name: len(plan.families[FAMILY].gears) for name, plan in plans.items()},
        "most_reaching_int8": {name: most_reaching(plan, INT8) for name, plan in plans.items()},
        "top_per_s": top_per_s,
        "gain": top_per_s["with"] / top_per_s["without"],
        "search": digest_file(whole),
    }


@click.command()
@click.option("--state", type=click.Path(path_type=Path), default=".cascadeserve/int8", show_default=True)
@click.option("--result", type=click.Path(path_type=Path), default="benchmarks/results/local/int8.json")
def main(state: Path, result: Path) -> None:
    """Measure, plan and write the result."""
    prepare_state_directory(state)
    prepare_state_directory(state / "without")
    found = asyncio.run(_run(state))
    write_json(result, found)
    click.echo(f"with INT8 {found['gain']:.2f} times the rate; rows that reach it: {found['most_reaching_int8']}")


if __name__ == "__main__":
    main()
