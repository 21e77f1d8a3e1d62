"""How a model is served: backend and file, instances, batching, and blocks that work against the orchestrator."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from export.lint.backends import NATIVE
from export.lint.finding import Finding, enum_name, error, set_fields, warning

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from cascadeserve.triton_config import ModelConfig

_PLATFORMS = {backend.platform: backend.name for backend in NATIVE.values()}
_DEFAULT_FILES = {backend.name: backend.model_file for backend in NATIVE.values()} | {"python": "model.py"}
# What an endpoint's config keeps of a group (cascadeserve.triton_config.with_instance_count); a name is Triton's own
_KEPT = frozenset({"name", "count", "kind", "gpus"})
_QUEUE_POLICIES = ("default_queue_policy", "priority_levels", "default_priority_level", "priority_queue_policy")


def backend_name(config: ModelConfig) -> str:
    """Backend that Triton takes for a config, "ensemble" for one; as core fills it in before anything else."""
    if config.platform == "ensemble" or config.HasField("ensemble_scheduling"):
        return "ensemble"
    return str(config.backend or _PLATFORMS.get(config.platform, ""))


def backend_findings(config: ModelConfig) -> Iterator[Finding]:
    """Platform and backend that Triton refuses together, or takes for nothing."""
    if backend_name(config) == "ensemble":
        if config.platform != "ensemble":
            yield error("platform", 'Triton takes an ensemble with platform: "ensemble" only; say so')
        if config.backend:
            yield error("backend", "Triton refuses a backend beside an ensemble; remove it")
        if not config.HasField("ensemble_scheduling"):
            yield error("ensemble_scheduling", "an ensemble has steps; add them or name a backend instead")
    elif not backend_name(config):
        yield error("backend", 'no backend is named, and nothing is auto-completed; say backend: "onnxruntime"')
    elif config.backend and config.platform:
        native = NATIVE.get(config.backend)
        if native is not None and config.platform != native.platform:
            yield error("platform", f'Triton refuses "{config.platform}" beside backend "{config.backend}"; remove it')
        else:
            yield warning("platform", "says again, or nothing, beside the backend; remove it")


def file_findings(config: ModelConfig, files: Collection[str]) -> Iterator[Finding]:
    """Model files that the folder does not hold. `files` are relative to it, such as `1/model.onnx`."""
    if backend_name(config) == "ensemble":
        return
    folders = _version_folders(files)
    if not folders:
        yield error("", "the model folder holds no version; put the model file into 1/")
    default = config.default_model_filename or _DEFAULT_FILES.get(backend_name(config))
    wanted = [("default_model_filename", default)] if default else []
    wanted += [(f'cc_model_filenames["{key}"]', name) for key, name in sorted(config.cc_model_filenames.items())]
    for field, name in wanted:
        for folder in folders:
            # a folder of that name holds a model whose weights lie beside it
            if not any(file == f"{folder}/{name}" or file.startswith(f"{folder}/{name}/") for file in files):
                yield error(field, f"the model folder holds no {folder}/{name}; add the file or correct the name")


def _version_folders(files: Collection[str]) -> list[str]:
    # Triton takes a folder named by a number without leading zeros for a version
    return sorted({found[1] for file in files if (found := re.match(r"([1-9][0-9]*)/", file))}, key=int)


def instance_group_findings(config: ModelConfig) -> Iterator[Finding]:
    """Groups that Triton refuses or changes without a word, or that an endpoint's config cannot keep."""
    if backend_name(config) == "ensemble":
        if config.instance_group:
            yield error("instance_group", "Triton refuses one in an ensemble; give it to the composing models")
        return
    if not config.instance_group:
        yield error("instance_group", "Triton would choose kind and count by itself; add one group with a count")
        return
    if len(config.instance_group) > 1:
        kinds = sorted({enum_name(group, "kind") for group in config.instance_group})
        mixed = f", here of {' and '.join(kinds)}," if len(kinds) > 1 else ""
        yield error(
            "instance_group",
            f"more than one group{mixed} cannot be planned, for an endpoint owns one device; keep one group",
        )
    for index, group in enumerate(config.instance_group):
        field = f"instance_group[{index}]"
        if group.count < 1:
            yield error(f"{field}.count", f"Triton takes {group.count} for 1 or 2 without a word; write 1 or more")
        yield from _device_findings(config, group, field)
        for name in set_fields(group):
            if name not in _KEPT:
                yield error(
                    f"{field}.{name}",
                    "is not kept when the config of an endpoint is written, and adding it later would recreate all "
                    "instances; remove it",
                )


def _device_findings(config: ModelConfig, group: ModelConfig, field: str) -> Iterator[Finding]:
    kind = enum_name(group, "kind")
    if kind not in {"KIND_AUTO", "KIND_GPU", "KIND_CPU"}:
        yield error(f"{field}.kind", f"{kind} leaves the device open; say KIND_GPU, KIND_CPU or KIND_AUTO")
    elif kind == "KIND_CPU" and backend_name(config) == "tensorrt":
        yield error(f"{field}.kind", "the tensorrt backend runs on GPUs only; say KIND_GPU")
    if kind != "KIND_GPU" and group.gpus:
        yield error(f"{field}.gpus", f"Triton refuses GPUs beside KIND_CPU, and {kind} can become it; say KIND_GPU")
    elif kind == "KIND_GPU" and not group.gpus:
        yield warning(f"{field}.gpus", "the count is per GPU, and every GPU is taken; write gpus: [0]")
    elif len(group.gpus) > 1:
        yield error(f"{field}.gpus", "the count is per GPU, and an endpoint owns one; name one GPU")
    elif group.gpus and group.gpus[0] != 0:
        yield warning(
            f"{field}.gpus", f"a server that sees only its own GPU knows it as 0, not {group.gpus[0]}; write 0"
        )


def dynamic_batching_findings(config: ModelConfig) -> Iterator[Finding]:
    """Dynamic batching where it may stand: sizes that Triton refuses, policies that stall."""
    batching = config.dynamic_batching
    if any(not 1 <= size <= config.max_batch_size for size in batching.preferred_batch_size):
        yield error(
            "dynamic_batching.preferred_batch_size",
            f"Triton takes sizes from 1 to max_batch_size {config.max_batch_size} only; correct them",
        )
    for name in set_fields(batching):
        if name in _QUEUE_POLICIES:
            yield warning(
                f"dynamic_batching.{name}",
                "with a queue policy Triton's batcher sleeps up to 0.5 s with work queued; remove it",
            )


def stage_findings(config: ModelConfig) -> Iterator[Finding]:
    """What the orchestrator does itself, or cannot do with a stage."""
    if config.max_batch_size < 1:
        yield error("max_batch_size", "a stage takes batches, the batch axis first; write the largest, 1 or more")
    for name in ("dynamic_batching", "sequence_batching"):
        if config.HasField(name):
            yield error(
                name, "the orchestrator batches, and Triton's own queue stalls or reorders it; remove the block"
            )
    for name in ("batch_input", "batch_output"):
        if getattr(config, name):
            yield error(name, "an answer that depends on its batch mates cannot be certified; remove it")
    for index, entry in enumerate(config.input):
        if entry.allow_ragged_batch:
            yield error(
                f"input[{index}].allow_ragged_batch",
                "an answer that depends on its batch mates cannot be certified; remove it",
            )
    if config.response_cache.enable:
        yield error("response_cache", "cached answers void the measured profile, and batches rarely repeat; remove it")
    if config.model_transaction_policy.decoupled:
        yield error("model_transaction_policy", "a stage answers each request once, by a unary call; remove decoupled")


def policy_findings(config: ModelConfig, files: Collection[str] | None) -> Iterator[Finding]:
    """Blocks that change which model answers, unseen by the digest."""
    policy = config.version_policy
    if policy.HasField("specific"):
        yield from _named_versions(set(map(str, policy.specific.versions)), files)
    elif config.HasField("version_policy") and not (policy.HasField("latest") and policy.latest.num_versions <= 1):
        yield error(
            "version_policy",
            "which versions answer depends on what else is put into the folder; name them with specific, or remove it",
        )
    if config.model_repository_agents.agents:
        yield warning("model_repository_agents", "an agent may change the model after its digest was taken; remove it")


def _named_versions(named: set[str], files: Collection[str] | None) -> Iterator[Finding]:
    """Hold the versions that a policy names against those in the folder."""
    if not named:
        yield error("version_policy.specific", "names no version, so none is served; name one or remove the policy")
        return
    present = named if files is None else set(_version_folders(files))
    if absent := named - present:
        yield error(
            "version_policy.specific",
            f"names version {min(absent, key=int)}, which the folder does not hold; remove it",
        )
    if left_out := present - named:
        yield error(
            "version_policy.specific",
            f"leaves out version {min(left_out, key=int)}, which counts in the digest of the model though it never "
            "answers; name it or remove its folder",
        )


def ensemble_findings(config: ModelConfig) -> Iterator[Finding]:
    """What Triton refuses beside ensemble steps (core: src/model_config_utils.cc)."""
    if config.HasField("optimization"):
        yield error("optimization", "Triton refuses it in an ensemble; give it to the composing models")
    if config.model_warmup:
        yield error("model_warmup", "Triton refuses it in an ensemble; warm the composing models")
