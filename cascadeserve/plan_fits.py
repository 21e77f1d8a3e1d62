"""Checks a gear plan against the model repository that is to serve it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cascadeserve.errors import InvalidArtefact
from cascadeserve.triton_config import composing_models, input_specs, model_digest, model_versions, read_config

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from cascadeserve.gear_plan import GearPlan, PlannedFamily, PlannedModel


def check_plan_fits_repository(plan: GearPlan, repository: Path, *, path: Path) -> None:
    """Compare a plan, read from `path`, with the configs of a repository.

    Raises:
        InvalidArtefact: a model or its version is missing there, is another one than was profiled, takes other inputs
            or smaller batches, or is made of other models.

    """
    for family_name, family in plan.families.items():
        for field, problem in _problems(family, repository, f"$.families.{family_name}"):
            raise InvalidArtefact(problem, path=path, field=field)


def _problems(family: PlannedFamily, repository: Path, at: str) -> Iterator[tuple[str, str]]:
    for name, planned in family.models.items():
        file = repository / name / "config.pbtxt"
        if not file.is_file():
            yield f"{at}.models.{name}", f"is not in {repository}"
            continue
        yield from _identity_problems(planned, repository / name, f"{at}.models.{name}")
        config = read_config(file)
        if planned.max_batch > max(config.max_batch_size, 1):
            yield f"{at}.models.{name}.max_batch", f"is {planned.max_batch}, but {file} allows {config.max_batch_size}"
        if (parts := composing_models(config)) != tuple(planned.composed_of):
            made = f"is an ensemble of {', '.join(parts)}" if parts else "is no ensemble"
            yield f"{at}.models.{name}.composed_of", f"does not fit {file}, which {made}; plan with this repository"
        for part, version in planned.composed_of.items():
            if not (repository / part / "config.pbtxt").is_file():
                yield f"{at}.models.{name}.composed_of", f"names {part!r}, which is not in {repository}"
            elif (newest := max(model_versions(repository / part), default=0)) != version:
                yield (
                    f"{at}.models.{name}.composed_of.{part}",
                    f"is {version}, but {newest} is the newest in {repository / part}, which is what Triton joins",
                )
        if (inputs := input_specs(config)) != family.inputs:
            expected = ", ".join(f"{spec.name} {spec.datatype} {list(spec.shape)}" for spec in inputs)
            yield f"{at}.inputs", f"differ from those of model {name!r} in {file}: {expected}"


def _identity_problems(planned: PlannedModel, folder: Path, at: str) -> Iterator[tuple[str, str]]:
    versions = model_versions(folder)
    if planned.version not in versions:
        held = ", ".join(map(str, versions)) or "none"
        yield f"{at}.version", f"is {planned.version}, but the versions in {folder} are {held}"
    elif planned.digest is not None and model_digest(folder, planned.version) != planned.digest:
        what = f"is that of the model which was profiled, and {folder} holds another one now"
        yield f"{at}.digest", f"{what}; plan with this repository, or serve the one that the plan was made with"
