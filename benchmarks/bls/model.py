"""Triton Python model: a cascade in business logic scripting, which asks the other models of the server.

What the dynamic batcher hands it is one batch; what no stage before was certain of goes on to the next as one batch.
"""

import json

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    """One instance; it is taken while its batch is on its way through the cascade."""

    def initialize(self, args: dict[str, str]) -> None:
        """Read the stages, pairs of a model and its threshold, from the config."""
        config = json.loads(args["model_config"])
        self._stages = json.loads(config["parameters"]["stages"]["string_value"])
        self._input = config["input"][0]["name"]

    def execute(self, requests: list) -> list:
        """Carry the rows of all requests through the cascade together."""
        inputs = [pb_utils.get_input_tensor_by_name(request, self._input).as_numpy() for request in requests]
        ends = np.cumsum([len(each) for each in inputs])
        rows = np.concatenate(inputs)
        label = np.empty((len(rows), 1), np.int64)
        certainty = np.empty((len(rows), 1), np.float32)
        stage = np.empty((len(rows), 1), np.int32)
        left = np.arange(len(rows))
        for number, (model, threshold) in enumerate(self._stages):
            answered, certain = self._ask(model, rows[left])
            taken = np.full(len(left), fill_value=True) if threshold is None else certain.reshape(-1) >= threshold
            mine = left[taken]
            label[mine], certainty[mine], stage[mine] = answered[taken], certain[taken], number
            left = left[~taken]
            if not len(left):
                break
        outputs = {"label": label, "certainty": certainty, "stage": stage}
        return [
            pb_utils.InferenceResponse(
                [pb_utils.Tensor(name, array[end - len(each) : end]) for name, array in outputs.items()]
            )
            for each, end in zip(inputs, ends, strict=True)
        ]

    def _ask(self, model: str, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Label and certainty of each row, both [n, 1]."""
        request = pb_utils.InferenceRequest(
            model_name=model,
            requested_output_names=["label", "certainty"],
            inputs=[pb_utils.Tensor(self._input, rows)],
        )
        response = request.exec()
        if response.has_error():
            raise pb_utils.TritonModelException(response.error().message())
        label, certainty = (
            pb_utils.get_output_tensor_by_name(response, name).as_numpy() for name in ("label", "certainty")
        )
        return label, certainty
