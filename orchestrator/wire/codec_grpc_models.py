"""What a server tells of its models, as gRPC messages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from tritonclient.grpc import model_config_pb2, service_pb2

from orchestrator.wire.model_json import data_type, dims, unmeasured

if TYPE_CHECKING:
    from collections.abc import Sequence

    from orchestrator.wire.descriptions import Duration, IndexEntry, ModelConfig, ModelStatistics
    from orchestrator.wire.tensors import ModelMetadata, TensorMetadata


def encode_model_metadata(metadata: ModelMetadata) -> Any:  # noqa: ANN401 - untyped protobuf
    """Make a ModelMetadataResponse."""
    return service_pb2.ModelMetadataResponse(
        name=metadata.name,
        versions=metadata.versions,
        platform=metadata.platform,
        inputs=[_encode_tensor_metadata(tensor) for tensor in metadata.inputs],
        outputs=[_encode_tensor_metadata(tensor) for tensor in metadata.outputs],
    )


def encode_model_config(config: ModelConfig) -> Any:  # noqa: ANN401
    """Make a ModelConfigResponse."""
    message = model_config_pb2.ModelConfig(
        name=config.name,
        platform=config.platform,
        max_batch_size=config.max_batch_size,
        input=[
            {"name": spec.name, "data_type": data_type(spec.datatype), "dims": dims(spec)} for spec in config.inputs
        ],
        output=[
            {"name": spec.name, "data_type": data_type(spec.datatype), "dims": dims(spec)} for spec in config.outputs
        ],
        # rows of several requests leave in one batch
        dynamic_batching={},
    )
    message.version_policy.latest.num_versions = 1
    return service_pb2.ModelConfigResponse(config=message)


def encode_repository_index(entries: Sequence[IndexEntry]) -> Any:  # noqa: ANN401
    """Make a RepositoryIndexResponse."""
    return service_pb2.RepositoryIndexResponse(
        models=[
            {"name": entry.name, "version": entry.version, "state": "READY" if entry.ready else "UNAVAILABLE"}
            for entry in entries
        ]
    )


def encode_statistics(statistics: Sequence[ModelStatistics]) -> Any:  # noqa: ANN401
    """Make a ModelStatisticsResponse."""
    return service_pb2.ModelStatisticsResponse(model_stats=[_encode_model_statistics(each) for each in statistics])


def _encode_model_statistics(each: ModelStatistics) -> Any:  # noqa: ANN401
    done = unmeasured(each.success.count)
    return service_pb2.ModelStatistics(
        name=each.name,
        version=each.version,
        last_inference=each.last_inference_ms,
        inference_count=each.inference_count,
        execution_count=each.execution_count,
        inference_stats={
            "success": _duration(each.success),
            "fail": _duration(each.fail),
            "queue": _duration(each.queue),
            "compute_input": _duration(done),
            "compute_infer": _duration(each.compute),
            "compute_output": _duration(done),
            "cache_hit": {},
            "cache_miss": {},
        },
        batch_stats=[
            {
                "batch_size": size,
                "compute_input": _duration(unmeasured(duration.count)),
                "compute_infer": _duration(duration),
                "compute_output": _duration(unmeasured(duration.count)),
            }
            for size, duration in sorted(each.batches.items())
        ],
    )


def _duration(duration: Duration) -> dict[str, int]:
    return {"count": duration.count, "ns": duration.ns}


def _encode_tensor_metadata(tensor: TensorMetadata) -> Any:  # noqa: ANN401
    return service_pb2.ModelMetadataResponse.TensorMetadata(
        name=tensor.name, datatype=tensor.datatype, shape=tensor.shape
    )
