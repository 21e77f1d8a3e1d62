"""Puts label, certainty and scores behind any ONNX model that classifies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, compose, parser, shape_inference

from cascadeserve.errors import UsageError
from export.graph import (
    all_names,
    copy_of,
    drop_all_but,
    in_readable_opset,
    inputs_of,
    is_checkable,
    producer_of,
    rename,
    set_ir_version,
    shape_of,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

    from export.family import Certainty, Head

_TINY = float(np.finfo(np.float32).tiny)
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)


def class_model(model: onnx.ModelProto, output_name: str | None = None) -> onnx.ModelProto:
    """Return a copy with one output, [n, classes], in an operator set that servers read.

    `output_name` says which output that is, where there are several. The others, and what only they need, are dropped.

    Raises:
        UsageError: no head could be put behind the model; the sentence says what to do.

    """
    model = in_readable_opset(model)
    drop_all_but(model.graph, _class_output(model, output_name))
    return model


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
    model = class_model(model, output_name)
    output = copy_of(model.graph.output[0])
    _refuse_other_kind(model.graph, output.name, head)
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


def answers_of(values: NDArray[Any], head: Head) -> dict[str, NDArray[Any]]:
    """What the head makes of a model's output [n, classes], worked out in double precision: the three outputs."""
    values = values.astype(np.float64)
    label = values.argmax(axis=1)[:, np.newaxis]
    scores = values
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        if not _passes_through(head):
            logits = np.log(values) if head.output == "probabilities" else values
            powers = np.exp((logits - np.take_along_axis(logits, label, axis=1)) / head.temperature)
            scores = powers / powers.sum(axis=1, keepdims=True)
        ordered = np.sort(scores, axis=1)
        if head.certainty == "margin":
            certainty = ordered[:, -1] - ordered[:, -2]
        elif head.certainty == "max_probability":
            certainty = ordered[:, -1]
        else:
            certainty = (scores * np.log(np.maximum(scores, _TINY))).sum(axis=1)
    return {"label": label, "certainty": certainty[:, np.newaxis], "scores": scores}


def _class_output(model: onnx.ModelProto, name: str | None) -> onnx.ValueInfoProto:
    """Return a copy of the output `name`, or of the only one, with the shape that can be known.

    Raises:
        UsageError: there is no such output or no telling which, it is not [n, classes], or n is fixed.

    """
    names = [value.name for value in model.graph.output]
    if name is None and len(names) != 1:
        raise UsageError(
            f"the model has the outputs {', '.join(names)}: say by output_name which one holds a number for every class"
        )
    if name is not None and name not in names:
        raise UsageError(f"the model has no output {name!r}, only {', '.join(names)}")
    output = copy_of(next(value for value in model.graph.output if name in {None, value.name}))
    tensor = output.type.tensor_type
    if not output.type.HasField("tensor_type") or tensor.elem_type not in _FLOATS:
        kind = TensorProto.DataType.Name(tensor.elem_type) if output.type.HasField("tensor_type") else "no tensor"
        raise UsageError(f"the output {output.name!r} is {kind}, but a head needs FLOAT, FLOAT16 or BFLOAT16")
    if not (shape_of(output) and isinstance(shape_of(output)[-1], int)) and is_checkable(model):
        # exporters may leave out what follows from the graph
        inferred = shape_inference.infer_shapes(model).graph.output
        tensor.CopyFrom(next(value for value in inferred if value.name == output.name).type.tensor_type)
    shape = shape_of(output)
    if len(shape) != 2 or shape[1] in {0, 1}:  # noqa: PLR2004 - [n, classes]
        found = f"[{', '.join(map(str, shape))}]" if tensor.HasField("shape") else "unknown"
        raise UsageError(
            f"the shape of the output {output.name!r} is {found}, but a head needs [n, classes] with 2 classes or more"
        )
    for what, value in [("output", output), *(("input", value) for value in inputs_of(model.graph))]:
        rows = next(iter(shape_of(value)), None)
        if isinstance(rows, int):
            raise UsageError(
                f"the {what} {value.name!r} is fixed to a batch of {rows}: export the model with a dynamic batch axis"
            )
    return output


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
    # what is given as probabilities is not known to be numbers; softmax makes a row NaN if one of its logits is
    unchecked = _passes_through(head)
    if unchecked or head.certainty == "negative_entropy":
        yield "axis = Constant <value_ints = [1]> ()"
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
