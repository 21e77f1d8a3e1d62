"""Puts label, certainty and scores behind any ONNX model that classifies."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import onnx
from onnx import compose, parser

from cascadeserve.errors import UsageError
from export.onnx_graph import (
    all_names,
    class_output,
    drop_all_but,
    in_readable_opset,
    is_checkable,
    producer_of,
    rename,
    set_ir_version,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

Certainty = Literal["margin", "max_probability", "negative_entropy"]
Output = Literal["logits", "probabilities"]
_TINY, _HUGE = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)


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


def add_head(model: onnx.ModelProto, head: Head, *, output_name: str | None = None) -> onnx.ModelProto:
    """Return `model` with the outputs label INT64 [n, 1], certainty FP32 [n, 1] and, if kept, scores FP32 [n, classes].

    `model` has an output [n, classes], FP32, FP16 or BF16; `output_name` says which where there are several. Its other
    outputs, and what only they need, are dropped; its inputs and everything else stay. The label is the class of the
    largest value as the model gives it, the first of several: neither the temperature nor the rounding of softmax can
    change it. A row with a value that is no number has the certainty NaN.

    Margin and largest probability of logits are the same to the last bit in every batch. On the CPU, ONNX Runtime's
    sums and logarithms, hence entropies and all from probabilities with a temperature, differ by up to about 1e-7 with
    a row's place in its batch, whatever else the batch holds.

    Raises:
        UsageError: the model cannot be given this head; the sentence says what to do.

    """
    model = in_readable_opset(model)
    output = class_output(model, output_name)
    _refuse_other_kind(model.graph, output.name, head)
    drop_all_but(model.graph, output)
    graph = _head_graph(head)
    _make_room(model.graph, output, [value.name for value in graph.output])
    prefix = "head/"
    while any(name.startswith(prefix) for name in all_names(model.graph)):
        prefix = f"_{prefix}"
    graph = compose.add_prefix_graph(graph, prefix, rename_outputs=False)
    # Not merge_models: it forgets who made the model, and checks it in a form that holds no more than 2 GB.
    merged = compose.merge_graphs(
        model.graph,
        graph,
        [(output.name, graph.input[0].name)],
        name=model.graph.name,
        doc_string=model.graph.doc_string,
    )
    rows, classes = output.type.tensor_type.shape.dim
    for value in merged.output:
        value.type.tensor_type.shape.dim[0].CopyFrom(rows)
        if value.name == "scores":
            value.type.tensor_type.shape.dim[1].CopyFrom(classes)
    model.graph.CopyFrom(merged)
    set_ir_version(model)
    if is_checkable(model):
        onnx.checker.check_model(model)
    return model


def _refuse_other_kind(graph: onnx.GraphProto, output_name: str, head: Head) -> None:
    """Softmax of softmax still gives probabilities and the same label: nothing later would show the mistake."""
    kind = {"Softmax": "probabilities", "LogSoftmax": "logits"}.get(producer_of(graph, output_name))
    if kind is not None and kind != head.output:
        what = "probabilities" if kind == "probabilities" else "log-probabilities, which are logits"
        raise UsageError(f"the output {output_name!r} holds {what}: ask for a head with output={kind!r}")


def _make_room(graph: onnx.GraphProto, output: onnx.ValueInfoProto, taken: list[str]) -> None:
    """Rename values of the model that have the name of an output of the head, such as the logits themselves."""
    if clash := {value.name for value in graph.input} & set(taken):
        raise UsageError(
            f"the input {min(clash)!r} has the name of an output of the head; give it another name in the model"
        )
    present = all_names(graph)
    new_names = {}
    for name in taken:
        new_name = f"source/{name}"
        while new_name in present:
            new_name = f"_{new_name}"
        new_names[name] = new_name
    rename(graph, new_names)
    output.name = new_names.get(output.name, output.name)


def _head_graph(head: Head) -> onnx.GraphProto:
    outputs = "int64[n, 1] label, float[n, 1] certainty" + ", float[n, classes] scores" * head.keep_scores
    nodes = "\n".join(_nodes(head))
    return parser.parse_graph(f"head (float[n, classes] source) => ({outputs}) {{ {nodes} }}")


def _nodes(head: Head) -> Iterator[str]:
    """Lines of ONNX's text form, the same for all operator sets from 13 on.

    ONNX Runtime runs each of these operators on GPUs, so that nothing but the outputs leaves the device. ArgMax it does
    not: from operator set 12 on (its issue 16287) that runs on the CPU, after all classes were copied there.
    """
    yield "values = Cast <to = 1> (source)"
    # of equal values, TopK has the one with the lowest index first
    yield f"k = Constant <value_ints = [{2 if head.certainty == 'margin' else 1}]> ()"
    yield "largest, index = TopK <axis = 1> (values, k)"
    if head.certainty == "margin":
        yield "ones = Constant <value_ints = [1, 1]> ()"
        yield "label, second = Split <axis = 1> (index, ones)"
    else:
        yield "label = Identity (index)"
    yield from _score_nodes(head)
    yield "axis = Constant <value_ints = [1]> ()"
    # what is given as probabilities is not known to be numbers; softmax makes a row NaN if one of its logits is
    unchecked = _passes_through(head)
    yield from _certainty_nodes(head.certainty, "certain" if unchecked else "certainty")
    if unchecked:
        yield "zero = Constant <value_float = 0.0> ()"
        yield "total = ReduceSum <keepdims = 1> (scores, axis)"
        yield "nothing = Mul (total, zero)"
        yield "certainty = Add (certain, nothing)"


def _passes_through(head: Head) -> bool:
    return head.output == "probabilities" and head.temperature == 1.0


def _score_nodes(head: Head) -> Iterator[str]:
    """`scores` from `values` and `label`."""
    if _passes_through(head):
        yield "scores = Identity (values)"
        return
    yield f"logits = {'Log' if head.output == 'probabilities' else 'Identity'} (values)"
    if head.temperature == 1.0:
        yield "scores = Softmax <axis = 1> (logits)"
        return
    # Distances to the largest first: divided as they are, logits of 10,000 would lose what softmax sees of them.
    yield "peak = GatherElements <axis = 1> (logits, label)"
    yield "distance = Sub (logits, peak)"
    yield f"temperature = Constant <value_float = {float(head.temperature)!r}> ()"
    yield "scaled = Div (distance, temperature)"
    yield "scores = Softmax <axis = 1> (scaled)"


def _certainty_nodes(kind: Certainty, name: str) -> Iterator[str]:
    """`name` from `scores` and `index`, which holds the best class, for the margin the best two."""
    if kind == "max_probability":
        yield f"{name} = GatherElements <axis = 1> (scores, index)"
    elif kind == "margin":
        yield "best = GatherElements <axis = 1> (scores, index)"
        yield "best_score, second_score = Split <axis = 1> (best, ones)"
        yield f"{name} = Sub (best_score, second_score)"
    else:
        # p log p is 0 where p is: a floor keeps the logarithm finite there and is too low to be seen elsewhere
        yield f"floor = Constant <value_float = {_TINY!r}> ()"
        yield "floored = Max (scores, floor)"
        yield "logarithm = Log (floored)"
        yield "terms = Mul (scores, logarithm)"
        yield f"{name} = ReduceSum <keepdims = 1> (terms, axis)"
