"""Whether a request fits the model it is for. Front processes and the data plane refuse alike, in the same words."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cascadeserve.errors import InvalidRequest, NotFound

if TYPE_CHECKING:
    from orchestrator.wire.tensors import Array, InferRequest, ModelMetadata, Tensor, TensorMetadata


def unknown_model(name: str, version: str = "") -> NotFound:
    """What a request for a model that is not served is answered with; as Triton says it."""
    which = f"'{name}' version {version}" if version else f"'{name}'"
    return NotFound(f"Request for unknown model: {which} is not found")


def checked_inputs(model: ModelMetadata, request: InferRequest, max_rows: int) -> list[Array]:
    """Return the tensors in the order of the model's inputs, each [n, *shape] with one n from 1 to `max_rows`."""
    specs = model.inputs
    tensors = request.inputs
    if len(specs) > 1 or len(tensors) != 1 or tensors[0].name != specs[0].name:
        tensors = _in_order(model, tensors)
    arrays = [_checked_input(model, spec, tensor) for spec, tensor in zip(specs, tensors, strict=True)]
    rows = arrays[0].shape[0]
    for spec, array in zip(specs, arrays, strict=True):
        if array.shape[0] != rows:
            raise InvalidRequest(
                f"input '{spec.name}' has {array.shape[0]} rows but '{specs[0].name}' has {rows}; they must agree"
            )
    if rows > max_rows:
        raise InvalidRequest(f"inference request batch-size must be <= {max_rows} for '{model.name}'")
    return arrays


def checked_outputs(model: ModelMetadata, request: InferRequest) -> list[str]:
    """Names of the outputs asked for; `label` where the request names none."""
    # an output that is named twice comes once, as from Triton
    names = list(dict.fromkeys(output.name for output in request.outputs)) or ["label"]
    offered = [output.name for output in model.outputs]
    for name in names:
        if name not in offered:
            raise InvalidRequest(
                f"unexpected inference output '{name}' for model '{model.name}'; it has {', '.join(offered)}"
            )
    return names


def _in_order(model: ModelMetadata, tensors: list[Tensor]) -> list[Tensor]:
    """The tensors in the order of the model's inputs, none too few and none too many."""
    specs = model.inputs
    given = {tensor.name: tensor for tensor in tensors}
    if len(given) != len(specs) or any(spec.name not in given for spec in specs):
        raise _wrong_inputs(model, list(given))
    return [given[spec.name] for spec in specs]


def _wrong_inputs(model: ModelMetadata, given: list[str]) -> InvalidRequest:
    """Begin as Triton does, then say what would be right."""
    wanted = [spec.name for spec in model.inputs]
    takes = f"it takes {', '.join(map(repr, wanted))}"
    if len(given) == len(wanted):
        unexpected = next(name for name in given if name not in wanted)
        return InvalidRequest(f"unexpected inference input '{unexpected}' for model '{model.name}'; {takes}")
    return InvalidRequest(
        f"expected {len(wanted)} inputs but got {len(given)} inputs for model '{model.name}'; {takes}"
    )


def _checked_input(model: ModelMetadata, spec: TensorMetadata, tensor: Tensor) -> Array:
    array = tensor.array
    if tensor.datatype != spec.datatype:
        raise InvalidRequest(
            f"inference input '{spec.name}' data-type is '{tensor.datatype}', but model '{model.name}' expects "
            f"'{spec.datatype}'"
        )
    fits = array.ndim == len(spec.shape) and all(
        wanted in (-1, size) for wanted, size in zip(spec.shape, array.shape, strict=True)
    )
    if not fits or array.shape[0] < 1:
        expected = ",".join(map(str, spec.shape))
        got = ",".join(map(str, array.shape))
        raise InvalidRequest(
            f"unexpected shape for input '{spec.name}' for model '{model.name}'. Expected [{expected}], got [{got}]"
        )
    return array
