"""Triton Python-backend model: runs `preprocess` of the `preprocessing.py` beside it, on every request by itself."""

import json

import numpy as np
import triton_python_backend_utils as pb_utils
from preprocessing import preprocess


class TritonPythonModel:
    """One instance."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the names of the inputs. `args` are Triton's: config as JSON among others."""
        self._inputs = [entry["name"] for entry in json.loads(args["model_config"])["input"]]

    def execute(self, requests: list) -> list:
        """Answer each request; a request that fails takes no other with it."""
        return [self._answer(request) for request in requests]

    def _answer(self, request: object) -> object:
        try:
            inputs = {name: pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in self._inputs}
            outputs = preprocess(inputs)
            tensors = [
                pb_utils.Tensor(name, np.ascontiguousarray(outputs[name])) for name in request.requested_output_names()
            ]
        except Exception as error:  # noqa: BLE001 - whatever the family's code raises is the answer to this request
            what = f"preprocessing: {type(error).__name__}: {error}"
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(what))
        return pb_utils.InferenceResponse(tensors)
