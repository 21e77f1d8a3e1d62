"""The family on disk: a Triton repository of residual CNNs with random weights, and the rows that are sent to it."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

CLASSES = 10
INPUT = "x"
_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Member:
    """One model of the family."""

    name: str
    width: int
    blocks: int
    # of the first convolution: 2 halves the resolution of everything after it
    stride: int

    def flop_per_row(self, size: int) -> float:
        """Floating point operations of one row, a multiply-add counted as two."""
        pixels = (size // self.stride) ** 2
        return 2.0 * 9 * pixels * (3 * self.width + 2 * self.blocks * self.width**2)

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return 9 * (3 * self.width + 2 * self.blocks * self.width**2) + (self.width + 1) * CLASSES


@dataclass(frozen=True)
class Family:
    """Members from small to large over one input [3, size, size]; `first` is the cascade's first stage."""

    members: tuple[Member, ...]
    first: str
    size: int
    max_batch: int

    @property
    def largest(self) -> str:
        """Name of the last member."""
        return self.members[-1].name

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of one row."""
        return 3, self.size, self.size


# The largest takes some 300 GFLOP per row, so that the GPU and not the processes around it limits both rates, also on
# the fastest GPUs of today. Rows have 12 KB: what is to be measured is the cascade, not the copying of pixels.
FULL = Family(
    (
        Member("tiny", width=32, blocks=2, stride=2),
        Member("small", width=64, blocks=4, stride=2),
        Member("medium", width=256, blocks=12, stride=2),
        Member("large", width=512, blocks=32, stride=1),
    ),
    first="small",
    size=32,
    max_batch=128,
)
# For trying the script on any CPU: some 10 ms per row for the larger one.
QUICK = Family(
    (Member("small", width=8, blocks=1, stride=2), Member("large", width=64, blocks=8, stride=1)),
    first="small",
    size=16,
    max_batch=16,
)


def draw_rows(family: Family, count: int, seed: int) -> NDArray[np.float32]:
    """Rows [count, 3, size, size] that differ in coarse pattern and contrast: plain noise would all average out."""
    rng = np.random.default_rng(seed)
    coarse = rng.standard_normal((count, 3, 4, 4), dtype=np.float32)
    patterns = coarse.repeat(family.size // 4, axis=2).repeat(family.size // 4, axis=3)
    contrast = rng.uniform(0.3, 2.0, (count, 1, 1, 1)).astype(np.float32)
    noise = rng.standard_normal((count, *family.shape), dtype=np.float32)
    rows: NDArray[np.float32] = contrast * patterns + np.float32(0.2) * noise
    return rows


def write_repository(folder: Path, family: Family, seed: int = 7) -> Path:
    """Write every member as a model of Triton's Python backend, with a complete config."""
    import torch  # noqa: PLC0415 - takes seconds, and only this step needs it

    from benchmarks.gpu.network import ResidualCnn  # noqa: PLC0415

    for position, member in enumerate(family.members):
        version = folder / member.name / "1"
        version.mkdir(parents=True)
        settings = {"width": member.width, "blocks": member.blocks, "stride": member.stride, "classes": CLASSES}
        network = ResidualCnn(**settings)
        network.randomise(seed + position)
        # The head stays in FP32 when it runs, so it is stored that way.
        state = {name: each if name.startswith("head") else each.half() for name, each in network.state_dict().items()}
        torch.save(state, version / "weights.pt")
        (version / "network.json").write_text(json.dumps(settings))
        shutil.copyfile(_HERE / "network.py", version / "network.py")
        shutil.copyfile(_HERE / "triton_model.py", version / "model.py")
        (folder / member.name / "config.pbtxt").write_text(_config(member.name, family))
    return folder


def _config(name: str, family: Family) -> str:
    dims = ", ".join(map(str, family.shape))
    return f"""name: "{name}"
backend: "python"
max_batch_size: {family.max_batch}
input [{{ name: "{INPUT}" data_type: TYPE_FP32 dims: [{dims}] }}]
output [
  {{ name: "label" data_type: TYPE_INT64 dims: [1] }},
  {{ name: "certainty" data_type: TYPE_FP32 dims: [1] }},
  {{ name: "scores" data_type: TYPE_FP32 dims: [{CLASSES}] }}
]
instance_group [{{ count: 1 kind: KIND_AUTO }}]
parameters {{ key: "FORCE_CPU_ONLY_INPUT_TENSORS" value {{ string_value: "yes" }} }}
"""
