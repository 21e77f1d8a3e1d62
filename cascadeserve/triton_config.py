"""Triton model configs: text to protobuf and back, instance counts, versions, digests.

The schema is tritonclient's own `ModelConfig`, so that whatever Triton knows survives a round trip.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, Literal

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

from cascadeserve.errors import InvalidArtefact
from cascadeserve.gear_plan import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

ModelConfig = Any  # model_config_pb2.ModelConfig; tritonclient carries no types

_READ_BYTES = 1 << 20


def cascade_model_config(
    name: str, inputs: Sequence[TensorSpec], *, num_classes: int, max_batch_size: int, scores: bool = True
) -> ModelConfig:
    """Complete config of an ONNX model with the outputs of a cascade stage: nothing is left to auto-completion.

    `scores` says whether the model has the output of that name.

    No `dynamic_batching`: the orchestrator batches, and Triton's queue policies stall.
    """
    config = model_config_pb2.ModelConfig(
        name=name, backend="onnxruntime", max_batch_size=max_batch_size, default_model_filename="model.onnx"
    )
    _add_stage_tensors(config, inputs, num_classes, scores=scores)
    config.instance_group.add(count=1, kind=model_config_pb2.ModelInstanceGroup.KIND_AUTO)
    # One thread per instance: instances, not threads, are what a plan counts.
    config.parameters["intra_op_thread_count"].string_value = "1"
    for rows in sorted({1, max_batch_size}):
        warmup = config.model_warmup.add(name=f"batch-{rows}", batch_size=rows)
        for spec in inputs:
            tensor = warmup.inputs[spec.name]
            tensor.data_type = _data_type(spec.datatype)
            tensor.dims.extend(max(size, 1) for size in spec.shape)
            tensor.zero_data = True
    return config


def _add_stage_tensors(config: ModelConfig, inputs: Sequence[TensorSpec], num_classes: int, *, scores: bool) -> None:
    for spec in inputs:
        config.input.add(name=spec.name, data_type=_data_type(spec.datatype), dims=spec.shape)
    outputs = [("label", "INT64", 1), ("certainty", "FP32", 1), *([("scores", "FP32", num_classes)] if scores else [])]
    for output, datatype, size in outputs:
        config.output.add(name=output, data_type=_data_type(datatype), dims=[size])


def preprocessing_config(
    name: str, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], *, max_batch_size: int
) -> ModelConfig:
    """Complete config of a Python-backend model that turns a family's inputs into those of one model, on the CPU."""
    config = model_config_pb2.ModelConfig(name=name, backend="python", max_batch_size=max_batch_size)
    for spec in inputs:
        config.input.add(name=spec.name, data_type=_data_type(spec.datatype), dims=spec.shape)
    for spec in outputs:
        config.output.add(name=spec.name, data_type=_data_type(spec.datatype), dims=spec.shape)
    config.instance_group.add(count=1, kind=model_config_pb2.ModelInstanceGroup.KIND_CPU)
    return config


def ensemble_config(
    name: str,
    inputs: Sequence[TensorSpec],
    *,
    preprocessing: str,
    between: Sequence[TensorSpec],
    classifier: str,
    num_classes: int,
    max_batch_size: int,
    scores: bool = True,
) -> ModelConfig:
    """Config of a cascade stage that Triton joins from a preprocessing model and a classifier.

    `between` is what goes from the one to the other. An ensemble has no instances: those of its models do the work.
    """
    config = model_config_pb2.ModelConfig(name=name, platform="ensemble", max_batch_size=max_batch_size)
    _add_stage_tensors(config, inputs, num_classes, scores=scores)
    steps = config.ensemble_scheduling
    first = steps.step.add(model_name=preprocessing, model_version=-1)
    second = steps.step.add(model_name=classifier, model_version=-1)
    for spec in config.input:
        first.input_map[spec.name] = spec.name
    for tensor in between:
        # tensors of an ensemble share one space of names, with its inputs and outputs
        first.output_map[tensor.name] = second.input_map[tensor.name] = f"{preprocessing}:{tensor.name}"
    for spec in config.output:
        second.output_map[spec.name] = spec.name
    return config


def composing_models(config: ModelConfig) -> tuple[str, ...]:
    """Names of the models that an ensemble is made of, in the order of its steps; of any other model: none."""
    return tuple(dict.fromkeys(step.model_name for step in config.ensemble_scheduling.step))


def input_specs(config: ModelConfig) -> tuple[TensorSpec, ...]:
    """Inputs of a config, in its order."""
    return tuple(
        TensorSpec(name=entry.name, datatype=_datatype(entry.data_type), shape=tuple(entry.dims))
        for entry in config.input
    )


def _datatype(data_type: int) -> Any:  # noqa: ANN401 - one of gear_plan.Datatype
    name = model_config_pb2.DataType.Name(data_type)
    return "BYTES" if name == "TYPE_STRING" else name.removeprefix("TYPE_")


def _data_type(datatype: str) -> int:
    name = "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"
    return int(model_config_pb2.DataType.Value(name))


def read_config(path: Path) -> ModelConfig:
    """Parse the text config in a file.

    Raises:
        InvalidArtefact: the file cannot be read, or is no model config.

    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise InvalidArtefact(f"cannot be read ({error.strerror}); check the path", path=path) from error
    except UnicodeDecodeError as error:
        raise InvalidArtefact(f"is no text in UTF-8 ({error})", path=path) from error
    return parse_config(text, path=path)


def parse_config(text: str, *, path: Path | str | None = None) -> ModelConfig:
    """Parse the text of a `config.pbtxt`; `path` is only for the error.

    Raises:
        InvalidArtefact: naming line and column.

    """
    try:
        return text_format.Parse(text, model_config_pb2.ModelConfig())
    except text_format.ParseError as error:
        raise InvalidArtefact(f"is no Triton model config: {error}", path=path) from error


def format_config(config: ModelConfig) -> str:
    """Text of a config, the same for equal configs."""
    ordered = model_config_pb2.ModelConfig.FromString(config.SerializeToString(deterministic=True))
    return text_format.MessageToString(ordered)


def instance_count(config: ModelConfig) -> int:
    """Instances over all groups; an ensemble, which has none of its own, counts as one."""
    if config.HasField("ensemble_scheduling"):
        return 1
    return sum(group.count for group in config.instance_group)


def with_instance_count(
    config: ModelConfig, count: int, *, kind: Literal["cpu", "gpu"], gpu: int | None = None
) -> ModelConfig:
    """Copy of a config with exactly one instance group of `count` instances on the endpoint's device.

    Triton would take a count of 0 or less for 1 or 2 without a word, so it is refused here. An ensemble stays as it is:
    Triton refuses one with an instance group. What runs on the CPU by its config stays there.
    """
    if count < 1:
        raise ValueError(f"an instance count must be at least 1, got {count}")
    changed = model_config_pb2.ModelConfig()
    changed.CopyFrom(config)
    if config.HasField("ensemble_scheduling"):
        return changed
    del changed.instance_group[:]
    if kind == "gpu" and not _is_for_cpu(config):
        changed.instance_group.add(count=count, kind=model_config_pb2.ModelInstanceGroup.KIND_GPU, gpus=[gpu or 0])
    else:
        changed.instance_group.add(count=count, kind=model_config_pb2.ModelInstanceGroup.KIND_CPU)
    return changed


def has_tensorrt_accelerator(config: ModelConfig) -> bool:
    """Whether ONNX Runtime hands the model to TensorRT, which takes a GPU and builds engines for the shapes it sees."""
    return any(
        accelerator.name == "tensorrt"
        for accelerator in config.optimization.execution_accelerators.gpu_execution_accelerator
    )


def model_versions(model_directory: Path) -> list[int]:
    """Versions of a model, rising: the subfolders that have a whole number for a name, as Triton counts them."""
    folders = (path for path in model_directory.glob("[1-9]*") if path.is_dir())
    return sorted(int(path.name) for path in folders if path.name.isdecimal() and path.name.isascii())


def served_versions(config: ModelConfig, present: Iterable[int]) -> set[int]:
    """Which of the versions that are present a server with this config loads."""
    policy = config.version_policy
    choice = policy.WhichOneof("policy_choice")
    if choice == "specific":
        return set(present) & set(policy.specific.versions)
    if choice == "all":
        return set(present)
    return set(sorted(present)[-(policy.latest.num_versions or 1) :])


def with_versions(config: ModelConfig, versions: Iterable[int]) -> ModelConfig:
    """Copy of a config that serves exactly these versions, side by side."""
    changed = model_config_pb2.ModelConfig()
    changed.CopyFrom(config)
    changed.ClearField("version_policy")
    changed.version_policy.specific.versions.extend(sorted(versions))
    return changed


def _is_for_cpu(config: ModelConfig) -> bool:
    cpu = model_config_pb2.ModelInstanceGroup.KIND_CPU
    return bool(config.instance_group) and all(group.kind == cpu for group in config.instance_group)


def config_digest(config: ModelConfig) -> str:
    """Digest of what a model is: everything but how many instances run and which versions are served."""
    bare = model_config_pb2.ModelConfig()
    bare.CopyFrom(config)
    bare.ClearField("instance_group")
    bare.ClearField("version_policy")
    return f"sha256:{hashlib.sha256(bare.SerializeToString(deterministic=True)).hexdigest()}"


def model_digest(model_directory: Path, version: int | None = None) -> str:
    """Digest of one version of a model (default: the newest).

    It is over the config as in `config_digest`, and the name and content of every file that is the version's or belongs
    to no version. That of an ensemble covers the models that it is made of, which lie beside it, as Triton joins them.

    Raises:
        InvalidArtefact: a config cannot be read.

    """
    versions = model_versions(model_directory)
    others = {str(each) for each in versions} - {str(version or max(versions, default=0))}
    total = hashlib.sha256()
    config = read_config(model_directory / "config.pbtxt")
    total.update(config_digest(config).encode())
    for name in composing_models(config):
        part = model_directory.parent / name
        if composing_models(read_config(part / "config.pbtxt")):
            problem = f"is an ensemble within the ensemble {model_directory.name!r}; name the models that it is made of"
            raise InvalidArtefact(problem, path=part / "config.pbtxt", field="ensemble_scheduling")
        total.update(model_digest(part).encode())
    for file in sorted(model_directory.rglob("*")):
        relative = file.relative_to(model_directory)
        left_out = relative.parts[0] in {"config.pbtxt", "configs"} | others or "__pycache__" in relative.parts
        if left_out or not file.is_file():
            continue
        total.update(f"\0{relative.as_posix()}\0{file.stat().st_size}\0".encode())
        with file.open("rb") as content:
            while block := content.read(_READ_BYTES):
                total.update(block)
    return f"sha256:{total.hexdigest()}"
