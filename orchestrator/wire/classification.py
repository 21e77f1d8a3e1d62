"""The classification extension: an output as its largest values, each as the text `value:class`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from cascadeserve.errors import InvalidRequest
from orchestrator.wire.datatypes import bytes_array
from orchestrator.wire.tensors import Tensor

if TYPE_CHECKING:
    from orchestrator.wire.tensors import InferRequest, Parameter

PARAMETER = "classification"


def num_classes(name: str, value: Parameter | None) -> int:
    """Read the parameter of a requested output: how many classes are wanted, 0 for the values themselves."""
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise InvalidRequest(f"the parameter 'classification' of output '{name}' must be a number of classes")
    return value


def classified(request: InferRequest, outputs: list[Tensor]) -> list[Tensor]:
    """Put classes in the place of those outputs that were asked for so."""
    wanted = {output.name: output.num_classes for output in request.outputs if output.num_classes}
    if not wanted:
        return outputs
    return [_classes(each, wanted[each.name]) if each.name in wanted else each for each in outputs]


def _classes(tensor: Tensor, count: int) -> Tensor:
    array = np.atleast_1d(tensor.array)
    if tensor.datatype in ("BYTES", "BF16", "BOOL"):
        raise InvalidRequest(
            f"class result not available for output '{tensor.name}' due to unsupported type {tensor.datatype}"
        )
    rows = array.reshape(len(array), math.prod(array.shape[1:]))
    # the first of equals first
    best = np.argsort(-rows.astype(np.float64), axis=1, kind="stable")[:, :count]
    form = "%f:%d" if array.dtype.kind == "f" else "%d:%d"
    texts = [
        (form % (value, index)).encode()
        for row, indices in zip(rows.tolist(), best.tolist(), strict=True)
        for value, index in ((row[index], index) for index in indices)
    ]
    return Tensor(tensor.name, "BYTES", bytes_array(texts).reshape(best.shape))
