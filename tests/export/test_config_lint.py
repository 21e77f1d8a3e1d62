from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cascadeserve.gear_plan import TensorSpec
from cascadeserve.triton_config import cascade_model_config, format_config, parse_config, with_instance_count
from export.config_lint import Finding, lint_config, lint_repository
from export.lint.backends import CUDA_ACCELERATOR, NATIVE, TENSORRT_ACCELERATOR

ROOT = Path(__file__).parents[2]
MODELS = ROOT / "model_repository"
INPUT = TensorSpec(name="image", datatype="FP32", shape=(3, 32, 32))
GPU = "optimization.execution_accelerators.gpu_execution_accelerator"
CPU = "optimization.execution_accelerators.cpu_execution_accelerator"

TENSORRT = {
    "precision_mode": "FP16",
    "max_workspace_size_bytes": "1073741824",
    "trt_engine_cache_enable": "1",
    "trt_engine_cache_path": "/cache/trt/small",
    "trt_timing_cache_enable": "true",
    "trt_timing_cache_path": "/cache/trt",
    "trt_profile_min_shapes": "image:1x3x32x32",
    "trt_profile_opt_shapes": "image:4x3x32x32",
    "trt_profile_max_shapes": "image:8x3x32x32",
}

Change = Callable[[Any], Any]
VERSIONS = {"2/model.onnx", "10/model.onnx"}


def clean(*, backend: str = "onnxruntime", shape: tuple[int, ...] = (3, 32, 32), max_batch_size: int = 8) -> Any:
    """A config as `cascadeserve export` writes it."""
    inputs = (TensorSpec(name="image", datatype="FP32", shape=shape),)
    config = cascade_model_config("small", inputs, num_classes=10, max_batch_size=max_batch_size)
    if backend != "onnxruntime":
        config.backend = backend
        config.default_model_filename = NATIVE[backend].model_file if backend in NATIVE else "model.py"
        config.ClearField("parameters")
    return config


def merged(config: Any, text: str) -> Any:
    config.MergeFrom(parse_config(text))
    return config


def accelerated(changes: dict[str, str | None] | None = None, **options: Any) -> Any:
    """A clean config with ONNX Runtime's TensorRT provider; None takes a parameter away."""
    config = clean(**options)
    accelerator = config.optimization.execution_accelerators.gpu_execution_accelerator.add(name="tensorrt")
    for key, value in (TENSORRT | (changes or {})).items():
        if value is not None:
            accelerator.parameters[key] = value
    return config


def with_shapes(low: str, best: str, high: str) -> dict[str, str | None]:
    return {"trt_profile_min_shapes": low, "trt_profile_opt_shapes": best, "trt_profile_max_shapes": high}


def changed(config: Any, change: Change | str) -> Any:
    if isinstance(change, str):
        return merged(config, change)
    change(config)
    return config


def _at(config: Any, path: list[str]) -> Any:
    for step in path:
        if step.isdigit():
            config = config[int(step)]
        else:
            config = getattr(config, step) if hasattr(config, step) else config[step]
    return config


def put(path: str, value: Any) -> Change:
    def change(config: Any) -> None:
        *way, last = path.split(".")
        if last.isdigit():
            _at(config, way)[int(last)] = value
        else:
            setattr(_at(config, way), last, value)

    return change


def append(path: str, *values: Any) -> Change:
    return lambda config: _at(config, path.split(".")).extend(values)


def drop(path: str) -> Change:
    def change(config: Any) -> None:
        *way, last = path.split(".")
        if last.isdigit():
            del _at(config, way)[int(last)]
        else:
            _at(config, way).ClearField(last)

    return change


def both(*changes: Change | str) -> Change:
    def change(config: Any) -> None:
        for each in changes:
            changed(config, each)

    return change


def warmup(rows: int) -> str:
    tensor = "data_type: TYPE_FP32 dims: [3, 32, 32] zero_data: true"
    return f"model_warmup {{ name: 'more' batch_size: {rows} inputs {{ key: 'image' value {{ {tensor} }} }} }}"


def parameter(key: str, value: str) -> str:
    return f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }}'


def the_only(findings: tuple[Finding, ...]) -> Finding:
    assert len(findings) == 1, "\n".join(map(str, findings))
    return findings[0]


def ensemble() -> Any:
    return parse_config("""
        name: "joined" platform: "ensemble" max_batch_size: 8
        input { name: "raw" data_type: TYPE_UINT8 dims: 10 }
        output { name: "label" data_type: TYPE_INT64 dims: 1 }
        output { name: "certainty" data_type: TYPE_FP32 dims: 1 }
        output { name: "scores" data_type: TYPE_FP32 dims: 10 }
        ensemble_scheduling {
          step { model_name: "prepare" input_map { key: "raw" value: "raw" } output_map { key: "x" value: "x" } }
        }
    """)


# --- clean configs ----------------------------------------------------------------------------------------------------

CLEAN: dict[str, Callable[[], Any]] = {
    "as exported": clean,
    "without scores": lambda: changed(clean(), drop("output.2")),
    "batch 1 only": lambda: clean(max_batch_size=1),
    "variable shape": lambda: clean(shape=(-1, 4)),
    "TensorRT behind ONNX Runtime": accelerated,
    "TensorRT behind ONNX Runtime, variable shape": lambda: accelerated(
        with_shapes("image:1x1x4", "image:4x16x4", "image:8x64x4"), shape=(-1, 4)
    ),
    "two profiles side by side": lambda: accelerated(
        with_shapes(*(f"image:{a}x3x32x32,image:{b}x3x32x32" for a, b in ((1, 5), (2, 6), (4, 8))))
    ),
    "CUDA and TensorRT": lambda: merged(
        accelerated(),
        "optimization { execution_accelerators { gpu_execution_accelerator { name: 'cuda' "
        "parameters { key: 'use_tf32' value: '0' } } } }",
    ),
    "OpenVINO": lambda: merged(
        clean(), "optimization { execution_accelerators { cpu_execution_accelerator { name: 'openvino' } } }"
    ),
    "graph level and pinned memory": lambda: merged(
        clean(), "optimization { graph { level: 1 } input_pinned_memory { enable: true } }"
    ),
    "parallel operators": lambda: merged(
        clean(), parameter("execution_mode", "1") + parameter("inter_op_thread_count", "2")
    ),
    "arena": lambda: merged(
        clean(), parameter("memory.enable_memory_arena_shrinkage", "cpu:0;gpu:0") + parameter("enable_mem_arena", "ON")
    ),
    "on a CPU": lambda: with_instance_count(clean(), 3, kind="cpu"),
    "on a GPU": lambda: with_instance_count(clean(), 3, kind="gpu"),
    "threads do not matter on a GPU": lambda: changed(with_instance_count(clean(), 1, kind="gpu"), drop("parameters")),
    "metrics": lambda: merged(clean(), 'metric_tags { key: "team" value: "vision" }'),
    "one version": lambda: merged(clean(), "version_policy { latest { num_versions: 1 } }"),
    "versions by name": lambda: merged(clean(), "version_policy { specific { versions: [1, 3] } }"),
    "reshaped input": lambda: changed(clean(shape=(12,)), append("input.0.reshape.shape", 3, 4)),
    "tensorrt": lambda: merged(
        clean(backend="tensorrt"),
        "optimization { priority: PRIORITY_MAX cuda { graphs: true output_copy_stream: true } eager_batching: true "
        "gather_kernel_buffer_threshold: 4 }" + parameter("execution_context_allocation_strategy", "ON_PROFILE_CHANGE"),
    ),
    "tensorrt by platform": lambda: changed(
        merged(clean(backend="tensorrt"), 'platform: "tensorrt_plan"'), drop("backend")
    ),
    "python reads what it likes": lambda: merged(
        clean(backend="python"), parameter("anything", "at all") + "optimization { priority: PRIORITY_MAX }"
    ),
    "ensemble": ensemble,
}  # fmt: skip


@pytest.mark.parametrize("case", CLEAN)
def test_a_clean_config_has_no_findings(case: str) -> None:
    assert lint_config(CLEAN[case]()) == ()


def test_a_config_is_not_changed_by_the_check() -> None:
    config = accelerated({"trt_profile_min_shapes": None})
    before = format_config(config)
    lint_config(config, files={"1/model.onnx"})
    assert format_config(config) == before


def test_the_rules_stand_in_the_same_order_every_time() -> None:
    config = merged(clean(), "".join(parameter(key, "?") for key in ("z", "a", "m")) + "dynamic_batching {}")
    assert lint_config(config) == lint_config(parse_config(format_config(config)))


# --- one rule broken at a time ----------------------------------------------------------------------------------------

# config -> what changes -> severity, field, words of the problem
ONNXRUNTIME_RULES: dict[str, tuple[Change | str, str, str, str]] = {
    # backend
    "no backend": (drop("backend"), "error", "backend", 'say backend: "onnxruntime"'),
    "wrong platform": ('platform: "tensorrt_plan"', "error", "platform", 'beside backend "onnxruntime"; remove it'),
    "same platform": ('platform: "onnxruntime_onnx"', "warning", "platform", "remove it"),
    "runtime": ('runtime: "model.py"', "error", "runtime", "leave the field out"),
    # fields and parameters
    "unread field": ("optimization { cuda { graphs: true } }", "error", "optimization.cuda", "does not read"),
    "priority": ("optimization { priority: PRIORITY_MAX }", "error", "optimization.priority", "does not read"),
    "unknown parameter": (
        parameter("intra_op_threads_count", "1"),
        "error", 'parameters["intra_op_threads_count"]', "did you mean intra_op_thread_count?",
    ),
    "parameter of another backend": (
        parameter("execution_context_allocation_strategy", "STATIC"),
        "error", 'parameters["execution_context_allocation_strategy"]', "does not read this parameter",
    ),
    "not a number": (
        parameter("inter_op_thread_count", "two") + parameter("execution_mode", "1"),
        "error", 'parameters["inter_op_thread_count"]', 'whole number of 0 or more, such as "1", not "two"',
    ),
    "number and more": (
        parameter("intra_op_thread_count", "1 thread"),
        "error", 'parameters["intra_op_thread_count"]', 'not "1 thread"',
    ),
    "number too large for the server": (
        parameter("intra_op_thread_count", "99999999999"),
        "error", 'parameters["intra_op_thread_count"]', "whole number",
    ),
    "empty value": (parameter("enable_mem_pattern", ""), "error", 'parameters["enable_mem_pattern"]', '"1" or "0"'),
    "mode out of range": (parameter("execution_mode", "2"), "error", 'parameters["execution_mode"]', '"0" or "1"'),
    "flag": (parameter("enable_mem_arena", "yes"), "error", 'parameters["enable_mem_arena"]', 'not "yes"'),
    "device list": (
        parameter("memory.enable_memory_arena_shrinkage", "1"),
        "error", 'parameters["memory.enable_memory_arena_shrinkage"]', '"cpu:0;gpu:0"',
    ),
    "shrinks an arena that is off": (
        parameter("memory.enable_memory_arena_shrinkage", "cpu:0") + parameter("enable_mem_arena", "0"),
        "error", 'parameters["memory.enable_memory_arena_shrinkage"]', "enable_mem_arena turns off",
    ),
    "all cores": (
        drop("parameters"), "warning", 'parameters["intra_op_thread_count"]', "every instance takes all cores",
    ),
    "threads between operators unused": (
        parameter("inter_op_thread_count", "2"),
        "warning", 'parameters["inter_op_thread_count"]', 'set execution_mode to "1"',
    ),
    "CUDA parameter on a CPU": (
        both(parameter("gpu_mem_limit", "100"), put("instance_group.0.kind", "KIND_CPU")),
        "warning", 'parameters["gpu_mem_limit"]', "only for instances on a GPU",
    ),
    "graph level unknown": ("optimization { graph { level: 3 } }", "error", "optimization.graph.level", "not 3"),
    "graph level off": ("optimization { graph { level: 2 } }", "warning", "optimization.graph.level", "leave it out"),
    # instances
    "no group": (drop("instance_group"), "error", "instance_group", "add one group"),
    "count 0": (put("instance_group.0.count", 0), "error", "instance_group[0].count", "write 1 or more"),
    "negative count": (put("instance_group.0.count", -1), "error", "instance_group[0].count", "takes -1 for 1 or 2"),
    "two groups": ("instance_group { count: 1 }", "error", "instance_group", "keep one group"),
    "two kinds": (
        "instance_group { count: 1 kind: KIND_CPU }", "error", "instance_group", "here of KIND_AUTO and KIND_CPU,",
    ),
    "kind left to the model": (
        put("instance_group.0.kind", "KIND_MODEL"), "error", "instance_group[0].kind", "leaves the device open",
    ),
    "GPUs beside KIND_CPU": (
        both(append("instance_group.0.gpus", 0), put("instance_group.0.kind", "KIND_CPU")),
        "error", "instance_group[0].gpus", "say KIND_GPU",
    ),
    "GPUs beside KIND_AUTO": (
        append("instance_group.0.gpus", 0), "error", "instance_group[0].gpus", "KIND_AUTO can become it",
    ),
    "every GPU": (put("instance_group.0.kind", "KIND_GPU"), "warning", "instance_group[0].gpus", "write gpus: [0]"),
    "two GPUs": (
        both(append("instance_group.0.gpus", 0, 1), put("instance_group.0.kind", "KIND_GPU")),
        "error", "instance_group[0].gpus", "name one GPU",
    ),
    "another GPU": (
        both(append("instance_group.0.gpus", 2), put("instance_group.0.kind", "KIND_GPU")),
        "warning", "instance_group[0].gpus", "not 2; write 0",
    ),
    "rate limiter": (
        put("instance_group.0.rate_limiter.priority", 2), "error", "instance_group[0].rate_limiter", "remove it",
    ),
    "host policy": (
        put("instance_group.0.host_policy", "numa0"), "error", "instance_group[0].host_policy", "is not kept",
    ),
    "profile": (append("instance_group.0.profile", "0"), "error", "instance_group[0].profile", "is not kept"),
    # what the orchestrator does itself
    "dynamic batching": ("dynamic_batching {}", "error", "dynamic_batching", "remove the block"),
    "sequence batching": ("sequence_batching {}", "error", "sequence_batching", "remove the block"),
    "no batches": (both(put("max_batch_size", 0), drop("model_warmup.1")), "error", "max_batch_size", "1 or more"),
    "batch input": (
        "batch_input { kind: BATCH_ELEMENT_COUNT target_name: 'n' data_type: TYPE_FP32 source_input: 'image' }",
        "error", "batch_input", "batch mates",
    ),
    "batch output": (
        "batch_output { target_name: 'scores' source_input: 'image' }", "error", "batch_output", "batch mates",
    ),
    "ragged batch": (
        put("input.0.allow_ragged_batch", True), "error", "input[0].allow_ragged_batch", "batch mates",
    ),
    "cache": ("response_cache { enable: true }", "error", "response_cache", "remove it"),
    "decoupled": (
        "model_transaction_policy { decoupled: true }", "error", "model_transaction_policy", "remove decoupled",
    ),
    "all versions": ("version_policy { all {} }", "error", "version_policy", "name them with specific"),
    "two versions": ("version_policy { latest { num_versions: 2 } }", "error", "version_policy", "name them"),
    "no versions": ("version_policy { specific {} }", "error", "version_policy.specific", "names no version"),
    "agents": (
        "model_repository_agents { agents { name: 'checksum' } }", "warning", "model_repository_agents", "digest",
    ),
    # tensors
    "input without dims": (
        both(drop("input.0.dims"), drop("model_warmup.0.inputs.image.dims"), drop("model_warmup.1.inputs.image.dims")),
        "error", "input[0].dims", "Triton refuses empty dims",
    ),
    "output without dims": (drop("output.0.dims"), "error", "output[0].dims", "has dims [1]"),
    "size below 1": (put("output.2.dims.0", -2), "error", "output[2].dims", "Triton refuses [-2]"),
    "reshape of another size": (append("input.0.reshape.shape", 5), "error", "input[0].reshape", "make them agree"),
    "reshape to 0": (append("input.0.reshape.shape", 0), "error", "input[0].reshape", "refuses [0]"),
    "no type": (drop("output.0.data_type"), "error", "output[0].data_type", "say which"),
    "type that ONNX Runtime lacks": (
        both(
            put("input.0.data_type", "TYPE_BF16"),
            put("model_warmup.0.inputs.image.data_type", "TYPE_BF16"),
            put("model_warmup.1.inputs.image.data_type", "TYPE_BF16"),
        ),
        "error", "input[0].data_type", "has no TYPE_BF16 tensors",
    ),
    "tensor named twice": (
        "input { name: 'image' data_type: TYPE_FP32 dims: [3, 32, 32] }", "error", "input[1].name", "stands twice",
    ),
    "shape tensor": (
        put("input.0.is_shape_tensor", True), "error", "input[0].is_shape_tensor", "tensorrt backend only",
    ),
    "image format": (
        both(
            put("input.0.format", "FORMAT_NCHW"),
            append("input.0.dims", 1),
            append("model_warmup.0.inputs.image.dims", 1),
            append("model_warmup.1.inputs.image.dims", 1),
        ),
        "error", "input[0].format", "three dims",
    ),
    "optional input": (put("input.0.optional", True), "error", "input[0].optional", "remove it"),
    "no label": (drop("output.0"), "error", "output", '"label" of type TYPE_INT64'),
    "label of another type": (
        put("output.0.data_type", "TYPE_INT32"), "error", "output[0].data_type", "not TYPE_INT32; cast it",
    ),
    "certainty of another shape": (append("output.1.dims", 1), "error", "output[1].dims", "has dims [1], not [1, 1]"),
    "scores of no fixed number": (put("output.2.dims.0", -1), "error", "output[2].dims", "[classes]"),
    "one class": (put("output.2.dims.0", 1), "error", "output[2].dims", "2 or more"),
    "further output": (
        "output { name: 'features' data_type: TYPE_FP32 dims: 64 }", "warning", "output[3]", 'asks for "features"',
    ),
    "labels for classification": (
        put("output.2.label_filename", "labels.txt"),
        "warning", "output[2].label_filename", "classification requests only",
    ),
    # warm-up
    "no warm-up": (drop("model_warmup"), "warning", "model_warmup", "batch 1 and 8"),
    "largest batch cold": (drop("model_warmup.1"), "warning", "model_warmup", "batch 8"),
    "empty warm-up": (warmup(0), "error", "model_warmup[2].batch_size", "batch 0"),
    "warm-up too large": (warmup(9), "error", "model_warmup[2].batch_size", "more than max_batch_size 8"),
    "warm-up lacks an input": (
        "model_warmup { name: 'bare' batch_size: 2 }", "error", "model_warmup[2].inputs", 'lacks the input "image"',
    ),
    "warm-up of another input": (
        append("model_warmup.0.inputs.picture.dims", 1),
        "error", 'model_warmup[0].inputs["picture"]', "correct the name",
    ),
    "warm-up of another type": (
        put("model_warmup.0.inputs.image.data_type", "TYPE_FP16"),
        "error", 'model_warmup[0].inputs["image"].data_type', "the input is TYPE_FP32, not TYPE_FP16",
    ),
    "warm-up of another shape": (
        put("model_warmup.1.inputs.image.dims.0", 1),
        "error", 'model_warmup[1].inputs["image"].dims', "[1, 32, 32] is no shape of a row [3, 32, 32]",
    ),
    "warm-up with a batch axis": (
        append("model_warmup.1.inputs.image.dims", 8), "error", 'model_warmup[1].inputs["image"].dims', "no batch",
    ),
    "warm-up without data": (
        drop("model_warmup.0.inputs.image.zero_data"),
        "error", 'model_warmup[0].inputs["image"]', "set zero_data or random_data",
    ),
}  # fmt: skip


@pytest.mark.parametrize("rule", ONNXRUNTIME_RULES)
def test_a_config_that_breaks_one_rule_has_that_finding_alone(rule: str) -> None:
    change, severity, field, words = ONNXRUNTIME_RULES[rule]
    found = the_only(lint_config(changed(clean(), change)))
    assert (found.severity, found.field) == (severity, field)
    assert words in found.problem


ACCELERATOR_RULES: dict[str, tuple[dict[str, str | None], str, str, str]] = {
    "unknown key": ({"trt_fp16_enable": "1"}, "error", "trt_fp16_enable", "does not read this parameter; remove it"),
    "misspelt key": (
        {"trt_builder_optimisation_level": "3"},
        "error", "trt_builder_optimisation_level", "did you mean trt_builder_optimization_level?",
    ),
    "precision": ({"precision_mode": "fp16"}, "error", "precision_mode", '"FP16", "BF16" or "INT8", not "fp16"'),
    "size": ({"max_workspace_size_bytes": "1GB"}, "error", "max_workspace_size_bytes", "a number of bytes"),
    "flag that only the backend takes": (
        {"trt_cuda_graph_enable": "on"}, "error", "trt_cuda_graph_enable", '"1" or "0"',
    ),
    "level": ({"trt_builder_optimization_level": "9"}, "error", "trt_builder_optimization_level", 'from "0" to "5"'),
    "empty": ({"trt_engine_cache_prefix": ""}, "error", "trt_engine_cache_prefix", "not empty"),
    "no cache": (
        {"trt_engine_cache_enable": None, "trt_engine_cache_path": None},
        "warning", "trt_engine_cache_enable", 'set it to "1"',
    ),
    "cache in the working folder": ({"trt_engine_cache_path": None}, "warning", "trt_engine_cache_path", "give a path"),
    "timing cache unread": (
        {"trt_timing_cache_enable": "0"}, "warning", "trt_timing_cache_path", "trt_timing_cache_enable",
    ),
    "no profiles": (
        dict.fromkeys((f"trt_profile_{bound}_shapes" for bound in ("min", "opt", "max")), None),
        "warning", "trt_profile_min_shapes", "an engine is built whenever",
    ),
    "no opt": ({"trt_profile_opt_shapes": None}, "error", "trt_profile_opt_shapes", "add trt_profile_opt_shapes"),
    "malformed": (
        {"trt_profile_max_shapes": "image:8,3,32,32"},
        "error", "trt_profile_max_shapes", 'such as "image:1x3x32x32"',
    ),
    "variable axis": ({"trt_profile_min_shapes": "image:-1x3x32x32"}, "error", "trt_profile_min_shapes", "list shapes"),
    "other inputs in max": (
        {"trt_profile_max_shapes": "picture:8x3x32x32"}, "error", "trt_profile_min_shapes", "make them alike",
    ),
    "one profile more": (
        {"trt_profile_opt_shapes": "image:4x3x32x32,image:5x3x32x32"},
        "error", "trt_profile_min_shapes", "equally often",
    ),
    "no shape of an input": (
        with_shapes("image:1x3x32x32,inner:1", "image:4x3x32x32,inner:4", "image:8x3x32x32,inner:8"),
        "warning", "trt_profile_min_shapes", '"inner" is no input',
    ),
    "no batch axis": (
        with_shapes("image:3x32x32", "image:3x32x32", "image:3x32x32"),
        "error", "trt_profile_min_shapes", "write -1x3x32x32",
    ),
    "another image": (
        {"trt_profile_opt_shapes": "image:4x1x32x32"}, "error", "trt_profile_min_shapes", "the shape 4x1x32x32",
    ),
    "opt above max": ({"trt_profile_opt_shapes": "image:9x3x32x32"}, "error", "trt_profile_min_shapes", "must rise"),
    "largest batch left out": (
        {"trt_profile_max_shapes": "image:4x3x32x32"},
        "error", "trt_profile_min_shapes", "cover batches up to 4, but any from 1 to 8",
    ),
    "batch 1 left out": (
        {"trt_profile_min_shapes": "image:2x3x32x32"}, "error", "trt_profile_min_shapes", "cover batches up to 0",
    ),
    "gap between profiles": (
        with_shapes(*(f"image:{a}x3x32x32,image:{b}x3x32x32" for a, b in ((1, 6), (2, 7), (4, 8)))),
        "error", "trt_profile_min_shapes", "cover batches up to 4",
    ),
    "beyond the largest batch": (
        {"trt_profile_max_shapes": "image:64x3x32x32"}, "warning", "trt_profile_min_shapes", "lower max",
    ),
}  # fmt: skip


@pytest.mark.parametrize("rule", ACCELERATOR_RULES)
def test_tensorrt_parameters_are_held_to_what_the_backend_and_onnx_runtime_take(rule: str) -> None:
    changes, severity, key, words = ACCELERATOR_RULES[rule]
    found = the_only(lint_config(accelerated(changes)))
    assert (found.severity, found.field) == (severity, f'{GPU}[0].parameters["{key}"]')
    assert words in found.problem


def test_a_profile_that_names_no_input_of_the_config_lacks_the_input_too() -> None:
    shapes = with_shapes("picture:1x3x32x32", "picture:4x3x32x32", "picture:8x3x32x32")
    stray, lacking = lint_config(accelerated(shapes))
    assert (stray.severity, lacking.severity) == ("warning", "error")
    assert 'lacks the input "image"' in lacking.problem


def test_an_engine_that_requests_would_wait_for_is_an_error() -> None:
    config = accelerated()
    config.ClearField("model_warmup")
    found = the_only(lint_config(config))
    assert (found.severity, found.field) == ("error", "model_warmup")
    assert "TensorRT" in found.problem


def accelerator(name: str, kind: str = "gpu", parameters: str = "") -> str:
    block = f'{kind}_execution_accelerator {{ name: "{name}" {parameters} }}'
    return f"optimization {{ execution_accelerators {{ {block} }} }}"


def pair(key: str, value: str) -> str:
    return f'parameters {{ key: "{key}" value: "{value}" }}'


@pytest.mark.parametrize(
    ("text", "severity", "field", "words"),
    [
        (accelerator("tensorrtx"), "error", f"{GPU}[0].name", "did you mean tensorrt?"),
        (accelerator("openvino"), "error", f"{GPU}[0].name", 'refuses "openvino" on a GPU'),
        (accelerator("tensorrt", "cpu"), "error", f"{CPU}[0].name", 'say "openvino"'),
        (
            accelerator("openvino", "cpu", pair("num_of_threads", "1")),
            "error",
            f'{CPU}[0].parameters["num_of_threads"]',
            "no parameters",
        ),
        (
            accelerator("cuda", parameters='} gpu_execution_accelerator { name: "cuda"'),
            "error",
            f"{GPU}[1].name",
            "stands twice",
        ),
        (accelerator("cuda", parameters=pair("tf32", "1")), "error", f'{GPU}[0].parameters["tf32"]', "CUDA provider"),
        (accelerator("cuda", parameters=pair("use_tf32", "off")), "error", f'{GPU}[0].parameters["use_tf32"]', '"1"'),
        (
            accelerator("cuda", parameters=pair("device_id", "0")),
            "error",
            f'{GPU}[0].parameters["device_id"]',
            "set by",
        ),
        (
            accelerator("cuda", parameters=pair("gpu_mem_limit", "100")),
            "error",
            f'{GPU}[0].parameters["gpu_mem_limit"]',
            'set parameters["gpu_mem_limit"] instead',
        ),
    ],
)
def test_accelerators_are_held_to_those_the_backend_knows(text: str, severity: str, field: str, words: str) -> None:
    found = the_only(lint_config(merged(clean(), text)))
    assert (found.severity, found.field) == (severity, field)
    assert words in found.problem


def test_an_accelerator_of_gpus_is_not_read_on_a_cpu() -> None:
    found = the_only(lint_config(with_instance_count(accelerated(), 1, kind="cpu")))
    assert (found.severity, found.field) == ("warning", GPU)


TENSORRT_RULES: dict[str, tuple[Change | str, str, str]] = {
    "graph": ("optimization { graph { level: 1 } }", "optimization.graph", "does not read"),
    "accelerator": (accelerator("tensorrt"), "optimization.execution_accelerators", "does not read"),
    "threads": (parameter("intra_op_thread_count", "1"), 'parameters["intra_op_thread_count"]', "does not read"),
    "strategy": (
        parameter("execution_context_allocation_strategy", "static"),
        'parameters["execution_context_allocation_strategy"]', '"STATIC" or',
    ),
    "more devices": (parameter("enable_multi_device", "true"), 'parameters["enable_multi_device"]', "remove it"),
    "custom operators": ("model_operations { op_library_filename: 'ops.so' }", "model_operations", "does not read"),
    "on a CPU": (put("instance_group.0.kind", "KIND_CPU"), "instance_group[0].kind", "GPUs only"),
    "profile": (append("instance_group.0.profile", "1"), "instance_group[0].profile", "is not kept"),
    "doubles": (put("output.2.data_type", "TYPE_FP64"), "output[2].data_type", "has no TYPE_FP64 tensors"),
}  # fmt: skip


@pytest.mark.parametrize("rule", TENSORRT_RULES)
def test_a_tensorrt_config_is_held_to_what_that_backend_reads(rule: str) -> None:
    change, field, words = TENSORRT_RULES[rule]
    # as a composing model, of which no outputs are asked
    found = the_only(lint_config(changed(clean(backend="tensorrt"), change), is_stage=False))
    assert (found.severity, found.field) == ("error", field)
    assert words in found.problem


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ("instance_group { count: 1 }", "instance_group"),
        ("optimization { graph { level: 1 } }", "optimization"),
        ("model_warmup { name: 'one' batch_size: 1 }", "model_warmup"),
        ("response_cache { enable: true }", "response_cache"),
        ('backend: "onnxruntime"', "backend"),
        (drop("ensemble_scheduling"), "ensemble_scheduling"),
        (drop("platform"), "platform"),
        (drop("output.1"), "output"),
    ],
)
def test_an_ensemble_is_held_to_the_general_rules(change: Change | str, field: str) -> None:
    found = the_only(lint_config(changed(ensemble(), change)))
    assert (found.severity, found.field) == ("error", field)


def test_a_composing_model_is_no_stage() -> None:
    config = merged(clean(), "dynamic_batching { preferred_batch_size: 4 }")
    config.output[0].name = "features"
    config.ClearField("model_warmup")
    assert lint_config(config, is_stage=False) == ()
    assert {found.field for found in lint_config(config)} == {"dynamic_batching", "output", "output[0]", "model_warmup"}


@pytest.mark.parametrize(
    ("batching", "severity", "field"),
    [
        ("preferred_batch_size: 16", "error", "dynamic_batching.preferred_batch_size"),
        ("preferred_batch_size: 0", "error", "dynamic_batching.preferred_batch_size"),
        ("default_queue_policy { max_queue_size: 9 }", "warning", "dynamic_batching.default_queue_policy"),
        ("priority_levels: 2", "warning", "dynamic_batching.priority_levels"),
    ],
)
def test_dynamic_batching_that_may_stand_is_held_to_what_works(batching: str, severity: str, field: str) -> None:
    config = merged(clean(), f"dynamic_batching {{ {batching} }}")
    found = the_only(lint_config(config, is_stage=False))
    assert (found.severity, found.field) == (severity, field)


def test_a_tensor_without_a_name_is_refused() -> None:
    config = clean()
    config.output.add(data_type="TYPE_FP32", dims=[1])
    refused, unasked = lint_config(config)
    assert (refused.severity, refused.field) == ("error", "output[3].name")
    assert (unasked.severity, unasked.field) == ("warning", "output[3]")


def test_without_input_and_output_each_is_asked_for_once() -> None:
    config = clean()
    config.ClearField("input")
    config.ClearField("output")
    config.ClearField("model_warmup")
    assert [found.field for found in lint_config(config, is_stage=False)] == ["input", "output"]


# --- files ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "change", "field"),
    [
        ({"1/model.onnx"}, "", None),
        ({"1/model.onnx/model.onnx", "1/model.onnx/weights"}, "", None),
        ({"1/model.onnx"}, drop("default_model_filename"), None),
        ({"1/model.plan"}, "", "default_model_filename"),
        ({"1/net.onnx"}, drop("default_model_filename"), "default_model_filename"),
        ({"1/model.onnx", "2/labels.txt"}, "", "default_model_filename"),
        ({"model.onnx", "01/model.onnx"}, "", ""),
        (VERSIONS, "version_policy { specific { versions: [2, 10] } }", None),
        (VERSIONS, "version_policy { specific { versions: 10 } }", "version_policy.specific"),
        (VERSIONS, "version_policy { specific { versions: [2, 3, 10] } }", "version_policy.specific"),
        ({"1/model.onnx"}, "cc_model_filenames { key: '9.0' value: 'h.onnx' }", 'cc_model_filenames["9.0"]'),
        (
            {"1/model.onnx"},
            put("model_warmup.0.inputs.image.input_data_file", "rows"),
            'model_warmup[0].inputs["image"].input_data_file',
        ),
        (
            {"1/model.onnx", "warmup/rows"},
            put("model_warmup.0.inputs.image.input_data_file", "rows"),
            None,
        ),
    ],
)
def test_files_that_a_config_names_must_be_there(files: set[str], change: Change | str, field: str | None) -> None:
    config = changed(clean(), change)
    assert lint_config(config) == (), "files are not looked at unless they are given"
    findings = lint_config(config, files=files)
    assert [(found.severity, found.field) for found in findings] == ([] if field is None else [("error", field)])


# --- repositories -----------------------------------------------------------------------------------------------------


def write_model(repository: Path, name: str, config: Any, file: str = "model.onnx") -> Path:
    config.name = name
    (repository / name / "1").mkdir(parents=True)
    (repository / name / "1" / file).write_bytes(b"")
    (repository / name / "config.pbtxt").write_text(format_config(config))
    return repository / name


def write_variant(folder: Path, config: Any, name: str = "cpu0") -> None:
    (folder / "configs").mkdir(exist_ok=True)
    (folder / "configs" / f"{name}.pbtxt").write_text(format_config(config))


def test_the_repository_of_the_example_family_is_clean() -> None:
    results = lint_repository(MODELS)
    assert list(results) == sorted(path.relative_to(MODELS).as_posix() for path in MODELS.rglob("*.pbtxt"))
    found = {key: findings for key, findings in results.items() if findings}
    assert list(found) == ["digits_resnet/configs/baseline.pbtxt"]
    only = the_only(found["digits_resnet/configs/baseline.pbtxt"])
    assert (only.severity, only.field) == ("warning", "dynamic_batching")


def test_the_example_family_stays_clean_on_gpus(tmp_path: Path) -> None:
    folder = tmp_path / "digits_cnn"
    shutil.copytree(MODELS / "digits_cnn", folder)
    config = parse_config((folder / "config.pbtxt").read_text())
    write_variant(folder, with_instance_count(config, 4, kind="gpu"), "gpu0")
    write_variant(folder, with_instance_count(config, 2, kind="cpu"))
    assert list(lint_repository(tmp_path).items()) == [
        ("digits_cnn/config.pbtxt", ()),
        ("digits_cnn/configs/cpu0.pbtxt", ()),
        ("digits_cnn/configs/gpu0.pbtxt", ()),
    ]


def test_an_accelerator_of_gpus_may_stand_in_the_config_of_a_cpu_endpoint(tmp_path: Path) -> None:
    # only the instances may differ between endpoints, so it has to
    folder = write_model(tmp_path, "small", accelerated())
    write_variant(folder, with_instance_count(accelerated(), 2, kind="cpu"))
    assert set(lint_repository(tmp_path).values()) == {()}


def test_bad_instances_of_an_endpoint_are_found(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "small", clean())
    write_variant(folder, merged(clean(), "instance_group { count: 2 }"))
    results = lint_repository(tmp_path)
    assert results["small/config.pbtxt"] == ()
    assert the_only(results["small/configs/cpu0.pbtxt"]).field == "instance_group"


def test_a_config_by_name_that_is_another_model_is_an_error(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "small", merged(clean(), parameter("typo", "1")))
    other = merged(clean(max_batch_size=8), parameter("typo", "1") + "dynamic_batching {}")
    other.max_batch_size = 16
    write_variant(folder, other)
    results = lint_repository(tmp_path)
    assert [found.field for found in results["small/config.pbtxt"]] == ['parameters["typo"]']
    fields = [(found.severity, found.field) for found in results["small/configs/cpu0.pbtxt"]]
    assert fields[:2] == [("error", "dynamic_batching"), ("error", "max_batch_size")]
    assert ("warning", "model_warmup") in fields, "and what is wrong with it is said"
    assert ("error", 'parameters["typo"]') not in fields, "but not what was said of config.pbtxt"


def test_dynamic_batching_of_a_baseline_is_checked_beyond_the_warning(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "small", clean())
    write_variant(folder, merged(clean(), "dynamic_batching { preferred_batch_size: 99 }"), "baseline")
    findings = lint_repository(tmp_path)["small/configs/baseline.pbtxt"]
    assert [(found.severity, found.field) for found in findings] == [
        ("warning", "dynamic_batching"),
        ("error", "dynamic_batching.preferred_batch_size"),
    ]


def test_a_model_is_named_as_its_folder(tmp_path: Path) -> None:
    write_model(tmp_path, "small", clean()).rename(tmp_path / "large")
    found = the_only(lint_repository(tmp_path)["large/config.pbtxt"])
    assert (found.severity, found.field) == ("error", "name")
    assert '"large", not "small"' in found.problem


def test_models_of_an_ensemble_are_no_stages_and_the_ensemble_is(tmp_path: Path) -> None:
    joined = ensemble()
    joined.output[0].ClearField("dims")
    write_model(tmp_path, "joined", joined)
    prepare = clean()
    prepare.output[0].name = "x"
    write_model(tmp_path, "prepare", prepare)
    results = lint_repository(tmp_path)
    assert results["prepare/config.pbtxt"] == ()
    assert the_only(results["joined/config.pbtxt"]).field == "output[0].dims"


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "is missing"), (b"max_batch_sice: 8\n", "1:1"), (b"\xff\xfe", "cannot be read")],
)
def test_a_broken_config_is_a_finding_and_hides_no_other(tmp_path: Path, content: bytes | None, words: str) -> None:
    path = write_model(tmp_path, "broken", clean()) / "config.pbtxt"
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    write_variant(path.parent, with_instance_count(clean(), 2, kind="cpu"))
    write_model(tmp_path, "small", merged(clean(), "dynamic_batching {}"))
    results = lint_repository(tmp_path)
    found = the_only(results["broken/config.pbtxt"])
    assert (found.severity, found.field) == ("error", "")
    assert words in found.problem
    assert results["broken/configs/cpu0.pbtxt"] == ()
    assert the_only(results["small/config.pbtxt"]).field == "dynamic_batching"


def test_a_broken_config_by_name_is_a_finding(tmp_path: Path) -> None:
    folder = write_model(tmp_path, "small", clean())
    (folder / "configs").mkdir()
    (folder / "configs" / "cpu0.pbtxt").write_text("name: 1")
    found = the_only(lint_repository(tmp_path)["small/configs/cpu0.pbtxt"])
    assert "cpu0.pbtxt: is no Triton model config" in found.problem


def test_hidden_folders_and_loose_files_are_no_models(tmp_path: Path) -> None:
    (tmp_path / ".export-x1").mkdir()
    (tmp_path / "README").write_text("")
    assert lint_repository(tmp_path) == {}


# --- texts ------------------------------------------------------------------------------------------------------------


def test_a_finding_reads_as_one_line() -> None:
    assert (
        str(Finding("input[0].dims", "are empty; fill them", "error")) == "error: input[0].dims: are empty; fill them"
    )
    assert str(Finding("", "is missing; write it", "warning")) == "warning: is missing; write it"


def test_every_form_holds_for_its_own_example() -> None:
    examples = {
        form: example
        for table in (TENSORRT_ACCELERATOR, CUDA_ACCELERATOR, *(backend.parameters for backend in NATIVE.values()))
        for form in table.values()
        for example in form.wanted.split('"')[1::2]
    }
    assert len(examples) > 8
    assert [(form.wanted, example) for form, example in examples.items() if not form.holds(example)] == []
