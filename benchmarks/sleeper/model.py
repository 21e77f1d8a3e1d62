"""Triton Python model: sleeps for as many seconds as its input says, and answers 0. It takes no time of a processor."""

import time

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """One instance."""

    def execute(self, requests: list) -> list:
        """Answer one request after the other."""
        responses = []
        for request in requests:
            seconds = pb_utils.get_input_tensor_by_name(request, "seconds").as_numpy()
            time.sleep(float(seconds.sum()))
            outputs = [
                pb_utils.Tensor("label", np.zeros(seconds.shape, np.int64)),
                pb_utils.Tensor("certainty", np.ones(seconds.shape, np.float32)),
            ]
            responses.append(pb_utils.InferenceResponse(outputs))
        return responses
