"""What the native backends read of a Triton model config, and which values they take.

Each table names the source it was read off, as repository and file; where a README and the source differ, the source
holds. Read off the main branches of early 2026; a newer server may read more, an older one less.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Form:
    """How a value is written. Parameters are strings, whatever they mean."""

    pattern: str
    wanted: str

    def holds(self, value: str) -> bool:
        """Whether a value has this form."""
        return re.fullmatch(self.pattern, value) is not None


# From backend, src/backend_common.cc. Numbers go through std::stoi, which takes "4 threads" for 4 and throws, uncaught,
# where a number is too large, so only what is a number of the right size passes here.
INTEGER = Form(r"-?\d{1,9}", 'a whole number such as "1"')
COUNT = Form(r"\d{1,9}", 'a whole number of 0 or more, such as "1"')
BYTES = Form(r"\d{1,19}", 'a number of bytes such as "1073741824"')
FLAG = Form(r"(?i:true|on|1|false|off|0)", '"1" or "0"')
ZERO_OR_ONE = Form(r"[01]", '"0" or "1"')
TEXT = Form(r"[\s\S]+", "a text that is not empty")  # the backend passes over empty values
# From onnxruntime, core/common/parse_string.h: what the backend hands on as it stands; fewer spellings than FLAG
ORT_FLAG = Form(r"[01]|[Tt]rue|[Ff]alse", '"1" or "0"')

# From core, src: model_config_utils.cc, backend_model.cc, backend_model_instance.cc and model_lifecycle.cc. The server
# itself reads these, whatever the backend; `runtime`, `model_operations` and `optimization` are the backends' own.
CORE_FIELDS = frozenset({
    "name", "platform", "backend", "version_policy", "max_batch_size", "input", "output", "batch_input",
    "batch_output", "dynamic_batching", "sequence_batching", "ensemble_scheduling", "instance_group",
    "default_model_filename", "cc_model_filenames", "metric_tags", "parameters", "model_warmup",
    "model_transaction_policy", "model_repository_agents", "response_cache", "model_metrics",
})  # fmt: skip

# From backend, src/backend_model.cc: for every backend that is built on it
_PINNED = frozenset({"optimization.input_pinned_memory", "optimization.output_pinned_memory"})


@dataclass(frozen=True)
class Backend:
    """A native backend: the fields it reads beyond the server's, its parameters, its tensors' types, its file."""

    name: str
    platform: str
    model_file: str
    fields: frozenset[str]
    parameters: Mapping[str, Form]
    datatypes: frozenset[str]


ONNXRUNTIME = Backend(
    name="onnxruntime",
    # from core, src/constants.h
    platform="onnxruntime_onnx",
    model_file="model.onnx",
    # from onnxruntime_backend, src/onnxruntime.cc; nothing there reads optimization.priority, .cuda, .eager_batching or
    # .gather_kernel_buffer_threshold.
    fields=frozenset({"optimization.graph", "optimization.execution_accelerators", "model_operations"}) | _PINNED,
    # from onnxruntime_backend, src/onnxruntime.cc: ModelState, LoadModel, ModelInstanceState
    parameters={
        "execution_mode": ZERO_OR_ONE,
        "intra_op_thread_count": COUNT,
        "inter_op_thread_count": COUNT,
        "enable_mem_arena": FLAG,
        "enable_mem_pattern": FLAG,
        "share_session_between_instances": FLAG,
        "session.use_device_allocator_for_initializers": ZERO_OR_ONE,
        # from onnxruntime, include/onnxruntime/core/session/onnxruntime_run_options_config_keys.h
        "memory.enable_memory_arena_shrinkage": Form(r"(cpu|gpu):\d+(;(cpu|gpu):\d+)*", 'a list such as "cpu:0;gpu:0"'),
        # of the CUDA provider. The README calls them deprecated here, but the source sets all four from here, or to
        # their defaults, after it has read the "cuda" accelerator: this is the place that counts.
        "cudnn_conv_algo_search": Form(r"[012]", '"0" (exhaustive), "1" (heuristic) or "2" (default)'),
        "gpu_mem_limit": BYTES,
        "arena_extend_strategy": ZERO_OR_ONE,
        "do_copy_in_default_stream": ORT_FLAG,
    },
    # from onnxruntime_backend, src/onnxruntime_utils.cc: ModelConfigDataTypeToOnnxDataType; no BF16
    datatypes=frozenset({
        "TYPE_BOOL", "TYPE_UINT8", "TYPE_UINT16", "TYPE_UINT32", "TYPE_UINT64", "TYPE_INT8", "TYPE_INT16", "TYPE_INT32",
        "TYPE_INT64", "TYPE_FP16", "TYPE_FP32", "TYPE_FP64", "TYPE_STRING",
    }),
)  # fmt: skip

TENSORRT = Backend(
    name="tensorrt",
    platform="tensorrt_plan",
    model_file="model.plan",
    # from tensorrt_backend, src/tensorrt_model.cc: ParseModelConfig
    fields=frozenset({
        "optimization.priority", "optimization.cuda", "optimization.eager_batching",
        "optimization.gather_kernel_buffer_threshold",
    }) | _PINNED,
    # from tensorrt_backend, README.md, "Parameters"; the multi-device ones of docs/multi_device.md are left out on
    # purpose, for an endpoint owns one device
    parameters={
        "execution_context_allocation_strategy": Form("STATIC|ON_PROFILE_CHANGE", '"STATIC" or "ON_PROFILE_CHANGE"'),
    },
    # from tensorrt_backend, src/tensorrt_utils.cc: ConvertTrtTypeToDataType, with TensorRT 10
    datatypes=frozenset({
        "TYPE_BOOL", "TYPE_UINT8", "TYPE_INT8", "TYPE_INT32", "TYPE_INT64", "TYPE_FP16", "TYPE_BF16", "TYPE_FP32",
    }),
)  # fmt: skip

NATIVE = {backend.name: backend for backend in (ONNXRUNTIME, TENSORRT)}

# From onnxruntime_backend, src/onnxruntime.cc, LoadModel: the `tensorrt` GPU accelerator. The backend refuses any other
# key. Values are handed on to ONNX Runtime as they stand, so flags take its spellings.
TENSORRT_ACCELERATOR: Mapping[str, Form] = {
    "precision_mode": Form("FP32|FP16|BF16|INT8", '"FP32", "FP16", "BF16" or "INT8"'),
    "max_workspace_size_bytes": BYTES,
    "int8_calibration_table_name": TEXT,
    "int8_use_native_calibration_table": ORT_FLAG,
    "trt_max_partition_iterations": COUNT,
    "trt_min_subgraph_size": COUNT,
    "trt_dla_enable": ORT_FLAG,
    "trt_dla_core": COUNT,
    "trt_engine_cache_enable": ORT_FLAG,
    "trt_engine_cache_path": TEXT,
    "trt_engine_cache_prefix": TEXT,
    "trt_dump_subgraphs": ORT_FLAG,
    "trt_force_sequential_engine_build": ORT_FLAG,
    "trt_context_memory_sharing_enable": ORT_FLAG,
    "trt_layer_norm_fp32_fallback": ORT_FLAG,
    "trt_timing_cache_enable": ORT_FLAG,
    "trt_timing_cache_path": TEXT,
    "trt_force_timing_cache": ORT_FLAG,
    "trt_detailed_build_log": ORT_FLAG,
    "trt_build_heuristics_enable": ORT_FLAG,
    "trt_sparsity_enable": ORT_FLAG,
    "trt_builder_optimization_level": Form(r"[0-5]", 'a level from "0" to "5"'),
    "trt_auxiliary_streams": INTEGER,
    "trt_tactic_sources": TEXT,
    "trt_extra_plugin_lib_paths": TEXT,
    "trt_profile_min_shapes": TEXT,  # their form is checked against the inputs, in `accelerators`
    "trt_profile_opt_shapes": TEXT,
    "trt_profile_max_shapes": TEXT,
    "trt_cuda_graph_enable": ORT_FLAG,
    "trt_dump_ep_context_model": ORT_FLAG,
    "trt_ep_context_file_path": TEXT,
    "trt_ep_context_embed_mode": ZERO_OR_ONE,
}

# From onnxruntime, onnxruntime/core/providers/cuda/cuda_execution_provider_info.cc: the `cuda` GPU accelerator. The
# backend hands any key on; ONNX Runtime refuses those it does not know.
CUDA_ACCELERATOR: Mapping[str, Form] = {
    "cudnn_conv_use_max_workspace": ORT_FLAG,
    "enable_cuda_graph": ORT_FLAG,
    "cudnn_conv1d_pad_to_nc1d": ORT_FLAG,
    "tunable_op_enable": ORT_FLAG,
    "tunable_op_tuning_enable": ORT_FLAG,
    "tunable_op_max_tuning_duration_ms": COUNT,
    "enable_skip_layer_norm_strict_mode": ORT_FLAG,
    "prefer_nhwc": ORT_FLAG,
    "use_ep_level_unified_stream": ORT_FLAG,
    "use_tf32": ORT_FLAG,
}
# From onnxruntime_backend, src/onnxruntime.cc, LoadModel: set from the instance after the accelerator was read
SET_BY_THE_BACKEND = frozenset({"device_id", "has_user_compute_stream", "user_compute_stream"})
