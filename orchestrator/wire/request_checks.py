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


def checked_inputs(model: ModelMetadata, request: InferRequest) -> list[Array]:
    """Return the request's tensors in the order of the model's inputs, each [n, *shape] with one n >= 1."""
    specs = model.inputs
    tensors = request.inputs
    if len(specs) > 1 or len(tensors) != 1 or tensors[0].name != specs[0].name:
        tensors = _in_order(model, tensors)
    arrays = [_checked_input(spec, tensor) for spec, tensor in zip(specs, tensors, strict=True)]
    rows = arrays[0].shape[0]
    for spec, array in zip(specs, arrays, strict=True):
        if array.shape[0] != rows:
            raise InvalidRequest(
                f"input '{spec.name}' has {array.shape[0]} rows but '{specs[0].name}' has {rows}; they must agree"
            )
    return arrays


def checked_outputs(model: ModelMetadata, request: InferRequest) -> list[str]:
    """Names of the outputs asked for; `label` where the request names none."""
    names = [output.name for output in request.outputs] or ["label"]
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
        expected = ", ".join(f"'{spec.name}'" for spec in specs)
        got = ", ".join(f"'{name}'" for name in given) or "none"
        raise InvalidRequest(f"model '{model.name}' takes the inputs {expected}, but the request has {got}")
    return [given[spec.name] for spec in specs]


def _checked_input(spec: TensorMetadata, tensor: Tensor) -> Array:
    array = tensor.array
    if tensor.datatype != spec.datatype:
        raise InvalidRequest(f"input '{spec.name}' is {spec.datatype}, but the request has {tensor.datatype}")
    fits = array.ndim == len(spec.shape) and all(
        wanted in (-1, size) for wanted, size in zip(spec.shape, array.shape, strict=True)
    )
    if not fits or array.shape[0] < 1:
        expected = ",".join(map(str, spec.shape))
        got = ",".join(map(str, array.shape))
        raise InvalidRequest(f"unexpected shape for input '{spec.name}': expected [{expected}], got [{got}]")
    return array
