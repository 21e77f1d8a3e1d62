"""`cascadeserve plan` and `cascadeserve explain`."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cascadeserve.artefacts import digest_bytes, write_json
from cascadeserve.cluster import read_cluster
from cascadeserve.errors import InvalidArtefact, UsageError
from cascadeserve.gear_plan import MAX_NAME_LENGTH, NAME_PATTERN, read_gear_plan
from cascadeserve.triton_config import input_specs, read_config
from planner.explain import explain_plan
from planner.explain_page import check_page, write_page
from planner.goal import choose_family, rate_prior, read_goal, trace_path
from planner.planning import Inputs, plan_family
from planner.profile import read_profiles
from planner.records_files import read_search

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cascadeserve.gear_plan import GearPlan, TensorSpec
    from planner.planning import Policy

_FILE = click.Path(dir_okay=False, path_type=Path)
_PROFILE_HELP = "Profile of the models (JSON); one for every kind of device in the cluster."
_FOLDER = click.Path(file_okay=False, path_type=Path)


def _check_name(context: click.Context, parameter: click.Parameter, name: str | None) -> str | None:
    # before minutes of planning and calibration rows are spent on what cannot be written
    if name is not None and not (re.match(NAME_PATTERN, name) and len(name) <= MAX_NAME_LENGTH):
        message = f"{name!r} is made of other characters than letters, digits and _.-, or too long"
        raise click.BadParameter(message, context, parameter)
    return name


def _make_room(context: click.Context, parameter: click.Parameter, output: Path) -> Path:
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        message = f"{output.parent} cannot be made a folder ({error.strerror}); name another place"
        raise click.BadParameter(message, context, parameter) from error
    if not os.access(output.parent, os.W_OK):
        raise click.BadParameter(f"{output.parent} is not writable; name another place", context, parameter)
    return output


@click.command(short_help="Choose cascades, triggers and gears for a goal, and certify them.")
@click.option("--goal", "goal_path", type=_FILE, required=True, help="What the plan has to keep (TOML).")
@click.option("--profile", "profile_paths", type=_FILE, multiple=True, required=True, help=_PROFILE_HELP)
@click.option("--cluster", "cluster_path", type=_FILE, required=True, help="Cluster file.")
@click.option("--search", "search_path", type=_FILE, required=True, help="Records that everything is chosen on (.npz).")
@click.option("--calibration", type=_FILE, default=None, help="Records for the certificate (.npz); without: a draft.")
@click.option("--repository", type=_FOLDER, default="model_repository", show_default=True, help="What Triton serves.")
@click.option("--output", type=_FILE, required=True, callback=_make_room, help="Gear plan to write (JSON).")
@click.option("--family", "family_name", default=None, help="Family to plan, if the goal has several.")
@click.option("--policy", type=click.Choice(["cascade", "single"]), default="cascade", show_default=True)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Fixes every simulated load.")
@click.option("--name", default=None, callback=_check_name, help="Name of the plan [default: the family's].")
@click.option("--spend", is_flag=True, help="Certify although the calibration rows certified another ladder before.")
def plan(
    *,
    goal_path: Path,
    profile_paths: tuple[Path, ...],
    cluster_path: Path,
    search_path: Path,
    calibration: Path | None,
    repository: Path,
    output: Path,
    family_name: str | None,
    policy: Policy,
    seed: int,
    name: str | None,
    spend: bool,
) -> None:
    """Make a gear plan; the same files and seed give the same bytes.

    Calibration rows are for one certificate. So try goals without --calibration first, and certify what you settled on.
    """
    goal = read_goal(goal_path)
    family = choose_family(goal, goal_path, family_name)
    profiles = read_profiles(profile_paths)
    cluster = read_cluster(cluster_path)
    search = read_search(search_path)
    tensors, num_classes, largest_batch = _signature(repository, search.models)
    sources = {"goal": goal_path, "cluster": cluster_path}
    for kind, path in zip(profiles, profile_paths, strict=True):
        sources["profile" if len(profiles) == 1 else f"profile.{kind}"] = path
    if (trace := trace_path(goal.families[family], goal_path)) is not None:
        sources["trace"] = trace
    inputs = Inputs(
        family=family,
        goal=goal.families[family],
        prior=rate_prior(goal.families[family], goal_path, seed),
        profiles=profiles,
        cluster=cluster,
        search=search,
        tensors=tensors,
        num_classes=num_classes,
        largest_batch=largest_batch,
        digests={what: digest_bytes(path.read_bytes()) for what, path in sources.items()} | {"search": search.digest()},
        policy=policy,
        seed=seed,
        name=name or "",
    )
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, refresh_per_second=4, disable=not console.is_terminal) as progress:
        task = progress.add_task("tuning cascades", total=None)
        made = plan_family(
            inputs,
            calibration,
            spend=spend,
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    write_json(output, made)
    # what was written is what serves: read as the orchestrator will
    _show(read_gear_plan(output, cluster))


@click.command(short_help="Say what a gear plan does and why, and what is certain about it.")
@click.argument("plan_path", metavar="PLAN", type=_FILE)
@click.option("--html", "page_path", type=_FILE, default=None, help="Write it as a page with pictures, too.")
@click.option(
    "--cluster",
    "cluster_path",
    type=_FILE,
    default=None,
    help="Cluster file: checks the endpoints and tells about them.",
)
def explain(*, plan_path: Path, page_path: Path | None, cluster_path: Path | None) -> None:
    """Show ladder, gears, predictions and certificate of a gear plan.

    The page is one file that loads nothing: it can be sent, kept and printed.
    """
    if page_path is not None:
        check_page()
    cluster = None if cluster_path is None else read_cluster(cluster_path)
    made = read_gear_plan(plan_path, cluster)
    if page_path is not None:
        write_page(page_path, made, cluster)
    _show(made)


def _show(made: GearPlan) -> None:
    console = Console()
    for part in explain_plan(made):
        console.print(part, highlight=False)


def _signature(repository: Path, models: Iterable[str]) -> tuple[tuple[TensorSpec, ...], int | None, dict[str, int]]:
    """Inputs, number of classes and largest batch by model, from the configs of a repository.

    The number is None where a model returns no scores: then the family cannot.
    """
    inputs: dict[str, tuple[TensorSpec, ...]] = {}
    classes: dict[str, int] = {}
    largest: dict[str, int] = {}
    for model in models:
        path = repository / model / "config.pbtxt"
        if not path.is_file():
            raise UsageError(f"model {model!r} of the search records is not in {repository}; give its --repository")
        config = read_config(path)
        outputs = {output.name: output for output in config.output}
        if absent := [name for name in ("label", "certainty") if name not in outputs]:
            raise InvalidArtefact(f"has no output `{absent[0]}`; export the model", path=path)
        if "scores" in outputs:
            dims = outputs["scores"].dims
            if len(dims) != 1 or dims[0] < 1:
                raise InvalidArtefact("has an output `scores` without one axis of classes; export the model", path=path)
            classes[model] = int(dims[0])
        inputs[model] = input_specs(config)
        largest[model] = max(config.max_batch_size, 1)
    first, *others = inputs
    num_classes = next(iter(classes.values()), None)
    for model in others:
        if inputs[model] != inputs[first] or classes.get(model, num_classes) != num_classes:
            raise UsageError(f"models {first!r} and {model!r} differ in inputs or classes; a family shares both")
    return inputs[first], num_classes if len(classes) == len(inputs) else None, largest
