"""Brings any ONNX model that classifies into the form that a head is put behind: its output found, all else dropped."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import onnx
from onnx import TensorProto, external_data_helper, helper, shape_inference, version_converter

from cascadeserve.errors import UsageError
from export.graph import all_nodes, copy_of
from export.onnx_versions import IR_VERSION, NEWEST_OPSET, OPSET

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, MutableSequence

T = TypeVar("T")

# From this one on, the operators of the heads mean the same in all.
OLDEST_OPSET = 13
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
_WEIGHTS_NEED_NOT_BE_INPUTS = 4
_NEWEST_TYPE_OF_IR_9 = TensorProto.FLOAT8E5M2FNUZ


def in_readable_opset(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy that uses operators from OLDEST_OPSET to NEWEST_OPSET; only an older model is converted.

    Raises:
        UsageError: the model is too new for the servers, or too old to be converted.

    """
    opset = max((entry.version for entry in model.opset_import if entry.domain in {"", "ai.onnx"}), default=0)
    if opset > NEWEST_OPSET:
        raise UsageError(
            f"the model uses operator set {opset}, but Triton's ONNX Runtime is only known to read up to "
            f"{NEWEST_OPSET}: export it with opset_version={OPSET}"
        )
    if 0 < opset < OLDEST_OPSET:
        try:
            return version_converter.convert_version(model, OLDEST_OPSET)
        except Exception as error:
            # its messages are the assertions of its source code
            raise UsageError(
                f"the model uses operator set {opset}, which onnx cannot convert to {OLDEST_OPSET}: export it "
                f"again with opset_version={OPSET}"
            ) from error
    copy = copy_of(model)
    if opset == 0:
        # made of operators of other domains only
        copy.opset_import.append(helper.make_opsetid("", OPSET))
    return copy


def class_output(model: onnx.ModelProto, name: str | None) -> onnx.ValueInfoProto:
    """Return a copy of the output `name`, or of the only one, with the shape that can be known.

    Raises:
        UsageError: there is no such output or no telling which, it is not [n, classes], or n is fixed.

    """
    names = [value.name for value in model.graph.output]
    if name is None and len(names) != 1:
        raise UsageError(f"the model has the outputs {', '.join(names)}: say which one holds a number for every class")
    if name is not None and name not in names:
        raise UsageError(f"the model has no output {name!r}, only {', '.join(names)}")
    output = copy_of(next(value for value in model.graph.output if name in {None, value.name}))
    tensor = output.type.tensor_type
    if not output.type.HasField("tensor_type") or tensor.elem_type not in FLOATS:
        kind = TensorProto.DataType.Name(tensor.elem_type) if output.type.HasField("tensor_type") else "no tensor"
        raise UsageError(f"the output {output.name!r} is {kind}, but a head needs FLOAT, FLOAT16 or BFLOAT16")
    if not (_shape(tensor) and isinstance(_shape(tensor)[-1], int)) and is_checkable(model):
        # exporters may leave out what follows from the graph
        inferred = shape_inference.infer_shapes(model).graph.output
        tensor.CopyFrom(next(value for value in inferred if value.name == output.name).type.tensor_type)
    shape = _shape(tensor)
    if len(shape) != 2 or shape[1] in {0, 1}:  # noqa: PLR2004 - [n, classes]
        found = f"[{', '.join(map(str, shape))}]" if tensor.HasField("shape") else "unknown"
        raise UsageError(
            f"the shape of the output {output.name!r} is {found}, but a head needs [n, classes] with 2 classes or more"
        )
    for what, value in [("output", output), *(("input", value) for value in inputs_of(model.graph))]:
        rows = next(iter(_shape(value.type.tensor_type)), None)
        if isinstance(rows, int):
            raise UsageError(
                f"the {what} {value.name!r} is fixed to a batch of {rows}: export the model with a dynamic batch axis"
            )
    return output


def inputs_of(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    """Inputs that a caller must give: models of old IR versions list their weights too."""
    weights = {tensor.name for tensor in graph.initializer}
    return [value for value in graph.input if value.name not in weights]


def drop_all_but(graph: onnx.GraphProto, output: onnx.ValueInfoProto) -> None:
    """Make `output` the only one; drop nodes and weights that it does not need, and weights from the inputs.

    onnx.utils.Extractor would lose what branches and loop bodies take from around them.
    """
    needed = {output.name}
    for i in reversed(range(len(graph.node))):  # a node comes after all that it takes
        node = graph.node[i]
        if needed.isdisjoint(filter(None, node.output)):
            del graph.node[i]
            continue
        needed.update(node.input)
        for inner in _graphs_in(node):
            needed.update(name for inner_node in inner.node for name in inner_node.input)
            needed.update(value.name for value in inner.output)
    inputs = {value.name for value in inputs_of(graph)}
    _keep(graph.input, lambda value: value.name in inputs)
    _keep(graph.initializer, lambda tensor: tensor.name in needed)
    _keep(graph.sparse_initializer, lambda tensor: tensor.values.name in needed)
    _keep(graph.value_info, lambda value: value.name in needed)
    del graph.output[:]
    graph.output.append(output)


def producer_of(graph: onnx.GraphProto, name: str) -> str:
    """Operator that made a value, which may have been copied or cast since; '' for an input or a weight."""
    producers = {output: node for node in graph.node for output in node.output}
    while name in producers and producers[name].op_type in {"Cast", "Identity"}:
        name = producers[name].input[0]
    return producers[name].op_type if name in producers else ""


def all_names(graph: onnx.GraphProto) -> set[str]:
    """Names of nodes and values, in branches and loop bodies too."""
    names = set()
    for part in _with_inner(graph):
        names |= {named.name for named in (*part.node, *_named_values(part))}
        names |= {name for node in part.node for name in (*node.input, *node.output)}
    return names


def rename(graph: onnx.GraphProto, new_names: dict[str, str]) -> None:
    """Rename values, in branches and loop bodies too, where no other value may have the name of one outside."""
    for part in _with_inner(graph):
        for named in _named_values(part):
            named.name = new_names.get(named.name, named.name)
        for node in part.node:
            node.input[:] = [new_names.get(name, name) for name in node.input]
            node.output[:] = [new_names.get(name, name) for name in node.output]


def set_ir_version(model: onnx.ModelProto) -> None:
    """Bring the IR version to what the servers read, unless the model holds what that version does not know."""
    tensors = [
        *(tensor for part in _with_inner(model.graph) for tensor in part.initializer),
        *(attribute.t for node in all_nodes(model) for attribute in node.attribute if attribute.HasField("t")),
    ]
    newer = any(tensor.data_type > _NEWEST_TYPE_OF_IR_9 for tensor in tensors)
    if not (newer or any(function.overload for function in model.functions)):
        model.ir_version = min(model.ir_version, IR_VERSION)
    # below it, weights would have to be listed among the inputs
    model.ir_version = max(model.ir_version, _WEIGHTS_NEED_NOT_BE_INPUTS)


def is_checkable(model: onnx.ModelProto) -> bool:
    """Whether ONNX's own checks can read the model, which they do in one message with all weights."""
    weights = model.graph.initializer
    # half of the largest message leaves room for everything that is not a weight
    return (
        not any(external_data_helper.uses_external_data(tensor) for tensor in weights)
        and sum(tensor.ByteSize() for tensor in weights) < onnx.checker.MAXIMUM_PROTOBUF // 2
    )


def _shape(tensor: onnx.TypeProto.Tensor) -> list[int | str]:
    """Sizes, and symbols or '?' for those that are open."""
    return [size.dim_value if size.HasField("dim_value") else (size.dim_param or "?") for size in tensor.shape.dim]


def _graphs_in(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    for attribute in node.attribute:
        for graph in [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]:
            yield from _with_inner(graph)


def _with_inner(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        yield from _graphs_in(node)


def _named_values(graph: onnx.GraphProto) -> Iterator[onnx.ValueInfoProto | onnx.TensorProto]:
    yield from graph.input
    yield from graph.output
    yield from graph.value_info
    yield from graph.initializer
    yield from (tensor.values for tensor in graph.sparse_initializer)


def _keep(values: MutableSequence[T], wanted: Callable[[T], bool]) -> None:
    for i in reversed(range(len(values))):
        if not wanted(values[i]):
            del values[i]
