"""Triton Python model: an ONNX model on a device of constant speed.

It answers what the ONNX model beside it answers, and then computes on until its thread has had `pace_first_s +
pace_row_s x rows` seconds of processor time. A core whose sibling is used by other tenants does the same work 1.3 times
slower from one second to the next; processor time that is long enough for the slowest of them does not change, is
shared with other processes of the core like that of the model itself, and needs no other machine.
"""

import json
import time
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path


class TritonPythonModel:
    """One instance: the local server's own ONNX backend, and what is left of the pace."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the session; `onnx_backend.py` lies beside this file."""
        path = Path(args["model_repository"]) / args["model_version"] / "onnx_backend.py"
        spec = spec_from_file_location("onnx_backend", path)
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        config = json.loads(args["model_config"])
        parameters = config["parameters"]
        self._first_s, self._row_s = (
            float(parameters[name]["string_value"]) for name in ("pace_first_s", "pace_row_s")
        )
        self._onnx = module.TritonPythonModel()
        # the default file of this model is this one, of the ONNX model its own
        self._onnx.initialize(args | {"model_config": json.dumps(config | {"default_model_filename": "model.onnx"})})

    def execute(self, requests: list) -> list:
        """Answer each request, no sooner than its rows take."""
        responses = []
        for request in requests:
            until_s = time.thread_time() + self._first_s + self._row_s * len(request.inputs()[0].as_numpy())
            responses += self._onnx.execute([request])
            while time.thread_time() < until_s:
                pass
        return responses
