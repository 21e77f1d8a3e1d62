"""Reads and changes ONNX graphs: which operator sets servers read, what needs what, and how to write a graph tidily."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import onnx
from google.protobuf.message import Message
from onnx import TensorProto, external_data_helper, helper, version_converter

from cascadeserve.errors import ExportRefused, UsageError
from export.onnx_versions import IR_VERSION, NEWEST_OPSET, OPSET

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, MutableSequence

Item = TypeVar("Item", bound=Message)

# From this one on, the operators of the heads mean the same in all.
OLDEST_OPSET = 13
_WEIGHTS_NEED_NOT_BE_INPUTS = 4
_NEWEST_TYPE_OF_IR_9 = TensorProto.FLOAT8E5M2FNUZ
# What stands between logits and scores, each with one tensor in and one out.
_FROM_LOGITS = frozenset({"Softmax", "Sigmoid", "Cast", "Identity"})


# --- what servers read


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


def set_ir_version(model: onnx.ModelProto) -> None:
    """Bring the IR version to what the servers read, unless the model holds what that version does not know."""
    tensors = [
        *(tensor for part in _parts(model.graph) for tensor in part.initializer),
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


# --- what is in a graph


def inputs_of(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    """Inputs that a caller must give: models of old IR versions list their weights too."""
    weights = {tensor.name for tensor in graph.initializer}
    return [value for value in graph.input if value.name not in weights]


def shape_of(value: onnx.ValueInfoProto) -> list[int | str]:
    """Sizes, and symbols or '?' for those that are open."""
    sizes = value.type.tensor_type.shape.dim
    return [size.dim_value if size.HasField("dim_value") else (size.dim_param or "?") for size in sizes]


def producer_of(graph: onnx.GraphProto, name: str) -> str:
    """Operator that made a value, which may have been copied or cast since; '' for an input or a weight."""
    producers = {output: node for node in graph.node for output in node.output}
    while name in producers and producers[name].op_type in {"Cast", "Identity"}:
        name = producers[name].input[0]
    return producers[name].op_type if name in producers else ""


def read_by(node: onnx.NodeProto) -> set[str]:
    """Names that a node reads, those that its subgraphs capture among them."""
    names = set(node.input)
    for graph in _subgraphs(node):
        made = {name for inner in graph.node for name in inner.output}
        made |= {value.name for value in graph.input} | {tensor.name for tensor in graph.initializer}
        names |= {name for inner in graph.node for name in read_by(inner)} - made
        names |= {value.name for value in graph.output} - made
    return names - {""}


def all_nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Every node of the graph, of its subgraphs and of the functions that the model defines."""
    for part in _parts(model.graph):
        yield from part.node
    for function in model.functions:
        for node in function.node:
            yield node
            for graph in _subgraphs(node):
                yield from (inner for part in _parts(graph) for inner in part.node)


def all_names(graph: onnx.GraphProto) -> set[str]:
    """Names of nodes and values, in branches and loop bodies too."""
    names = set()
    for part in _parts(graph):
        names |= {named.name for named in (*part.node, *_named_values(part))}
        names |= {name for node in part.node for name in (*node.input, *node.output)}
    return names


def _subgraphs(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    return [
        graph
        for attribute in node.attribute
        for graph in (*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs)
    ]


def _parts(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    """Yield the graph and the branches and loop bodies in it, however deep."""
    yield graph
    for node in graph.node:
        for inner in _subgraphs(node):
            yield from _parts(inner)


def _named_values(graph: onnx.GraphProto) -> Iterator[onnx.ValueInfoProto | onnx.TensorProto]:
    yield from graph.input
    yield from graph.output
    yield from graph.value_info
    yield from graph.initializer
    yield from (tensor.values for tensor in graph.sparse_initializer)


class Cut:
    """A graph with one output in two: the body, which leads to the logits, and the tail, which makes scores of them.

    The tail is empty where the model gives logits. The cut is by what a node is needed for, not by names.
    """

    def __init__(self, graph: onnx.GraphProto) -> None:
        """Find the logits: what the output is the softmax of."""
        self._producers = {name: i for i, node in enumerate(graph.node) for name in node.output}
        self._nodes = list(graph.node)
        self.logits = graph.output[0].name
        while (made_by := self._made_by(self.logits)) is not None and made_by.op_type in _FROM_LOGITS:
            self.logits = made_by.input[0]
        in_body = self._leading_to(self.logits)
        self.body = [node for i, node in enumerate(graph.node) if i in in_body]
        self.tail = [node for i, node in enumerate(graph.node) if i not in in_body]

    def last_layer(self, weights: Iterable[onnx.TensorProto]) -> list[onnx.NodeProto]:
        """Nodes from the last ones that read a matrix or kernel among `weights` to the logits, in the graph's order."""
        matrices = {tensor.name for tensor in weights if len(tensor.dims) > 1}
        found = self._leading_to(self.logits, stop_at=matrices)
        return [self._nodes[i] for i in sorted(found)]

    def _made_by(self, name: str) -> onnx.NodeProto | None:
        index = self._producers.get(name)
        return None if index is None else self._nodes[index]

    def _leading_to(self, name: str, stop_at: Iterable[str] = ()) -> set[int]:
        found: set[int] = set()
        waiting = [name]
        while waiting:
            index = self._producers.get(waiting.pop())
            if index is None or index in found:
                continue
            found.add(index)
            names = read_by(self._nodes[index])
            if names.isdisjoint(stop_at):
                waiting.extend(names)
        return found


# --- changing a graph


def drop_all_but(graph: onnx.GraphProto, output: onnx.ValueInfoProto) -> None:
    """Make `output` the only one; drop nodes and weights that it does not need, and weights from the inputs.

    onnx.utils.Extractor would lose what branches and loop bodies take from around them.
    """
    needed = {output.name}
    for i in reversed(range(len(graph.node))):  # a node comes after all that it takes
        if needed.isdisjoint(filter(None, graph.node[i].output)):
            del graph.node[i]
        else:
            needed |= read_by(graph.node[i])
    inputs = {value.name for value in inputs_of(graph)}
    _keep(graph.input, lambda value: value.name in inputs)
    _keep(graph.initializer, lambda tensor: tensor.name in needed)
    _keep(graph.sparse_initializer, lambda tensor: tensor.values.name in needed)
    _keep(graph.value_info, lambda value: value.name in needed)
    replace(graph.output, [output])


def rename(graph: onnx.GraphProto, new_names: dict[str, str]) -> None:
    """Rename values, in branches and loop bodies too, where no other value may have the name of one outside."""
    for part in _parts(graph):
        for named in _named_values(part):
            named.name = new_names.get(named.name, named.name)
        for node in part.node:
            node.input[:] = [new_names.get(name, name) for name in node.input]
            node.output[:] = [new_names.get(name, name) for name in node.output]


def name_nodes(graph: onnx.GraphProto) -> None:
    """Give every node a name of its own: the tools of ONNX Runtime know nodes by name."""
    taken: set[str] = set()
    for i, node in enumerate(graph.node):
        if not node.name or node.name in taken:
            node.name = f"node_{i}_{node.op_type}"
        taken.add(node.name)


def tidy(model: onnx.ModelProto, source: onnx.ModelProto) -> onnx.ModelProto:
    """Make `model` valid and the same for the same content, for servers that could read `source`; returns it."""
    # Tools write the newest IR version and the opsets of every domain they know, which an older server refuses unread.
    model.ir_version = source.ir_version
    model.graph.name = source.graph.name
    model.graph.doc_string = model.doc_string = ""
    domains = {node.domain for node in all_nodes(model)} | {""}
    if new := sorted(domains - {opset.domain for opset in source.opset_import} - {""}):
        raise ExportRefused(f"{source.graph.name}: the tool that made this variant put in operators of {new[0]}")
    kept = [opset for opset in model.opset_import if opset.domain in domains]
    replace(model.opset_import, sorted(kept, key=lambda opset: opset.domain))
    del model.metadata_props[:]
    del model.graph.value_info[:]
    for node in model.graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    read = {name for node in model.graph.node for name in read_by(node)} | {value.name for value in model.graph.output}
    tensors = [tensor for tensor in model.graph.initializer if tensor.name in read]
    replace(model.graph.initializer, sorted(tensors, key=lambda tensor: tensor.name))
    replace(model.graph.node, _in_order(model.graph))
    onnx.checker.check_model(model, full_check=True)
    return model


def _in_order(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Nodes with every producer before its consumers, otherwise in the order they had."""
    producers = {name: i for i, node in enumerate(graph.node) for name in node.output}
    needs = [{producers[name] for name in read_by(node) if name in producers} for node in graph.node]
    placed: set[int] = set()
    ordered: list[int] = []
    waiting = list(range(len(needs)))
    while waiting:  # one pass for a graph that is in order
        for i in waiting:
            if needs[i] <= placed:
                placed.add(i)
                ordered.append(i)
        if len(left := [i for i in waiting if i not in placed]) == len(waiting):
            raise ExportRefused(f"{graph.name or 'the model'}: its graph has a cycle")
        waiting = left
    return [graph.node[i] for i in ordered]


def _keep(values: MutableSequence[Item], wanted: Callable[[Item], bool]) -> None:
    for i in reversed(range(len(values))):  # in place: a copy of the weights may not fit into memory
        if not wanted(values[i]):
            del values[i]


def replace(field: MutableSequence[Item], values: Iterable[Item]) -> None:
    """Set a repeated field; `values` may be taken from it."""
    copies = [copy_of(value) for value in values]
    del field[:]
    field.extend(copies)


def copy_of(value: Item) -> Item:
    """A message that no longer changes with the one it was taken from."""
    copy = type(value)()
    copy.CopyFrom(value)
    return copy
