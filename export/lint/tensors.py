"""Inputs, outputs and warm-ups: what Triton refuses, and what a stage of a cascade must offer."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

from export.lint.finding import Finding, enum_name, error, warning

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from cascadeserve.triton_config import ModelConfig
    from export.lint.backends import Backend

_STAGE_OUTPUTS = {"label": "TYPE_INT64", "certainty": "TYPE_FP32", "scores": "TYPE_FP32"}
_MIN_CLASSES = 2
_IMAGE_AXES = 3


def tensor_findings(config: ModelConfig, backend: Backend | None) -> Iterator[Finding]:
    """What Triton (core: src/model_config_utils.cc, ValidateIOShape) or the backend refuses about a tensor."""
    for group in ("input", "output"):
        entries = getattr(config, group)
        if not entries:
            yield error(group, f"the config states no {group}s, and nothing is auto-completed; list them")
        names = [entry.name for entry in entries]
        for index, entry in enumerate(entries):
            field = f"{group}[{index}]"
            if not entry.name:
                yield error(f"{field}.name", "Triton refuses a tensor without a name; give the one in the model file")
            elif entry.name in names[:index]:
                yield error(f"{field}.name", f'"{entry.name}" stands twice; keep one')
            yield from _datatype_findings(entry, field, backend)
            yield from _shape_findings(entry, field)
    for index, entry in enumerate(config.input):
        yield from _input_findings(config, entry, f"input[{index}]")


def _datatype_findings(entry: Any, field: str, backend: Backend | None) -> Iterator[Finding]:  # noqa: ANN401
    datatype = enum_name(entry, "data_type")
    if datatype == "TYPE_INVALID":
        yield error(f"{field}.data_type", "Triton refuses a tensor without a type; say which, such as TYPE_FP32")
    elif backend is not None and datatype not in backend.datatypes:
        yield error(
            f"{field}.data_type", f"the native {backend.name} backend has no {datatype} tensors; export another type"
        )
    if backend is not None and backend.name != "tensorrt":
        for flag in ("is_shape_tensor", "is_non_linear_format_io"):
            if getattr(entry, flag):
                yield error(f"{field}.{flag}", "Triton takes this for the tensorrt backend only; remove it")


def _shape_findings(entry: Any, field: str) -> Iterator[Finding]:  # noqa: ANN401
    if not entry.dims:
        yield error(f"{field}.dims", "Triton refuses empty dims; a tensor of one number per row has dims [1]")
    elif any(size < 1 and size != -1 for size in entry.dims):
        yield error(
            f"{field}.dims", f"Triton refuses {list(entry.dims)}; sizes are 1 or more, or -1 for a variable one"
        )
    elif entry.HasField("reshape"):
        shape = list(entry.reshape.shape)
        if any(size < 1 and size != -1 for size in shape):
            yield error(f"{field}.reshape", f"Triton refuses {shape}; sizes are 1 or more, or -1 for a variable one")
        elif shape.count(-1) != list(entry.dims).count(-1) or prod(shape) != prod(entry.dims):
            yield error(f"{field}.reshape", f"{shape} holds another number of elements than dims; make them agree")


def _input_findings(config: ModelConfig, entry: Any, field: str) -> Iterator[Finding]:  # noqa: ANN401
    if enum_name(entry, "format") != "FORMAT_NONE" and len(entry.dims) != _IMAGE_AXES:
        yield error(f"{field}.format", "Triton takes an image format with three dims only; leave it out")
    if entry.optional and config.max_batch_size > 0:
        yield error(f"{field}.optional", "no native backend takes optional inputs with batching; remove it")


def stage_output_findings(config: ModelConfig) -> Iterator[Finding]:
    """What the orchestrator asks every stage for: label, certainty and, where a family offers them, scores."""
    outputs = {entry.name: (index, entry) for index, entry in enumerate(config.output)}
    for name, datatype in _STAGE_OUTPUTS.items():
        if name not in outputs:
            if name != "scores":
                yield error(
                    "output",
                    f'a stage has an output "{name}" of type {datatype} and dims [1]; export it, or name the output so',
                )
            continue
        yield from _stage_output_findings(name, datatype, *outputs[name])
    for name, (index, entry) in outputs.items():
        if name not in _STAGE_OUTPUTS:
            yield warning(f"output[{index}]", f'the orchestrator never asks for "{name}"; remove it')
        if entry.label_filename:
            yield warning(
                f"output[{index}].label_filename",
                "is read for classification requests only, which the orchestrator does not send; remove it",
            )


def _stage_output_findings(name: str, datatype: str, index: int, entry: Any) -> Iterator[Finding]:  # noqa: ANN401
    if (found := enum_name(entry, "data_type")) not in {datatype, "TYPE_INVALID"}:
        yield error(f"output[{index}].data_type", f'"{name}" of a stage is {datatype}, not {found}; cast it')
    dims = list(entry.dims)
    if name == "scores":
        if dims and (len(dims) != 1 or 0 <= dims[0] < _MIN_CLASSES or dims[0] == -1):
            yield error(
                f"output[{index}].dims", f'"scores" of a stage has dims [classes], 2 or more, not {dims}; fix them'
            )
    elif dims and dims != [1]:
        yield error(f"output[{index}].dims", f'"{name}" of a stage has dims [1], not {dims}; reduce it to one number')


def warmup_findings(config: ModelConfig, files: Collection[str] | None) -> Iterator[Finding]:
    """Warm-ups that fail or are passed over (core: src/backend_model_instance.cc, GenerateWarmupData)."""
    inputs = {entry.name: entry for entry in config.input}
    for index, warmup in enumerate(config.model_warmup):
        field = f"model_warmup[{index}]"
        if warmup.batch_size == 0:
            yield error(f"{field}.batch_size", "Triton passes over a warm-up of batch 0; give the rows")
        elif warmup.batch_size > max(config.max_batch_size, 1):
            yield error(
                f"{field}.batch_size",
                f"{warmup.batch_size} rows are more than max_batch_size {config.max_batch_size}, so the model would "
                "not load; lower it",
            )
        for name, entry in inputs.items():
            if name not in warmup.inputs and not entry.optional:
                yield error(f"{field}.inputs", f'lacks the input "{name}", so the model would not load; add it')
        for name in sorted(warmup.inputs):
            path = f'{field}.inputs["{name}"]'
            if name not in inputs:
                yield error(path, "is no input of this config; remove it or correct the name")
            else:
                yield from _warmup_tensor(warmup.inputs[name], inputs[name], path, files)


def _warmup_tensor(tensor: Any, entry: Any, path: str, files: Collection[str] | None) -> Iterator[Finding]:  # noqa: ANN401
    found, wanted = enum_name(tensor, "data_type"), enum_name(entry, "data_type")
    if found != wanted:
        yield error(f"{path}.data_type", f"the input is {wanted}, not {found}; say the same here")
    dims, limits = list(tensor.dims), list(entry.dims)
    if len(dims) != len(limits) or any(
        size < 1 or limit not in {-1, size} for size, limit in zip(dims, limits, strict=False)
    ):
        yield error(f"{path}.dims", f"{dims} is no shape of a row {limits}; write its sizes, numbers for -1, no batch")
    source = tensor.WhichOneof("input_data_type")
    if source is None:
        yield error(path, "says no source of data, so the model would not load; set zero_data or random_data")
    elif source == "input_data_file" and files is not None and f"warmup/{tensor.input_data_file}" not in files:
        yield error(
            f"{path}.input_data_file", f"the model folder holds no warmup/{tensor.input_data_file}; add the file"
        )


def warmup_coverage(config: ModelConfig, *, builds_engines: bool) -> Iterator[Finding]:
    """Whether the smallest and the largest batch are run before the model takes requests."""
    if config.max_batch_size < 1:
        return
    warm = {warmup.batch_size for warmup in config.model_warmup}
    missing = sorted({1, config.max_batch_size} - warm)
    if not missing:
        return
    batches = " and ".join(map(str, missing))
    if builds_engines:
        yield error(
            "model_warmup",
            f"no warm-up of batch {batches}, so requests would wait for TensorRT to build engines; add it",
        )
    else:
        yield warning("model_warmup", f"no warm-up of batch {batches}, so the first requests are slow; add it")
