"""The networks of the benchmark: plain residual CNNs of any width and depth. Copied beside every model's `model.py`.

There is no normalisation: weights are random and scaled so that activations keep their size, which is all that a
measurement of time needs, and stays within FP16 at any depth.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional


class ResidualCnn(nn.Module):
    """Input [n, 3, size, size]; `blocks` residual blocks of two 3x3 convolutions with `width` channels."""

    def __init__(self, *, width: int, blocks: int, stride: int, classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, stride=stride, padding=1, bias=False)
        self.first = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(blocks))
        self.second = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(blocks))
        self.head = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Label INT64 [n, 1], certainty FP32 [n, 1] (top-1 minus top-2 probability), scores FP32 [n, classes]."""
        hidden = functional.relu_(self.stem(x))
        for first, second in zip(self.first, self.second, strict=True):
            hidden = hidden + second(functional.relu_(first(functional.relu(hidden))))
        # From here on in FP32: in FP16 many rows would share one certainty, and a threshold could not part them.
        scores = self.head(hidden.mean((2, 3), dtype=torch.float32)).softmax(1)
        best, which = scores.topk(2, dim=1)
        return which[:, :1].contiguous(), best[:, :1] - best[:, 1:], scores

    @torch.no_grad()
    def randomise(self, seed: int) -> None:
        """Fill all weights from a seed, each layer keeping the size of what passes through it."""
        rng = torch.Generator().manual_seed(seed)
        for conv in (self.stem, *self.first, *self.second):
            fan_in = conv.in_channels * 9
            conv.weight.normal_(0.0, (2.0 / fan_in) ** 0.5, generator=rng)
        for conv in self.second:  # so that the sum over all blocks does not grow with their number
            conv.weight.mul_(len(self.second) ** -0.5)
        self.head.weight.normal_(0.0, 4.0 * self.head.in_features**-0.5, generator=rng)
        self.head.bias.zero_()

    def to_device(self, device: torch.device) -> ResidualCnn:
        """Ready for inference there: FP16 and channels last on a GPU, FP32 on a CPU.

        Half weights rather than autocast, which would convert all weights anew in every call.
        """
        self.eval().to(device)
        if device.type == "cuda":
            self.half().to(memory_format=torch.channels_last)
            self.head.float()
        return self
