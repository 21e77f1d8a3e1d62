"""What the variants need to know of an ONNX graph: where its head begins, and how to write it back tidily."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeVar

import onnx
from google.protobuf.message import Message

from cascadeserve.errors import ExportRefused

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, MutableSequence

Item = TypeVar("Item", bound=Message)
# What stands between logits and scores, each with one tensor in and one out.
_FROM_LOGITS = frozenset({"Softmax", "Sigmoid", "Cast", "Identity"})


class Cut:
    """A graph in two: the body, which leads to the logits, and the head, which makes the outputs of them.

    The cut is by what a node is needed for, not by names, so that any certainty computed in the graph is in the head.
    """

    def __init__(self, graph: onnx.GraphProto) -> None:
        """Find the logits: what `scores` is the softmax of.

        Raises:
            ExportRefused: no node makes an output `scores`.

        """
        self._producers = {name: i for i, node in enumerate(graph.node) for name in node.output}
        self._nodes = list(graph.node)
        if "scores" not in self._producers:
            raise ExportRefused(f"{graph.name or 'the model'}: no node of its graph makes an output named scores")
        self.logits = "scores"
        while (made_by := self._made_by(self.logits)) is not None and made_by.op_type in _FROM_LOGITS:
            self.logits = made_by.input[0]
        in_body = self._leading_to(self.logits)
        self.body = [node for i, node in enumerate(graph.node) if i in in_body]
        self.head = [node for i, node in enumerate(graph.node) if i not in in_body]

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
    return nested([*model.graph.node, *(node for function in model.functions for node in function.node)])


def nested(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Nodes and those of their subgraphs, however deep."""
    for node in nodes:
        yield node
        for graph in _subgraphs(node):
            yield from nested(graph.node)


def name_nodes(graph: onnx.GraphProto) -> None:
    """Give every node a name of its own: the tools of ONNX Runtime know nodes by name."""
    taken: set[str] = set()
    for i, node in enumerate(graph.node):
        if not node.name or node.name in taken:
            node.name = f"node_{i}_{node.op_type}"
        taken.add(node.name)


def tidy(model: onnx.ModelProto, source: onnx.ModelProto) -> bytes:
    """Serialised `model`, valid and the same bytes for the same content, for servers that could read `source`."""
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
    return model.SerializeToString(deterministic=True)


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


def _subgraphs(node: onnx.NodeProto) -> list[onnx.GraphProto]:
    return [graph for attribute in node.attribute for graph in (attribute.g, *attribute.graphs) if graph.node]


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
