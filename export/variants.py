"""Faster forms of an exported model that answer a little differently: INT8, FP16, and a graph optimised ahead.

Each is served as a model of its own, with its own records and profile, so that the planner decides what it is good for.
They are made of a model before it gets its head, and the head is then that of the float model. The last layers decide
the certainties and cost next to nothing, so they stay in float; see each function for how much of it.
"""

from __future__ import annotations

import logging
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import onnx

from cascadeserve.errors import ExportRefused
from export.family import NUM_QUANTISATION_ROWS
from export.graph import Cut, all_nodes, copy_of, name_nodes, replace, tidy
from export.sources import batches

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # must be set before the import

import onnxruntime as ort
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quant_pre_process,
    quantize_static,
)
from onnxruntime.transformers.float16 import convert_float_to_float16

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray

    from export.family import Family, FamilyModel

    Rows = dict[str, NDArray[np.generic]]

_BATCH = 32
# Operators that look at whole tensors for their scale. What reads integers (MatMulInteger, ConvInteger,
# MatMulIntegerToFloat) looks at nothing: it is as good as what feeds it, which is one of these or a fixed scale.
_DYNAMIC = frozenset({"DynamicQuantizeLinear", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM"})


def make_variant(family: Family, model: FamilyModel, onnx_model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the form of a model with one output, [n, classes], that `model.variant` asks for."""
    if model.variant == "int8":
        return quantize_static_int8(onnx_model, family.checked_quantisation_rows(NUM_QUANTISATION_ROWS))
    if model.variant == "fp16":
        return to_float16(onnx_model)
    if model.variant == "optimised":
        return optimize(onnx_model)
    # TensorRT takes the float model and is asked for in its config: export/tensorrt.py
    return onnx_model


class _Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime carries no types
    """Hands rows out in batches."""

    def __init__(self, rows: Rows) -> None:
        self._batches = batches(rows, _BATCH)

    def get_next(self) -> Rows | None:
        return next(self._batches, None)


def quantize_static_int8(source: onnx.ModelProto, quantisation_rows: Rows) -> onnx.ModelProto:
    """Weights and activations in 8 bits, with the activations' scales fixed by `quantisation_rows` once and for all.

    A scale that is fixed knows nothing of the batch, so a row's answer depends on that row alone. The last layer
    stays in float: on an 8-bit grid of logits a model of two classes would know 511 certainties at most.

    Raises:
        ExportRefused: nothing is left to quantise.

    """
    with tempfile.TemporaryDirectory() as folder:
        prepared, quantised = Path(folder, "prepared.onnx"), Path(folder, "quantised.onnx")
        # Folds batch norms and constants into weights, which could not be quantised apart; without its symbolic shape
        # inference, which fails on graphs that need none.
        quant_pre_process(copy_of(source), prepared, skip_symbolic_shape=True)
        model = onnx.load(prepared)
        name_nodes(model.graph)
        cut = Cut(model.graph)
        kept = [*cut.last_layer(model.graph.initializer), *cut.tail]
        _quietly(
            quantize_static,
            model,
            quantised,
            _Reader(quantisation_rows),
            # Q and DQ around plain operators: what ONNX Runtime fuses on CPU and TensorRT reads. It needs opset 13.
            quant_format=QuantFormat.QDQ,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            # Weights in 7 bits: processors without VNNI add pairs of 8-bit products in 16 bits, which saturate. That
            # cost the digits ResNet ten times the error (0.30 instead of 0.03 in its worst score), and a certificate
            # from a processor that saturates would not hold on one that does not.
            reduce_range=True,
            # Measured on the digits ResNet with 128 rows, on 3,600 of test (float 98.42 %): MinMax and Entropy 98.44 %
            # with float's label on 99.97 % of rows, Percentile 98.42 and 99.94 % (at 99.999), 98.50 and 99.86 % (at
            # 99.99). MinMax is as good as any, and the others keep every activation of every row in memory.
            calibrate_method=CalibrationMethod.MinMax,
            nodes_to_exclude=[node.name for node in kept],
        )
        result = onnx.load(quantised)
    if not any(node.op_type == "QuantizeLinear" for node in result.graph.node):
        raise ExportRefused(
            f"{source.graph.name}: INT8 leaves the last layer in float and there is none before it to quantise; "
            "drop this variant"
        )
    return tidy(result, source)


def _quietly(function: Callable[..., object], *arguments: object, **options: object) -> None:
    """Call it without what it warns of: weights that have no channels, which it then quantises as a whole."""
    logger = logging.getLogger()
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        function(*arguments, **options)
    finally:
        logger.setLevel(level)


def to_float16(source: onnx.ModelProto) -> onnx.ModelProto:
    """Weights and operators in FP16 up to the logits, everything from the logits on in FP32.

    Scores in FP16 would differ by steps of 0.0005 near 1, where most rows are, and tie their certainties.
    """
    model = copy_of(source)
    name_nodes(model.graph)
    cut = Cut(model.graph)
    # The converter rounds what it gives back to FP16, FP32 outputs too, and then casts. So it sees the body alone, as
    # a model whose output is the logits.
    body = copy_of(model)
    replace(body.graph.node, cut.body)
    replace(body.graph.output, [_value(model, cut.logits)])
    converted = convert_float_to_float16(body, keep_io_types=True)
    replace(model.graph.node, [*converted.graph.node, *cut.tail])
    replace(model.graph.initializer, converted.graph.initializer)
    return tidy(model, source)


def _value(model: onnx.ModelProto, name: str) -> onnx.ValueInfoProto:
    """Type of a tensor."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    for value in (*graph.output, *graph.value_info):
        if value.name == name:
            return value
    raise ExportRefused(f"{graph.name}: the type of its tensor {name!r} cannot be inferred; drop this variant")


def refuse_dynamic_quantisation(onnx_model: onnx.ModelProto, name: str) -> None:
    """Refuse a model that chooses a scale when it runs.

    Raises:
        ExportRefused: naming the operator, why it is refused, and what to do.

    """
    for node in all_nodes(onnx_model):
        if node.op_type in _DYNAMIC:
            raise ExportRefused(
                f"{name}: holds {node.op_type}, which takes its scale over the whole batch, so that a row's answer "
                "depends on its batch mates and no certificate would hold; use static INT8 with quantisation rows "
                '(variant="int8")'
            )


def optimize(source: onnx.ModelProto) -> onnx.ModelProto:
    """Do ONNX Runtime's basic graph optimisations ahead: constants folded, nodes fused, all in standard operators.

    Not the extended ones, which fuse into operators of com.microsoft that belong to this version of ONNX Runtime and
    the device they were made for, and not those of layout, which belong to the processor. A server does both itself
    when it loads the model.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "optimised.onnx")
        options.optimized_model_filepath = str(path)
        ort.InferenceSession(source.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return tidy(onnx.load(path), source)
