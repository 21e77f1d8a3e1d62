"""Triton Python-based backend named `onnxruntime`: runs `model.onnx` with the onnxruntime package.

It stands in for the native ONNX Runtime backend, which the local server does not carry, so that one model repository
serves both. It reads the same fields of the config: default file name, `intra_op_thread_count`, instance kind, and the
TensorRT accelerator of instances on a GPU.
"""

import json
import os
from pathlib import Path

import numpy as np

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # must be set before the import

import onnxruntime as ort
import triton_python_backend_utils as pb_utils

_TENSORRT = "TensorrtExecutionProvider"
# parameters that are called otherwise in ONNX Runtime
_OPTION = {
    "max_workspace_size_bytes": "trt_max_workspace_size",
    "int8_calibration_table_name": "trt_int8_calibration_table_name",
    "int8_use_native_calibration_table": "trt_int8_use_native_calibration_table",
}


class TritonPythonModel:
    """One instance of one model, with an ONNX Runtime session of its own."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the session. `args` are Triton's: config as JSON, model folder, version, kind and device."""
        config = json.loads(args["model_config"])
        options = ort.SessionOptions()
        options.intra_op_num_threads = _thread_count(config)
        options.inter_op_num_threads = 1
        providers = ["CPUExecutionProvider"]
        if args["model_instance_kind"] == "GPU":
            providers = [*_gpu_providers(config, int(args["model_instance_device_id"])), *providers]
        file = config.get("default_model_filename") or "model.onnx"
        path = Path(args["model_repository"]) / args["model_version"] / file
        self._session = ort.InferenceSession(str(path), options, providers=providers)
        # without TensorRT's libraries ONNX Runtime would go on with the next provider, and answer otherwise
        if _TENSORRT in dict(providers[:-1]) and _TENSORRT not in self._session.get_providers():
            raise pb_utils.TritonModelException("onnxruntime cannot load TensorRT, which the config asks for")
        self._inputs = [entry.name for entry in self._session.get_inputs()]
        self._strings = {entry.name for entry in self._session.get_inputs() if entry.type == "tensor(string)"}

    def execute(self, requests: list) -> list:
        """Answer each request; a request that fails takes no other with it."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: object) -> object:
        try:
            feeds = {}
            for name in self._inputs:
                array = pb_utils.get_input_tensor_by_name(request, name).as_numpy()
                feeds[name] = _decoded(array) if name in self._strings else array
            wanted = list(request.requested_output_names())
            outputs = self._session.run(wanted, feeds)
        except Exception as error:  # noqa: BLE001 - whatever the session raises is the answer to this request
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(f"onnxruntime: {error}"))
        return pb_utils.InferenceResponse(
            [pb_utils.Tensor(name, array) for name, array in zip(wanted, outputs, strict=True)]
        )


def _decoded(array: np.ndarray) -> np.ndarray:
    texts = [item.decode() if isinstance(item, bytes) else str(item) for item in array.reshape(-1)]
    return np.array(texts, dtype=object).reshape(array.shape)


def _gpu_providers(config: dict, device_id: int) -> list[tuple[str, dict[str, object]]]:
    """Providers of an instance on a GPU, with the parameters that the native backend would hand them."""
    device = {"device_id": device_id}
    providers = [("CUDAExecutionProvider", device)]
    accelerators = config.get("optimization", {}).get("execution_accelerators", {}).get("gpu_execution_accelerator", [])
    for accelerator in accelerators:
        if accelerator["name"] == "tensorrt":
            options = {_OPTION.get(key, key): value for key, value in accelerator.get("parameters", {}).items()}
            precision = options.pop("precision_mode", "FP32")
            if precision != "FP32":
                options[f"trt_{precision.lower()}_enable"] = "1"
            providers.insert(0, (_TENSORRT, device | options))
    return providers


def _thread_count(config: dict) -> int:
    parameter = config.get("parameters", {}).get("intra_op_thread_count", {})
    return int(parameter.get("string_value", 0))
