"""Holds Triton configs to what the native backends read, and to how the orchestrator serves.

A Python-based backend stands in for the native onnxruntime one on a developer's machine, so a config can work there and
be refused, or silently pass for less than it says, in NVIDIA's container. A field that nobody reads is a lie.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cascadeserve.errors import InvalidArtefact
from cascadeserve.triton_config import has_tensorrt_accelerator, parse_config
from export.lint.accelerators import accelerator_findings
from export.lint.backends import NATIVE, ONNXRUNTIME
from export.lint.fields import parameter_findings, unread_fields
from export.lint.finding import Finding, error, warning
from export.lint.serving import (
    backend_findings,
    backend_name,
    dynamic_batching_findings,
    ensemble_findings,
    file_findings,
    instance_group_findings,
    policy_findings,
    stage_findings,
)
from export.lint.tensors import stage_output_findings, tensor_findings, warmup_coverage, warmup_findings

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator
    from pathlib import Path

    from cascadeserve.triton_config import ModelConfig

__all__ = ["Finding", "different_fields", "lint_config", "lint_repository"]

_ANOTHER_MODEL = (
    "differs from config.pbtxt, so a server that asks for this file serves another model than the one recorded; "
    "make them agree"
)


def lint_config(
    config: ModelConfig, *, files: Collection[str] | None = None, is_stage: bool = True
) -> tuple[Finding, ...]:
    """Check one config; what is wrong, in the order of the rules.

    Args:
        config: as `cascadeserve.triton_config.parse_config` returns it.
        files: what the model folder holds, relative to it (`1/model.onnx`); None leaves files unchecked.
        is_stage: whether the orchestrator calls this model; False for the composing models of an ensemble.

    """
    return tuple(_findings(config, files, is_stage=is_stage))


def _findings(config: ModelConfig, files: Collection[str] | None, *, is_stage: bool) -> Iterator[Finding]:
    name = backend_name(config)
    native = NATIVE.get(name)
    yield from backend_findings(config)
    if files is not None:
        yield from file_findings(config, files)
    yield from tensor_findings(config, native)
    yield from instance_group_findings(config)
    yield from policy_findings(config, files)
    if native is not None:
        yield from unread_fields(config, native)
        yield from parameter_findings(config, native)
    if native is ONNXRUNTIME:
        yield from accelerator_findings(config)
    if name == "ensemble":
        yield from ensemble_findings(config)
    else:
        yield from warmup_findings(config, files)
    if is_stage:
        yield from stage_findings(config)
        yield from stage_output_findings(config)
        if name != "ensemble":
            builds_engines = native is ONNXRUNTIME and has_tensorrt_accelerator(config)
            yield from warmup_coverage(config, builds_engines=builds_engines)
    else:
        yield from dynamic_batching_findings(config)


def lint_repository(repository: Path) -> dict[str, tuple[Finding, ...]]:
    """Check every config of a repository.

    Keys are paths of config files relative to it, `<model>/config.pbtxt` and `<model>/configs/<name>.pbtxt`, sorted;
    a clean one has no findings. Models that an ensemble is made of are no stages.
    """
    folders = sorted(path for path in repository.iterdir() if path.is_dir() and not path.name.startswith("."))
    bases = {folder: _read(folder / "config.pbtxt") for folder in folders}
    composing = {
        step.model_name
        for base in bases.values()
        if not isinstance(base, Finding)
        for step in base.ensemble_scheduling.step
    }
    results: dict[str, tuple[Finding, ...]] = {}
    for folder, base in bases.items():
        is_stage = folder.name not in composing
        files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
        key = f"{folder.name}/config.pbtxt"
        if isinstance(base, Finding):
            results[key] = (base,)
        else:
            results[key] = (*_name_findings(base, folder), *lint_config(base, files=files, is_stage=is_stage))
        for path in sorted(folder.glob("configs/*.pbtxt")):
            variant = _read(path)
            results[f"{folder.name}/configs/{path.name}"] = (
                (variant,)
                if isinstance(variant, Finding)
                else tuple(_variant_findings(base, variant, files, is_stage=is_stage))
            )
    return results


def _read(path: Path) -> ModelConfig | Finding:
    """Return the config, or why there is none: one broken file must not hide what is wrong with the others."""
    try:
        return parse_config(path.read_text(), path=path.name)
    except FileNotFoundError:
        return error("", "is missing; write a complete config, for nothing is auto-completed")
    except (OSError, UnicodeDecodeError) as problem:
        return error("", f"cannot be read: {problem}; replace it by a text file")
    except InvalidArtefact as problem:
        return error("", f"{problem}; correct it")


def _name_findings(config: ModelConfig, folder: Path) -> Iterator[Finding]:
    if config.name != folder.name:
        yield error("name", f'Triton takes a model by its folder, "{folder.name}", not "{config.name}"; name it so')


def _variant_findings(
    base: ModelConfig | Finding, variant: ModelConfig, files: Collection[str], *, is_stage: bool
) -> Iterator[Finding]:
    """Check a config that a server asks for by name; an endpoint's differs from the base in its instances only."""
    if isinstance(base, Finding):
        yield from lint_config(variant, files=files, is_stage=is_stage)
        return
    different = different_fields(base, variant) - {"instance_group"}
    if different - {"dynamic_batching"}:
        for field in sorted(different):
            yield error(field, _ANOTHER_MODEL)
        known = set(lint_config(base, files=files, is_stage=is_stage))
        yield from (found for found in lint_config(variant, files=files, is_stage=is_stage) if found not in known)
        return
    # the rest is the base's, word for word, and was checked there
    yield from instance_group_findings(variant)
    if different:
        yield warning(
            "dynamic_batching",
            "differs from config.pbtxt; keep that to a baseline that is served without the orchestrator",
        )
        yield from dynamic_batching_findings(variant)


def different_fields(first: ModelConfig, second: ModelConfig) -> set[str]:
    """Names of the fields in which two configs differ."""
    fields = {descriptor.name for config in (first, second) for descriptor, _ in config.ListFields()}
    return {name for name in fields if _only(first, name) != _only(second, name)}


def _only(config: ModelConfig, field: str) -> ModelConfig:
    """Copy of a config with one field: messages compare by value, absent blocks apart from empty ones."""
    bare = type(config)()
    bare.CopyFrom(config)
    for descriptor, _ in config.ListFields():
        if descriptor.name != field:
            bare.ClearField(descriptor.name)
    return bare
