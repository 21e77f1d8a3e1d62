"""What a family is to the exporter: common inputs, a number of classes, and models from cheap to dear."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from cascadeserve.datatypes import FIXED_SIZE
from cascadeserve.errors import UsageError
from cascadeserve.gear_plan import NAME_PATTERN, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

    from export.ensemble import Preprocessing

__all__ = ["Family", "FamilyModel", "TensorSpec", "Variant"]

# What an exported model is turned into before it is written; see export/variants.py.
Variant = Literal["fp16", "int8", "optimised"]


@dataclass(frozen=True, kw_only=True)
class FamilyModel:
    """One model. `build` returns it with its weights; its forward takes the inputs and returns logits [n, classes].

    With a `variant` it is served in another form: a model of its own, beside that of the same `build` without one.
    With a `preprocessing` it is served as a Triton ensemble, and `build` takes the preprocessing's outputs instead.
    """

    name: str
    build: Callable[[], nn.Module]
    max_batch_size: int
    variant: Variant | None = None
    preprocessing: Preprocessing | None = None

    def __post_init__(self) -> None:
        """Check name and batch size."""
        if not re.match(NAME_PATTERN, self.name):
            raise UsageError(
                f"model {self.name!r}: a name is made of letters, digits and _.- and does not start with . or -"
            )
        if self.max_batch_size < 1:
            raise UsageError(f"model {self.name!r}: max_batch_size must be at least 1, got {self.max_batch_size}")
        if self.variant not in (None, *get_args(Variant)):
            known = ", ".join(get_args(Variant))
            raise UsageError(f"model {self.name!r}: there is no variant {self.variant!r}; choose one of {known}")


@dataclass(frozen=True, kw_only=True)
class Family:
    """Models of one task; inputs of datatype BYTES are byte strings (dtype S).

    `sample(n)` returns n rows, by input name, each [n, *shape], for the parity checks. `quantisation_rows(n)` returns
    the rows that INT8 variants take their scales from: draw them from what the search split is drawn from, never from
    rows that a certificate is to be based on, and apart from `sample`.
    """

    name: str
    inputs: tuple[TensorSpec, ...]
    classes: int
    models: tuple[FamilyModel, ...]
    sample: Callable[[int], dict[str, NDArray[np.generic]]]
    quantisation_rows: Callable[[int], dict[str, NDArray[np.generic]]] | None = None

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
        int8 = [model.name for model in self.models if model.variant == "int8"]
        if int8 and self.quantisation_rows is None:
            raise UsageError(
                f"model {int8[0]!r}: the variant int8 takes its scales from rows, give the family quantisation_rows"
            )

    def checked_sample(self, n: int) -> dict[str, NDArray[np.generic]]:
        """Return `sample(n)`, held against the inputs.

        Raises:
            UsageError: naming the input that does not fit.

        """
        return self._checked("sample", self.sample(n), n)

    def checked_quantisation_rows(self, n: int) -> dict[str, NDArray[np.generic]]:
        """Return `quantisation_rows(n)`, held against the inputs.

        Raises:
            UsageError: naming the input that does not fit.

        """
        rows = {} if self.quantisation_rows is None else self.quantisation_rows(n)
        return self._checked("quantisation_rows", rows, n)

    def _checked(self, what: str, rows: dict[str, NDArray[np.generic]], n: int) -> dict[str, NDArray[np.generic]]:
        expected = {spec.name for spec in self.inputs}
        if set(rows) != expected:
            raise UsageError(f"family {self.name!r}: {what} has the inputs {sorted(rows)}, not {sorted(expected)}")
        for spec in self.inputs:
            array = rows[spec.name]
            shape, dtype = getattr(array, "shape", ()), getattr(array, "dtype", None)
            fits = len(shape) == len(spec.shape) + 1 and all(
                wanted in (-1, size) for wanted, size in zip((n, *spec.shape), shape, strict=True)
            )
            is_bytes = getattr(dtype, "kind", None) == "S"
            if not fits or (not is_bytes if spec.datatype == "BYTES" else dtype != FIXED_SIZE.get(spec.datatype)):
                raise UsageError(
                    f"input {spec.name!r}: {what}({n}) gives {dtype} {list(shape)}, "
                    f"but it is stated as {spec.datatype} {[n, *spec.shape]}"
                )
        return rows
