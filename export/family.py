"""What a family is to the exporter: common inputs, a number of classes, and models from cheap to dear."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cascadeserve.errors import UsageError
from cascadeserve.gear_plan import TensorSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

__all__ = ["Family", "FamilyModel", "TensorSpec"]


@dataclass(frozen=True, kw_only=True)
class FamilyModel:
    """One model. `build` returns it with its weights; its forward takes the inputs and returns logits [n, classes]."""

    name: str
    build: Callable[[], nn.Module]
    max_batch_size: int

    def __post_init__(self) -> None:
        """Check the batch size."""
        if self.max_batch_size < 1:
            raise UsageError(f"model {self.name!r}: max_batch_size must be at least 1, got {self.max_batch_size}")


@dataclass(frozen=True, kw_only=True)
class Family:
    """Models of one task. `sample(n)` returns n rows, by input name, each [n, *shape], for the parity checks."""

    name: str
    inputs: tuple[TensorSpec, ...]
    classes: int
    models: tuple[FamilyModel, ...]
    sample: Callable[[int], dict[str, NDArray[np.generic]]]
