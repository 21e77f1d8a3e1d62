"""Triton's Python backend: one residual CNN on the device of its instance. Copied into models as `1/model.py`.

Tensors go in and out through DLPack, without numpy: the backend of the wheel's server was built for numpy 1, and this
way the model also runs where numpy 2 is installed.
"""

import json
import sys
from pathlib import Path

import torch
import triton_python_backend_utils as pb_utils
from torch.utils.dlpack import from_dlpack, to_dlpack

sys.path.insert(0, str(Path(__file__).parent))
from network import ResidualCnn  # stands beside this file, where the stub does not look


class TritonPythonModel:
    """One instance."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the weights and run every batch size once. `args` are Triton's."""
        config = json.loads(args["model_config"])
        folder = Path(args["model_repository"]) / args["model_version"]
        on_gpu = args["model_instance_kind"] == "GPU"
        self._device = torch.device(f"cuda:{args['model_instance_device_id']}" if on_gpu else "cpu")
        torch.set_num_threads(1)
        network = ResidualCnn(**json.loads((folder / "network.json").read_text()))
        network.load_state_dict(torch.load(folder / "weights.pt", weights_only=True))
        self._network = network.to_device(self._device)
        if on_gpu:
            # cuDNN chooses a kernel for every new shape; here, and not in the middle of a measurement
            shape = config["input"][0]["dims"]
            for size in sorted({_padded(rows) for rows in range(1, config["max_batch_size"] + 1)}):
                self._answer(torch.zeros(size, *map(int, shape)))

    def execute(self, requests: list) -> list:
        """Answer each request; one that fails takes no other with it."""
        return [self._respond(request) for request in requests]

    def _respond(self, request: object) -> object:
        try:
            x = from_dlpack(pb_utils.get_input_tensor_by_name(request, "x").to_dlpack())
            outputs = self._answer(x)
            tensors = [
                pb_utils.Tensor.from_dlpack(name, to_dlpack(outputs[name])) for name in request.requested_output_names()
            ]
        except Exception as error:  # noqa: BLE001 - whatever torch raises is the answer to this request
            return pb_utils.InferenceResponse(error=pb_utils.TritonError(f"torch: {error}"))
        return pb_utils.InferenceResponse(tensors)

    @torch.inference_mode()
    def _answer(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        rows = len(x)
        if self._device.type == "cuda":
            x = x.to(self._device).half()
            missing = _padded(rows) - rows
            if missing:
                x = torch.cat([x, x.new_zeros(missing, *x.shape[1:])])
            x = x.contiguous(memory_format=torch.channels_last)
        answers = self._network(x)
        return {
            name: tensor[:rows].cpu().contiguous()
            for name, tensor in zip(("label", "certainty", "scores"), answers, strict=True)
        }


def _padded(rows: int) -> int:
    """Rows that are computed for a batch of `rows`: few distinct sizes, at most 12 % more above 64."""
    if rows <= 8:  # noqa: PLR2004
        return 1 << (rows - 1).bit_length()
    return -(-rows // 8) * 8
