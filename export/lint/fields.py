"""Fields and parameters that nobody reads, and values that the backend does not take."""

from __future__ import annotations

from typing import TYPE_CHECKING

from export.lint.backends import CORE_FIELDS, ONNXRUNTIME
from export.lint.finding import Finding, enum_name, error, meant, set_fields, warning

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from cascadeserve.triton_config import ModelConfig
    from export.lint.backends import Backend, Form

_GRAPH_LEVELS = (-1, 0, 1, 2)
_ALL_OFF = 2
_OF_THE_CUDA_PROVIDER = (
    "cudnn_conv_algo_search",
    "gpu_mem_limit",
    "arena_extend_strategy",
    "do_copy_in_default_stream",
)


def unread_fields(config: ModelConfig, backend: Backend) -> Iterator[Finding]:
    """Fields that neither the server nor the backend looks at."""
    for field in set_fields(config):
        if field in CORE_FIELDS or field in backend.fields:
            continue
        if field == "optimization":
            paths = [f"optimization.{name}" for name in set_fields(config.optimization)]
        else:
            paths = [field]
        for path in paths:
            if path == "runtime":
                # With it the server looks for that file in the backend's folder, which only a stand-in has.
                yield error(path, f"the native {backend.name} backend has one runtime; leave the field out")
            elif path not in backend.fields:
                yield error(path, f"the native {backend.name} backend does not read this field; remove it")


def parameter_findings(config: ModelConfig, backend: Backend) -> Iterator[Finding]:
    """Parameters that the backend does not read, or not with this value, or not in this company."""
    values = {key: value.string_value for key, value in sorted(config.parameters.items())}
    yield from value_findings(values, backend.parameters, "parameters", f"the native {backend.name} backend")
    if backend is ONNXRUNTIME:
        yield from _onnxruntime_company(config, values)
        yield from _graph_level(config)


def value_findings(values: Mapping[str, str], known: Mapping[str, Form], field: str, reader: str) -> Iterator[Finding]:
    """Keys that `reader` does not know, and values that it does not take."""
    for key, value in values.items():
        path = f'{field}["{key}"]'
        form = known.get(key)
        if form is None:
            yield error(path, f"{reader} does not read this parameter; remove it{meant(key, known)}")
        elif not form.holds(value):
            yield error(path, f'must be {form.wanted}, not "{value}"')


def _onnxruntime_company(config: ModelConfig, values: Mapping[str, str]) -> Iterator[Finding]:
    kinds = {enum_name(group, "kind") for group in config.instance_group}
    if kinds != {"KIND_GPU"} and values.get("intra_op_thread_count", "0") == "0":
        yield warning(
            'parameters["intra_op_thread_count"]',
            'every instance takes all cores, though a plan counts instances, not threads; set it to "1"',
        )
    if "inter_op_thread_count" in values and values.get("execution_mode", "0") == "0":
        yield warning(
            'parameters["inter_op_thread_count"]',
            'is read only when operators run in parallel; set execution_mode to "1" or remove it',
        )
    shrinks = values.get("memory.enable_memory_arena_shrinkage", "")
    if "cpu" in shrinks and values.get("enable_mem_arena", "1").lower() in {"0", "false", "off"}:
        yield error(
            'parameters["memory.enable_memory_arena_shrinkage"]',
            "cannot shrink the CPU arena that enable_mem_arena turns off; remove one of the two",
        )
    if kinds == {"KIND_CPU"}:
        for key in _OF_THE_CUDA_PROVIDER:
            if key in values:
                yield warning(f'parameters["{key}"]', "is read only for instances on a GPU; remove it")


def _graph_level(config: ModelConfig) -> Iterator[Finding]:
    level = config.optimization.graph.level
    if level not in _GRAPH_LEVELS:
        yield error(
            "optimization.graph.level",
            f"is taken for 0 (all optimisations); say -1 (basic), 0, 1 (extended) or 2 (none), not {level}",
        )
    elif level == _ALL_OFF:
        yield warning(
            "optimization.graph.level",
            "turns all optimisations of the graph off, it is not the highest level; leave it out for all of them",
        )
