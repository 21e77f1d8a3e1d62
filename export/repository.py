"""Writes models into a Triton model repository: whole or not at all, and only what changed."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from tritonclient.grpc import model_config_pb2

from cascadeserve.errors import ExportRefused
from cascadeserve.triton_config import format_config

if TYPE_CHECKING:
    from export.family import Family, FamilyModel

_VERSION = "1"
_DATATYPES = {"BYTES": "TYPE_STRING"}


def model_config(family: Family, model: FamilyModel) -> str:
    """Complete `config.pbtxt` of a model: nothing is left to Triton's auto-completion.

    No `dynamic_batching`: the orchestrator batches, and Triton's queue policies stall.
    """
    config = model_config_pb2.ModelConfig(
        name=model.name, backend="onnxruntime", max_batch_size=model.max_batch_size, default_model_filename="model.onnx"
    )
    for spec in family.inputs:
        config.input.add(name=spec.name, data_type=_data_type(spec.datatype), dims=spec.shape)
    for name, datatype, dims in (("label", "INT64", 1), ("certainty", "FP32", 1), ("scores", "FP32", family.classes)):
        config.output.add(name=name, data_type=_data_type(datatype), dims=[dims])
    config.instance_group.add(count=1, kind=model_config_pb2.ModelInstanceGroup.KIND_AUTO)
    # One thread per instance: instances, not threads, are what a plan counts.
    config.parameters["intra_op_thread_count"].string_value = "1"
    for rows in sorted({1, model.max_batch_size}):
        warmup = config.model_warmup.add(name=f"batch-{rows}", batch_size=rows)
        for spec in family.inputs:
            tensor = warmup.inputs[spec.name]
            tensor.data_type = _data_type(spec.datatype)
            tensor.dims.extend(max(size, 1) for size in spec.shape)
            tensor.zero_data = True
    return format_config(config)


def write_model(repository: Path, family: Family, model: FamilyModel, onnx_model: bytes) -> bool:
    """Bring `<repository>/<model>` up to date; returns whether anything changed.

    The folder is made beside the repository's models and renamed into place. A folder of that name that holds anything
    not written here is left alone.

    Raises:
        ExportRefused: the folder holds other files.

    """
    target = repository / model.name
    wanted = {
        Path("config.pbtxt"): model_config(family, model).encode(),
        Path(_VERSION, "model.onnx"): onnx_model,
    }
    if target.exists():
        present = {path.relative_to(target) for path in target.rglob("*") if path.is_file()}
        if foreign := sorted(map(str, present - wanted.keys())):
            raise ExportRefused(
                f"{target} holds {foreign[0]}, which this command did not write; remove it or choose another "
                "--repository"
            )
        if present == wanted.keys() and all((target / name).read_bytes() == data for name, data in wanted.items()):
            return False
    repository.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".export-", dir=repository))
    try:
        for name, data in wanted.items():
            path = staging / "new" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        if target.exists():
            target.rename(staging / "old")
        (staging / "new").rename(target)
    finally:
        if not target.exists() and (staging / "old").exists():
            (staging / "old").rename(target)
        shutil.rmtree(staging, ignore_errors=True)
    return True


def _data_type(datatype: str) -> int:
    return int(model_config_pb2.DataType.Value(_DATATYPES.get(datatype, f"TYPE_{datatype}")))
