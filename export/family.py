"""What a family is to the exporter: common inputs, a number of classes, and models from cheap to dear."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cascadeserve.datatypes import FIXED_SIZE
from cascadeserve.errors import UsageError
from cascadeserve.gear_plan import NAME_PATTERN, TensorSpec

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
        """Check name and batch size."""
        if not re.match(NAME_PATTERN, self.name):
            raise UsageError(
                f"model {self.name!r}: a name is made of letters, digits and _.- and does not start with . or -"
            )
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

    def __post_init__(self) -> None:
        """Check what can be checked without building a model."""
        names = [model.name for model in self.models]
        if not names:
            raise UsageError(f"family {self.name!r} has no models")
        if twice := [name for name in names if names.count(name) > 1]:
            raise UsageError(f"family {self.name!r} has two models named {twice[0]!r}")
        if self.classes < 2:  # noqa: PLR2004 - certainty is the distance of two scores
            raise UsageError(f"family {self.name!r}: classes must be at least 2, got {self.classes}")
        if not self.inputs:
            raise UsageError(f"family {self.name!r} has no inputs")
        for spec in self.inputs:
            if not spec.shape:
                raise UsageError(f"input {spec.name!r}: Triton needs at least one dimension per row, such as (1,)")

    def checked_sample(self, n: int) -> dict[str, NDArray[np.generic]]:
        """Return `sample(n)`, held against the inputs.

        Raises:
            UsageError: naming the input that does not fit.

        """
        sample = self.sample(n)
        expected = {spec.name for spec in self.inputs}
        if set(sample) != expected:
            raise UsageError(f"family {self.name!r}: sample has the inputs {sorted(sample)}, not {sorted(expected)}")
        for spec in self.inputs:
            array = sample[spec.name]
            shape, dtype = getattr(array, "shape", ()), getattr(array, "dtype", None)
            fits = len(shape) == len(spec.shape) + 1 and all(
                wanted in (-1, size) for wanted, size in zip((n, *spec.shape), shape, strict=True)
            )
            if not fits or dtype != FIXED_SIZE.get(spec.datatype):
                raise UsageError(
                    f"input {spec.name!r}: sample({n}) gives {dtype} {list(shape)}, "
                    f"but it is stated as {spec.datatype} {[n, *spec.shape]}"
                )
        return sample
