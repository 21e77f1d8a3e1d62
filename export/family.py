"""What a family is to the exporter: common inputs, a number of classes, and models from cheap to dear.

Rows that an export uses are search rows, never calibration rows: a certificate may judge only what was not chosen by
its rows, and a temperature and the scales of INT8 are chosen.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from cascadeserve.datatypes import FIXED_SIZE
from cascadeserve.errors import UsageError
from cascadeserve.gear_plan import NAME_PATTERN, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from numpy.typing import NDArray
    from torch import nn

    from export.ensemble import Preprocessing

    Rows = dict[str, NDArray[np.generic]]

__all__ = ["Certainty", "Family", "FamilyModel", "Head", "Output", "TensorSpec", "Variant"]

# What an exported model is turned into before it is written; see export/variants.py.
Variant = Literal["fp16", "int8", "optimised", "tensorrt"]
Certainty = Literal["margin", "max_probability", "negative_entropy"]
Output = Literal["logits", "probabilities"]

# Rows on which a model is held against its source.
NUM_PARITY_ROWS = 256
# The digits ResNet gave float's label on 99.97 % of test rows after 128 of these and on all after 512.
NUM_QUANTISATION_ROWS = 512
LEAST_QUANTISATION_ROWS = 128
# One number is fitted to them.
NUM_TEMPERATURE_ROWS = 2_000

_TINY, _HUGE = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
_TORCHSCRIPT, _TORCH_EXPORT, _ONNX = (".pt", ".ts"), (".pt2",), (".onnx",)
SUFFIXES = (*_ONNX, *_TORCHSCRIPT, *_TORCH_EXPORT)


@dataclass(frozen=True, kw_only=True)
class Head:
    """How sure a model is, told from its last output; more is surer.

    Attributes:
        certainty: of the probabilities p of a row: the largest minus the second largest; the largest; or the sum of
            p log p, which is 0 for a row that is sure and -log(classes) for one that knows nothing.
        output: what the model gives.
        temperature: scores are softmax(logits / temperature). Of probabilities it divides the logarithms, which are
            logits but for a constant per row that softmax does not see, so that a fitted temperature means the same.
            Probabilities at temperature 1 are passed on as they are, without making them sum to 1.
        keep_scores: whether the model returns its scores too; without them a row costs 12 bytes on the way from the
            device, however many classes there are.

    """

    certainty: Certainty = "margin"
    output: Output = "logits"
    temperature: float = 1.0
    keep_scores: bool = True

    def __post_init__(self) -> None:
        """Check what may come from a file."""
        for name, kinds in (("certainty", Certainty), ("output", Output)):
            if getattr(self, name) not in get_args(kinds):
                raise UsageError(f"{name} must be one of {', '.join(get_args(kinds))}, got {getattr(self, name)!r}")
        # in single precision, as it stands in the graph, where less than the smallest number would be 0
        if not _TINY <= self.temperature <= _HUGE:
            raise UsageError(f"temperature must be a positive number, got {self.temperature}")


@dataclass(frozen=True, kw_only=True)
class FamilyModel:
    """One model, built by a function or read from a file.

    With a `variant` it is served in another form: a model of its own, beside that of the same source without one.

    Attributes:
        name: of the served model.
        max_batch_size: rows that one batch may have.
        build: returns a PyTorch module with its weights. It takes the family's inputs in their order, each [n, *shape],
            and returns what `head.output` says, [n, classes].
        file: instead of `build`: .onnx, TorchScript (.pt, .ts) or torch.export (.pt2), of any batch size. An ONNX graph
            has the family's inputs by name, the others take them in order. Load only files that you trust: PyTorch's
            may run code.
        variant: form that it is served in.
        head: how its certainty is told.
        output_name: the output of an ONNX file that holds a number for every class, if it has several.
        fit_temperature: fit the head's temperature to the family's labelled rows.
        preprocessing: with one it is served as a Triton ensemble, and `build` or `file` takes what that gives.

    """

    name: str
    max_batch_size: int
    build: Callable[[], nn.Module] | None = None
    file: Path | None = None
    variant: Variant | None = None
    head: Head = Head()
    output_name: str | None = None
    fit_temperature: bool = False
    preprocessing: Preprocessing | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without reading or building the model."""
        if not re.match(NAME_PATTERN, self.name):
            raise UsageError(
                f"model {self.name!r}: a name is made of letters, digits and _.- and does not start with . or -"
            )
        if self.max_batch_size < 1:
            raise UsageError(f"model {self.name!r}: max_batch_size must be at least 1, got {self.max_batch_size}")
        if self.variant not in (None, *get_args(Variant)):
            known = ", ".join(get_args(Variant))
            raise UsageError(f"model {self.name!r}: there is no variant {self.variant!r}; choose one of {known}")
        if (self.build is None) == (self.file is None):
            raise UsageError(f"model {self.name!r}: give one of build and file")
        if self.file is not None and self.file.suffix not in SUFFIXES:
            raise UsageError(
                f"model {self.name!r}: {self.file} does not end in "
                ".onnx, .pt or .ts (TorchScript) or .pt2 (torch.export)"
            )
        if self.output_name is not None and not self.is_onnx:
            raise UsageError(f"model {self.name!r}: output_name chooses an output of an .onnx file; leave it out")
        if self.fit_temperature and self.head.temperature != 1.0:
            raise UsageError(f"model {self.name!r}: its temperature is either given or fitted, not both")

    @property
    def classifier_name(self) -> str:
        """Name of its ONNX model: its own, unless a preprocessing makes it an ensemble."""
        return self.name if self.preprocessing is None else f"{self.name}_classifier"

    @property
    def is_onnx(self) -> bool:
        """Whether it comes from an ONNX file."""
        return self.file is not None and self.file.suffix in _ONNX

    @property
    def is_torchscript(self) -> bool:
        """Whether it comes from a TorchScript file."""
        return self.file is not None and self.file.suffix in _TORCHSCRIPT


@dataclass(frozen=True, kw_only=True)
class Family:
    """Models of one task; inputs of datatype BYTES are byte strings (dtype S).

    Its functions return rows by input name, each [rows, *shape], the same ones at every call: search rows, never ones
    that a certificate is to be based on.

    Attributes:
        name: as the goal and the records have it.
        inputs: of every model.
        classes: of every model.
        models: from cheap to dear.
        sample: `sample(n)` returns n rows, for the parity checks.
        quantisation_rows: `quantisation_rows(n)` returns up to n rows, LEAST_QUANTISATION_ROWS at least, that INT8
            variants take their scales from. Keep them apart from `sample`, which judges the scales.
        labelled_rows: `labelled_rows(n)` returns up to n rows and their right classes, integers [rows], that
            temperatures are fitted to. They may be any search rows.

    """

    name: str
    inputs: tuple[TensorSpec, ...]
    classes: int
    models: tuple[FamilyModel, ...]
    sample: Callable[[int], Rows]
    quantisation_rows: Callable[[int], Rows] | None = None
    labelled_rows: Callable[[int], tuple[Rows, NDArray[np.integer[Any]]]] | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without building a model."""
        names = [model.name for model in self.models]
        if not names:
            raise UsageError(f"family {self.name!r} has no models")
        if twice := [name for name in names if names.count(name) > 1]:
            raise UsageError(f"family {self.name!r} has two models named {twice[0]!r}")
        self._check_part_names()
        if self.classes < 2:  # noqa: PLR2004 - certainty is the distance of two scores
            raise UsageError(f"family {self.name!r}: classes must be at least 2, got {self.classes}")
        if not self.inputs:
            raise UsageError(f"family {self.name!r} has no inputs")
        for spec in self.inputs:
            if not spec.shape:
                raise UsageError(f"input {spec.name!r}: Triton needs at least one dimension per row, such as (1,)")
        tensorrt = [model.name for model in self.models if model.variant == "tensorrt"]
        if tensorrt and (open_input := next((spec.name for spec in self.inputs if -1 in spec.shape), None)):
            raise UsageError(
                f"model {tensorrt[0]!r}: the variant tensorrt builds an engine for stated sizes, but input "
                f"{open_input!r} leaves one open (-1); state it, or drop this variant"
            )
        int8 = [model.name for model in self.models if model.variant == "int8"]
        if int8 and self.quantisation_rows is None:
            raise UsageError(
                f"model {int8[0]!r}: the variant int8 takes its scales from rows, give the family quantisation_rows"
            )
        fitted = [model.name for model in self.models if model.fit_temperature]
        if fitted and self.labelled_rows is None:
            raise UsageError(
                f"model {fitted[0]!r}: a temperature is fitted to rows with labels, give the family labelled_rows"
            )

    def _check_part_names(self) -> None:
        """What a model with preprocessing is written as must not be what something else is written as."""
        written = {model.name: f"model {model.name!r}" for model in self.models}
        preprocessings: dict[str, Preprocessing] = {}
        for model in self.models:
            if (preprocessing := model.preprocessing) is None:
                continue
            if (other := written.get(model.classifier_name)) is not None:
                raise UsageError(
                    f"{other} has the name under which the classifier of model {model.name!r} is written, which has a "
                    "preprocessing; rename one of them"
                )
            if preprocessings.setdefault(preprocessing.name, preprocessing) != preprocessing:
                raise UsageError(
                    f"family {self.name!r} has two preprocessings named {preprocessing.name!r}; rename one"
                )
        for model in self.models:
            if model.preprocessing is not None:
                written[model.classifier_name] = f"the classifier of model {model.name!r}"
        for name in preprocessings:
            if name in written:
                raise UsageError(f"preprocessing {name!r} has the name of {written[name]}; rename one of them")

    def checked_sample(self, n: int) -> Rows:
        """Return `sample(n)`, held against the inputs.

        Raises:
            UsageError: naming the input that does not fit.

        """
        return self._checked("sample", self.sample(n), n, least=n)

    def checked_quantisation_rows(self, n: int) -> Rows:
        """Return `quantisation_rows(n)`, held against the inputs.

        Raises:
            UsageError: naming the input that does not fit.

        """
        rows = {} if self.quantisation_rows is None else self.quantisation_rows(n)
        return self._checked("quantisation_rows", rows, n, least=min(n, LEAST_QUANTISATION_ROWS))

    def checked_labelled_rows(self, n: int) -> tuple[Rows, NDArray[np.integer[Any]]]:
        """Return `labelled_rows(n)`, held against the inputs; `temperature.fit_temperature` checks the labels.

        Raises:
            UsageError: naming the input that does not fit.

        """
        rows, labels = ({}, np.zeros(0, np.int64)) if self.labelled_rows is None else self.labelled_rows(n)
        return self._checked("labelled_rows", rows, n, least=1), np.asarray(labels)

    def _checked(self, what: str, rows: Rows, n: int, *, least: int) -> Rows:
        expected = {spec.name for spec in self.inputs}
        if set(rows) != expected:
            raise UsageError(f"family {self.name!r}: {what} has the inputs {sorted(rows)}, not {sorted(expected)}")
        first = getattr(rows[self.inputs[0].name], "shape", ())
        found = first[0] if first and least <= first[0] <= n else n
        for spec in self.inputs:
            array = rows[spec.name]
            shape: tuple[int, ...] = getattr(array, "shape", ())
            dtype = getattr(array, "dtype", None)
            if not fits(spec, shape, dtype) or shape[0] != found:
                raise UsageError(
                    f"input {spec.name!r}: {what}({n}) gives {dtype} {list(shape)}, "
                    f"but it is stated as {spec.datatype} {[found, *spec.shape]}"
                )
        return rows


def fits(spec: TensorSpec, shape: tuple[int, ...], dtype: object) -> bool:
    """Whether rows of an array's shape and dtype are what an input is stated to be; any number of rows."""
    if spec.datatype == "BYTES":
        same_type = getattr(dtype, "kind", None) == "S"
    else:
        same_type = spec.datatype in FIXED_SIZE and dtype == FIXED_SIZE[spec.datatype]
    return (
        same_type
        and len(shape) == len(spec.shape) + 1
        and all(wanted in (-1, size) for wanted, size in zip(spec.shape, shape[1:], strict=True))
    )
