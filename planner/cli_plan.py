"""`cascadeserve plan` and `cascadeserve explain`."""

from __future__ import annotations

import contextlib
import math
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import click
import msgspec
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cascadeserve.artefacts import digest_bytes, write_json
from cascadeserve.cluster import read_cluster
from cascadeserve.errors import InvalidArtefact, UsageError
from cascadeserve.gear_plan import MAX_NAME_LENGTH, NAME_PATTERN, read_gear_plan
from cascadeserve.triton_config import input_specs, read_config
from planner.checkpoint import Checkpoint
from planner.explain import explain_plan
from planner.explain_page import check_page, write_page
from planner.families import FamiliesPlanner
from planner.fits import check_planned
from planner.goal import choose_families, rate_prior, read_goal, trace_path, with_least
from planner.infeasible import Infeasible
from planner.inputs import Inputs
from planner.objectives import Planner, tightened
from planner.policies import POLICIES
from planner.profile import read_profiles
from planner.provenance import changed_inputs
from planner.rank_layouts import MOST_LAYOUTS
from planner.records_files import read_family, read_search
from planner.time_limit import TimeLimit
from planner.trace_facts import trace_facts

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

    from cascadeserve.cluster import Cluster
    from cascadeserve.gear_plan import GearPlan, TensorSpec
    from planner.goal import FamilyGoal, Least, RatePrior
    from planner.policies import Policy
    from planner.profile import Profile
    from planner.records_files import Split

_FILE = click.Path(dir_okay=False, path_type=Path)
_PROFILE_HELP = "Profile of the models (JSON); one for every kind of device in the cluster."
_EXPLAIN_PROFILE_HELP = "Profile it was planned with, one for every kind of device: tells the memory that is taken."
_SEARCH_HELP = "Records that everything is chosen on (.npz); once per family."
_CALIBRATION_HELP = "Records for the certificate (.npz); once per family. Without: a draft."
_FOLDER = click.Path(file_okay=False, path_type=Path)
# exit status after Ctrl-C
_INTERRUPTED = 130


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
@click.option("--search", "search_paths", type=_FILE, multiple=True, required=True, help=_SEARCH_HELP)
@click.option("--calibration", "calibration_paths", type=_FILE, multiple=True, help=_CALIBRATION_HELP)
@click.option("--repository", type=_FOLDER, default="model_repository", show_default=True, help="What Triton serves.")
@click.option("--output", type=_FILE, required=True, callback=_make_room, help="Gear plan to write (JSON).")
@click.option("--family", "family_name", default=None, help="Family to plan alone, if the goal has several.")
@click.option(
    "--policy",
    type=click.Choice(POLICIES),
    default="cascade",
    show_default=True,
    help="What gears choose from: cascades, or one for all rates; single models, or one; the most accurate model.",
)
@click.option(
    "--minimise",
    type=click.Choice(["latency", "cost"]),
    default=None,
    help="Latency at the accuracy of a goal without SLO, or cost of endpoints that reach its rate [default: as in it].",
)
@click.option("--from-trace", type=_FILE, default=None, help="Take burstiness and rates from a trace (CSV).")
@click.option("--trace-column", default=None, help="Column of the times in that trace, by name or index from 0.")
@click.option(
    "--max-layouts",
    type=click.IntRange(min=1, max=MOST_LAYOUTS),
    default=MOST_LAYOUTS,
    show_default=True,
    help="Layouts that the load may make the orchestrator change between, where not everything fits everywhere.",
)
@click.option(
    "--time-limit",
    type=click.FloatRange(min=0.0, min_open=True),
    default=None,
    help="Seconds after which nothing is refined any more; what was left out is said.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Fixes every simulated load.")
@click.option("--name", default=None, callback=_check_name, help="Name of the plan [default: the families'].")
@click.option("--spend", is_flag=True, help="Certify although the calibration rows certified another ladder before.")
def plan(
    *,
    goal_path: Path,
    profile_paths: tuple[Path, ...],
    cluster_path: Path,
    search_paths: tuple[Path, ...],
    calibration_paths: tuple[Path, ...],
    repository: Path,
    output: Path,
    family_name: str | None,
    policy: Policy,
    minimise: Least | None,
    from_trace: Path | None,
    trace_column: str | None,
    max_layouts: int,
    time_limit: float | None,
    seed: int,
    name: str | None,
    spend: bool,
) -> None:
    """Make a gear plan; the same files and seed give the same bytes, if there is no time limit.

    Calibration rows are for one certificate. So try goals without --calibration first, and certify what you settled on.
    Interrupted, the same command goes on where it was, from OUTPUT.partial.
    """
    goals = read_goal(goal_path)
    families = choose_families(goals, goal_path, family_name)
    if from_trace is not None and len(families) > 1:
        raise UsageError("--from-trace: is the load of one family; name a trace per family in the goal")
    profiles = read_profiles(profile_paths)
    cluster = read_cluster(cluster_path)
    searches = _by_family(search_paths, families, "search")
    calibrations = _by_family(calibration_paths, families, "calibration") if calibration_paths else {}
    wanted = []
    for family in families:
        goal = goals.families[family]
        if minimise is not None:
            goal = with_least(goal, minimise)
        search = read_search(searches[family])
        tensors, num_classes, largest_batch = _signature(repository, search.models)
        sources = {"goal": goal_path, "cluster": cluster_path}
        for kind, path in zip(profiles, profile_paths, strict=True):
            sources["profile" if len(profiles) == 1 else f"profile.{kind}"] = path
        trace = from_trace or trace_path(goal, goal_path)
        if trace is not None:
            sources["trace"] = trace
        goal, prior = _load_to_plan_for(goal, goal_path, from_trace, trace_column, seed)
        digests = {what: digest_bytes(path.read_bytes()) for what, path in sources.items()}
        inputs = Inputs(
            family=family,
            goal=goal,
            prior=prior,
            profiles=profiles,
            cluster=cluster,
            search=search,
            tensors=tensors,
            num_classes=num_classes,
            largest_batch=largest_batch,
            digests=digests | {"search": search.digest()},
            policy=policy,
            max_layouts=max_layouts,
            seed=seed,
            name=name or "",
        )
        wanted.append(inputs)
    if time_limit is not None and math.isnan(time_limit):
        raise UsageError("--time-limit: nan is no number of seconds; give one above 0")
    limit = TimeLimit(time_limit)
    checkpoint = Checkpoint(output.with_name(f"{output.name}.partial"))
    try:
        with _progress() as on_progress:
            made, findings = _make(wanted, calibrations, limit, checkpoint, on_progress, spend=spend)
        write_json(output, made)
    except Infeasible:
        # another goal asks other questions
        checkpoint.remove()
        _say_left_out(limit)
        raise
    except KeyboardInterrupt:
        kept = f", from what is in {checkpoint.folder}" if checkpoint.folder.exists() else ""
        click.echo(f"interrupted; nothing was written, and the same command goes on where it was{kept}", err=True)
        raise SystemExit(_INTERRUPTED) from None
    checkpoint.remove()
    for finding in findings:
        click.echo(finding)
    _say_left_out(limit)
    # what was written is what serves: read as the orchestrator will
    _show(read_gear_plan(output, cluster), cluster, profiles)


@click.command(short_help="Say what a gear plan does and why, and what is certain about it.")
@click.argument("plan_path", metavar="PLAN", type=_FILE)
@click.option("--html", "page_path", type=_FILE, default=None, help="Write it as a page with pictures, too.")
@click.option(
    "--cluster",
    "cluster_path",
    type=_FILE,
    default=None,
    help="Cluster file: checks the endpoints and tells about them, and what they cost.",
)
@click.option("--profile", "profile_paths", type=_FILE, multiple=True, help=_EXPLAIN_PROFILE_HELP)
def explain(
    *, plan_path: Path, page_path: Path | None, cluster_path: Path | None, profile_paths: tuple[Path, ...]
) -> None:
    """Show ladder, gears, predictions and certificate of a gear plan.

    The page is one file that loads nothing: it can be sent, kept and printed.
    """
    if page_path is not None:
        check_page()
    cluster = None if cluster_path is None else read_cluster(cluster_path)
    made = read_gear_plan(plan_path, cluster)
    profiles = read_profiles(profile_paths)
    if profiles:
        if cluster is None:
            raise UsageError("--profile: which endpoints it is of stands in the cluster file; give --cluster too")
        check_planned(made, profiles, cluster)
    changed = changed_inputs(made, cluster_path, dict(zip(profiles, profile_paths, strict=True)))
    if page_path is not None:
        write_page(page_path, made, cluster, profiles, changed)
    _show(made, cluster, profiles)
    if changed is not None:
        click.echo(f"Warning: {changed}", err=True)


def _say_left_out(limit: TimeLimit) -> None:
    if limit.left_out:
        click.echo(f"The time limit was reached, which left out: {'; '.join(limit.left_out)}.", err=True)


def _by_family(paths: Sequence[Path], families: Sequence[str], split: Split) -> dict[str, Path]:
    """Records file of each family; the option that they are given by is named like their split."""
    option = f"--{split}"
    found: dict[str, Path] = {}
    for path in paths:
        family = read_family(path, split)
        if family not in families:
            wanted = " or ".join(map(repr, families))
            raise UsageError(f"{option}: {path} is of family {family!r}, but {wanted} is wanted; give its records")
        if family in found:
            raise UsageError(f"{option}: {found[family]} and {path} are both of family {family!r}; give one of them")
        found[family] = path
    if missing := [family for family in families if family not in found]:
        alone = ", or plan a family alone with --family" if len(families) > 1 else ""
        raise UsageError(f"{option}: no records of family {missing[0]!r} are given; add its file{alone}")
    return found


def _make(
    families: Sequence[Inputs],
    calibrations: Mapping[str, Path],
    limit: TimeLimit,
    checkpoint: Checkpoint,
    on_progress: Callable[[int, int], None],
    *,
    spend: bool,
) -> tuple[GearPlan, Sequence[str]]:
    """Make the plan of one family, or of several together, and say what was found on the way."""
    first = families[0]
    if len(families) > 1:
        together = FamiliesPlanner(families, limit=limit, checkpoint=checkpoint, on_progress=on_progress)
        made = together.plan(calibrations, spend=spend, name=first.name)
        return made, [f"Family {each.family!r}: {found}" for each in families for found in tightened(each)]
    alone = Planner(limit=limit, checkpoint=checkpoint, on_progress=on_progress)
    made, settled = alone.plan(first, calibrations.get(first.family), spend=spend)
    return made, settled.findings


def _load_to_plan_for(
    goal: FamilyGoal, goal_path: Path, from_trace: Path | None, column: str | None, seed: int
) -> tuple[FamilyGoal, RatePrior | None]:
    """Burstiness and rates as the goal has them, or as a trace does, which is said then."""
    if from_trace is None:
        if column is not None:
            raise UsageError("--trace-column: names a column of no trace; give --from-trace, too")
        return goal, rate_prior(goal, goal_path, seed)
    if any(given is not None for given in (goal.rate_prior, goal.trace, goal.zipf)):
        raise UsageError(
            f"--from-trace: {goal_path} says already how often each rate occurs; "
            "leave out its rate_prior, trace or zipf"
        )
    facts = trace_facts(from_trace, column=column, mean_rows=goal.mean_rows, seed=seed)
    for sentence in facts.sentences():
        click.echo(sentence)
    return msgspec.structs.replace(goal, dispersion=facts.dispersion), facts.prior


@contextlib.contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """Show a bar on a terminal."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(), TimeRemainingColumn(),
    )  # fmt: skip
    with Progress(*columns, console=console, refresh_per_second=4, disable=not console.is_terminal) as progress:
        task = progress.add_task("tuning cascades", total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def _show(made: GearPlan, cluster: Cluster | None, profiles: Mapping[str, Profile]) -> None:
    console = Console()
    for part in explain_plan(made, cluster, profiles):
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
