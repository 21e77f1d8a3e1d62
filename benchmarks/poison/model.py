"""Triton Python model: an ONNX model that fails the whole batch in which it finds a marked row.

Nothing in the answer says which row it was, as with a real model that cannot take a value it is given.
"""

import json
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """One instance: the local server's own ONNX backend behind a look at the rows."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the session; `onnx_backend.py` lies beside this file."""
        path = Path(args["model_repository"]) / args["model_version"] / "onnx_backend.py"
        spec = spec_from_file_location("onnx_backend", path)
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        config = json.loads(args["model_config"])
        self._mark = float(config["parameters"]["poison_at_least"]["string_value"])
        self._onnx = module.TritonPythonModel()
        # the default file of this model is this one, of the ONNX model its own
        self._onnx.initialize(args | {"model_config": json.dumps(config | {"default_model_filename": "model.onnx"})})

    def execute(self, requests: list) -> list:
        """Answer each request, or fail it."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: object) -> object:
        if np.max(request.inputs()[0].as_numpy()) >= self._mark:
            return pb_utils.InferenceResponse(error=pb_utils.TritonError("a value of the batch is out of range"))
        return self._onnx.execute([request])[0]
