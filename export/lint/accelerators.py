"""Execution accelerators of the onnxruntime backend: TensorRT, CUDA and OpenVINO behind ONNX Runtime."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from export.lint.backends import (
    CUDA_ACCELERATOR,
    ONNXRUNTIME,
    SET_BY_THE_BACKEND,
    TENSORRT_ACCELERATOR,
)
from export.lint.fields import value_findings
from export.lint.finding import Finding, enum_name, error, meant, warning

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from cascadeserve.triton_config import ModelConfig

Shape = tuple[int, ...]
Profiles = dict[str, list[Shape]]

_GPU = "optimization.execution_accelerators.gpu_execution_accelerator"
_CPU = "optimization.execution_accelerators.cpu_execution_accelerator"
_PROFILE_KEYS = tuple(f"trt_profile_{bound}_shapes" for bound in ("min", "opt", "max"))
# What a cache or a prefix is good for: key -> the flag without which ONNX Runtime passes over it
_NEEDS_FLAG = {
    "trt_engine_cache_path": "trt_engine_cache_enable",
    "trt_engine_cache_prefix": "trt_engine_cache_enable",
    "trt_timing_cache_path": "trt_timing_cache_enable",
    "trt_force_timing_cache": "trt_timing_cache_enable",
}
_ON = ("1", "true", "True")


def accelerator_findings(config: ModelConfig) -> Iterator[Finding]:
    """Accelerators, parameters and values that the onnxruntime backend does not take."""
    accelerators = config.optimization.execution_accelerators
    names = [accelerator.name for accelerator in accelerators.gpu_execution_accelerator]
    for index, accelerator in enumerate(accelerators.gpu_execution_accelerator):
        field = f"{_GPU}[{index}]"
        values = dict(sorted(accelerator.parameters.items()))
        if accelerator.name in names[:index]:
            yield error(f"{field}.name", f'"{accelerator.name}" stands twice; keep one')
        if accelerator.name == "tensorrt":
            yield from _tensorrt(config, values, f"{field}.parameters")
        elif accelerator.name == "cuda":
            yield from _cuda(values, f"{field}.parameters")
        else:
            yield error(
                f"{field}.name",
                f'the native onnxruntime backend refuses "{accelerator.name}" on a GPU; say "tensorrt" or "cuda"'
                f"{meant(accelerator.name, ('tensorrt', 'cuda'))}",
            )
    if names and {enum_name(group, "kind") for group in config.instance_group} == {"KIND_CPU"}:
        yield warning(_GPU, "is read only for instances on a GPU, and all of these run on a CPU; remove it")
    for index, accelerator in enumerate(accelerators.cpu_execution_accelerator):
        field = f"{_CPU}[{index}]"
        if accelerator.name != "openvino":
            yield error(
                f"{field}.name",
                f'the native onnxruntime backend refuses "{accelerator.name}" on a CPU; say "openvino" or remove it',
            )
        for key in sorted(accelerator.parameters):
            yield error(
                f'{field}.parameters["{key}"]',
                "the native onnxruntime backend reads no parameters of a CPU accelerator; remove it",
            )


def _cuda(values: Mapping[str, str], field: str) -> Iterator[Finding]:
    for key in values:
        if key in SET_BY_THE_BACKEND:
            yield error(f'{field}["{key}"]', "is set by the backend from the instance; remove it")
        elif key in ONNXRUNTIME.parameters:
            yield error(
                f'{field}["{key}"]',
                f'is overwritten by the backend from the model\'s own parameters; set parameters["{key}"] instead',
            )
    elsewhere = SET_BY_THE_BACKEND | ONNXRUNTIME.parameters.keys()
    rest = {key: value for key, value in values.items() if key not in elsewhere}
    yield from value_findings(rest, CUDA_ACCELERATOR, field, "ONNX Runtime's CUDA provider")


def _tensorrt(config: ModelConfig, values: Mapping[str, str], field: str) -> Iterator[Finding]:
    yield from value_findings(values, TENSORRT_ACCELERATOR, field, "the native onnxruntime backend")
    for key, flag in _NEEDS_FLAG.items():
        if key in values and values.get(flag) not in _ON:
            yield warning(f'{field}["{key}"]', f'is not read unless {flag} is "1"; set it or remove this')
    if values.get("trt_engine_cache_enable") not in _ON:
        yield warning(
            f'{field}["trt_engine_cache_enable"]',
            "every new instance builds its engines again, for seconds to minutes; "
            'set it to "1" and give trt_engine_cache_path',
        )
    elif "trt_engine_cache_path" not in values:
        yield warning(
            f'{field}["trt_engine_cache_path"]', "engines are cached in the server's working folder; give a path"
        )
    yield from _profile_findings(config, values, field)


def _profile_findings(config: ModelConfig, values: Mapping[str, str], field: str) -> Iterator[Finding]:
    missing = [key for key in _PROFILE_KEYS if key not in values]
    if len(missing) == len(_PROFILE_KEYS):
        yield warning(
            f'{field}["{_PROFILE_KEYS[0]}"]',
            "an engine is built whenever a batch is larger or smaller than any before; "
            f"give {', '.join(_PROFILE_KEYS)}",
        )
        return
    if missing:
        yield error(
            f'{field}["{missing[0]}"]',
            f"ONNX Runtime drops all profile shapes unless the three of them are given; add {' and '.join(missing)}",
        )
        return
    bounds = []
    for key in _PROFILE_KEYS:
        profiles = _parse_shapes(values[key])
        if profiles is None:
            example = ",".join(f"{entry.name}:{'x'.join(map(str, _row(entry)))}" for entry in config.input)
            yield error(f'{field}["{key}"]', f'must list shapes such as "{example}", not "{values[key]}"')
        else:
            bounds.append(profiles)
    if len(bounds) != len(_PROFILE_KEYS):
        return
    counts = [{name: len(shapes) for name, shapes in profiles.items()} for profiles in bounds]
    if counts[0] != counts[1] or counts[0] != counts[2]:
        yield error(
            f'{field}["{_PROFILE_KEYS[0]}"]',
            "the min, opt and max shapes must name the same inputs equally often, "
            "or ONNX Runtime drops all three; make them alike",
        )
        return
    yield from _profiles_of_inputs(config, bounds, field)


def _parse_shapes(text: str) -> Profiles | None:
    # as ParseProfileShapes in onnxruntime, core/providers/tensorrt/tensorrt_execution_provider_utils.h
    profiles: Profiles = {}
    for entry in text.split(","):
        if not re.fullmatch(r"[^:\s]+:\d{1,9}(x\d{1,9})*", entry):
            return None
        name, _, shape = entry.partition(":")
        profiles.setdefault(name, []).append(tuple(int(size) for size in shape.split("x")))
    return profiles


def _profiles_of_inputs(config: ModelConfig, bounds: Sequence[Profiles], field: str) -> Iterator[Finding]:
    lowest, middle, highest = bounds
    path = f'{field}["{_PROFILE_KEYS[0]}"]'
    inputs = {entry.name: entry for entry in config.input}
    for name in lowest:
        if name not in inputs:
            yield warning(path, f'"{name}" is no input of this config; remove it unless it enters a part of the graph')
    for name, entry in inputs.items():
        if name not in lowest:
            yield error(path, f'lacks the input "{name}", whose batch size varies; add its shape to all three')
            continue
        wanted = _shape(config, entry)
        ranges = list(zip(lowest[name], middle[name], highest[name], strict=True))
        shapes = [shape for shapes in ranges for shape in shapes]
        if wrong := [shape for shape in shapes if not _fits(shape, wanted)]:
            yield error(
                path,
                f'the shape {_text(wrong[0])} of "{name}" does not fit the config; write {_text(wanted)}, with numbers '
                "for -1",
            )
            continue
        if any(
            not low <= best <= high
            for bound in ranges
            for low, best, high in zip(*bound, strict=True)
        ):  # fmt: skip
            yield error(path, f'the shapes of "{name}" must rise from min over opt to max in every dimension')
        if config.max_batch_size > 0:
            yield from _batches_covered(
                [(low[0], high[0]) for low, _, high in ranges], config.max_batch_size, name, path
            )


def _batches_covered(ranges: Sequence[tuple[int, int]], max_batch: int, name: str, path: str) -> Iterator[Finding]:
    covered = 0
    for low, high in sorted(ranges):
        if low <= covered + 1:
            covered = max(covered, high)
    if covered < max_batch:
        yield error(
            path,
            f'the profiles of "{name}" cover batches up to {covered}, but any from 1 to {max_batch} may come; '
            "widen min or max",
        )
    elif covered > max_batch:
        yield warning(
            path,
            f'the profiles of "{name}" reach to {covered} rows, beyond max_batch_size {max_batch}; lower max, '
            "for engines that are faster and smaller",
        )


def _row(entry: ModelConfig) -> Shape:
    """Shape of one row as the model file states it; batch axis first."""
    return (1, *(max(size, 1) for size in (entry.reshape.shape if entry.HasField("reshape") else entry.dims)))


def _shape(config: ModelConfig, entry: ModelConfig) -> Shape:
    batch = (-1,) if config.max_batch_size > 0 else ()
    return (*batch, *(entry.reshape.shape if entry.HasField("reshape") else entry.dims))


def _fits(shape: Shape, wanted: Shape) -> bool:
    return len(shape) == len(wanted) and all(
        size >= 1 if limit == -1 else size == limit for size, limit in zip(shape, wanted, strict=True)
    )


def _text(shape: Shape) -> str:
    return "x".join(map(str, shape))
