"""What a server tells of its models, as JSON with the fields that Triton's has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from orchestrator.wire.descriptions import Duration

if TYPE_CHECKING:
    from collections.abc import Sequence

    from orchestrator.wire.descriptions import IndexEntry, ModelConfig, ModelStatistics
    from orchestrator.wire.tensors import TensorMetadata

# what the steps of Triton's that this server has not took: they were never done, or are part of another one
_NEVER = Duration()


def config_json(config: ModelConfig) -> bytes:
    """Render `GET v2/models/{name}/config`."""
    return msgspec.json.encode(
        {
            "name": config.name,
            "platform": config.platform,
            "backend": "",
            "version_policy": {"latest": {"num_versions": 1}},
            "max_batch_size": config.max_batch_size,
            "input": [_tensor(spec) | {"format": "FORMAT_NONE", "optional": False} for spec in config.inputs],
            "output": [_tensor(spec) | {"label_filename": ""} for spec in config.outputs],
            "instance_group": [],
            "default_model_filename": "",
            "parameters": {},
            "model_warmup": [],
            # rows of several requests leave in one batch
            "dynamic_batching": {},
        }
    )


def data_type(datatype: str) -> str:
    """Name a datatype of the protocol as a model configuration does."""
    return "TYPE_STRING" if datatype == "BYTES" else f"TYPE_{datatype}"


def dims(spec: TensorMetadata) -> tuple[int, ...]:
    """Shape of a tensor without the batch axis, as a model configuration states it."""
    return spec.shape[1:]


def index_json(entries: Sequence[IndexEntry]) -> bytes:
    """Render `POST v2/repository/index`."""
    return msgspec.json.encode(
        [
            {"name": entry.name, "version": entry.version, "state": "READY" if entry.ready else "UNAVAILABLE"}
            for entry in entries
        ]
    )


def statistics_json(statistics: Sequence[ModelStatistics]) -> bytes:
    """Render `GET v2/models/{name}/stats`."""
    return msgspec.json.encode({"model_stats": [_statistics(each) for each in statistics]})


def unmeasured(count: int) -> Duration:
    """Triton counts every step of an answer; those that are part of another one here take no time."""
    return Duration(count)


def _statistics(each: ModelStatistics) -> dict[str, Any]:
    done = unmeasured(each.success.count)
    return {
        "name": each.name,
        "version": each.version,
        "last_inference": each.last_inference_ms,
        "inference_count": each.inference_count,
        "execution_count": each.execution_count,
        "inference_stats": {
            "success": each.success,
            "fail": each.fail,
            "queue": each.queue,
            "compute_input": done,
            "compute_infer": each.compute,
            "compute_output": done,
            "cache_hit": _NEVER,
            "cache_miss": _NEVER,
        },
        "response_stats": {},
        "batch_stats": [
            {
                "batch_size": size,
                "compute_input": unmeasured(duration.count),
                "compute_infer": duration,
                "compute_output": unmeasured(duration.count),
            }
            for size, duration in sorted(each.batches.items())
        ],
        "memory_usage": [],
    }


def _tensor(spec: TensorMetadata) -> dict[str, Any]:
    return {
        "name": spec.name,
        "data_type": data_type(spec.datatype),
        "dims": dims(spec),
        "is_shape_tensor": False,
        "allow_ragged_batch": False,
        "is_non_linear_format_io": False,
    }
