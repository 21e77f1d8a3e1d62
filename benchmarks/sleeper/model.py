"""Triton Python model: a device that takes as many seconds for a request as its input says, and answers 0.

It sleeps, so it takes no time of a processor. A request that follows within a few milliseconds was waiting: its time
counts from the end of the one before, as on a device that has its next work at hand. So the device has the speed that
is stated, whatever the way to it takes on a busy machine.
"""

import time

import numpy as np
import triton_python_backend_utils as pb_utils

_AT_HAND_S = 0.005


class TritonPythonModel:
    """One instance."""

    def initialize(self, args: dict[str, str]) -> None:  # noqa: ARG002
        """Nothing was done yet."""
        self._free_at_s = 0.0

    def execute(self, requests: list) -> list:
        """Answer one request after the other."""
        responses = []
        for request in requests:
            seconds = pb_utils.get_input_tensor_by_name(request, "seconds").as_numpy()
            now_s = time.monotonic()
            begins_s = now_s if now_s - self._free_at_s > _AT_HAND_S else self._free_at_s
            self._free_at_s = begins_s + float(seconds.sum())
            time.sleep(max(self._free_at_s - now_s, 0.0))
            outputs = [
                pb_utils.Tensor("label", np.zeros(seconds.shape, np.int64)),
                pb_utils.Tensor("certainty", np.ones(seconds.shape, np.float32)),
            ]
            responses.append(pb_utils.InferenceResponse(outputs))
        return responses
