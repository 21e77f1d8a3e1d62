"""The variant `tensorrt`: a config that has ONNX Runtime run the model through TensorRT, on a GPU.

The ONNX file is that of the float model. The native onnxruntime backend hands it to ONNX Runtime's TensorRT provider,
which builds engines for this GPU and this TensorRT: at the warm-up, so that no request waits for it.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from cascadeserve.triton_config import with_instance_count

if TYPE_CHECKING:
    from cascadeserve.triton_config import ModelConfig

# Room for the search for fast kernels. The provider's own limit is 1 GiB in some versions and all of the GPU in others,
# where several models share one.
_WORKSPACE_BYTES = 1 << 30


def ask_for_tensorrt(config: ModelConfig, onnx_model: bytes) -> None:
    """Change a config so that instances stand on the GPU and run in FP16 through TensorRT, one engine for all batches.

    Engines are cached where a confined container may write, for as long as it lives: further instances and reloads find
    them there. ONNX Runtime tells them apart by the names in the graph and not by the weights, hence a folder that is
    named by the content of the model. It makes that folder, but none above it.
    """
    content = hashlib.sha256(onnx_model).hexdigest()[:16]
    parameters = {
        "precision_mode": "FP16",
        "max_workspace_size_bytes": str(_WORKSPACE_BYTES),
        "trt_engine_cache_enable": "1",
        "trt_engine_cache_path": f"/tmp/tensorrt-{config.name}-{content}",  # noqa: S108 - the container's own
    }
    # Without these an engine would be built whenever a batch is larger than any before. It is tuned for full batches,
    # which is what a loaded server runs.
    for bound, rows in (("min", 1), ("opt", config.max_batch_size), ("max", config.max_batch_size)):
        parameters[f"trt_profile_{bound}_shapes"] = ",".join(
            f"{entry.name}:{'x'.join(map(str, (rows, *entry.dims)))}" for entry in config.input
        )
    accelerator = config.optimization.execution_accelerators.gpu_execution_accelerator.add(name="tensorrt")
    for key, value in parameters.items():
        accelerator.parameters[key] = value
    config.CopyFrom(with_instance_count(config, 1, kind="gpu"))
