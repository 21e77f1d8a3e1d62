from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from torch import nn

from tests.export.tiny_torch import CLASSES, ROWS, around, exported, linear, model_of, two_input_family

pytestmark = pytest.mark.torch


def convolutions() -> nn.Module:
    """Layers whose export leaves traces of source code in other exporters."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)
    )


def answers(onnx_model: bytes, **inputs: Any) -> list[Any]:
    session = ort.InferenceSession(onnx_model, providers=["CPUExecutionProvider"])
    return list(session.run(["label", "certainty", "scores"], inputs))


@pytest.mark.parametrize("build", [linear, convolutions])
def test_two_exports_of_a_model_are_the_same_bytes(build: Any) -> None:
    assert exported(model_of(build))[2] == exported(model_of(build))[2]


def test_the_graph_is_readable_by_old_servers() -> None:
    graph = onnx.load_model_from_string(exported(model_of())[2])
    assert graph.ir_version <= 9
    assert [(entry.domain, entry.version) for entry in graph.opset_import] == [("", 17)]


def test_inputs_and_outputs_are_named_typed_and_of_any_batch_size() -> None:
    model = model_of(around(lambda layer, x, factor: layer(x) * factor), name="pair")
    graph = onnx.load_model_from_string(exported(model, two_input_family(model))[2]).graph
    tensors = {value.name: value.type.tensor_type for value in [*graph.input, *graph.output]}
    found = {
        name: (tensor.elem_type, [size.dim_param or size.dim_value for size in tensor.shape.dim])
        for name, tensor in tensors.items()
    }
    assert graph.name == "pair"
    assert found == {
        "x": (onnx.TensorProto.FLOAT, ["n", 4]),
        "factor": (onnx.TensorProto.INT32, ["n", 1]),
        "label": (onnx.TensorProto.INT64, ["n", 1]),
        "certainty": (onnx.TensorProto.FLOAT, ["n", 1]),
        "scores": (onnx.TensorProto.FLOAT, ["n", CLASSES]),
    }


def test_no_word_of_the_machine_it_was_made_on_stands_in_the_file() -> None:
    onnx_model = exported(model_of(convolutions))[2]
    graph = onnx.load_model_from_string(onnx_model)
    assert not graph.doc_string
    assert not graph.graph.doc_string
    assert not any(node.doc_string or node.metadata_props for node in graph.graph.node)
    for trace in (sys.prefix, str(Path.cwd()), str(Path.home()), ".py", "site-packages"):
        assert trace.encode() not in onnx_model


@pytest.mark.parametrize("rows", [1, 2, 3, 17, 256])
def test_a_batch_of_any_size_is_answered_row_for_row(rows: int) -> None:
    _, source, onnx_model = exported(model_of())
    label, certainty, scores = answers(onnx_model, x=ROWS[:rows])
    wanted = torch.softmax(torch.from_numpy(source.run({"x": ROWS[:rows]})), dim=1).numpy()
    assert (label.shape, certainty.shape, scores.shape) == ((rows, 1), (rows, 1), (rows, CLASSES))
    assert (label.dtype, certainty.dtype, scores.dtype) == (np.int64, np.float32, np.float32)
    np.testing.assert_allclose(scores, wanted, atol=1e-6)
    np.testing.assert_array_equal(label[:, 0], wanted.argmax(1))
    ordered = np.sort(wanted, axis=1)
    np.testing.assert_allclose(certainty[:, 0], ordered[:, -1] - ordered[:, -2], atol=1e-6)


def test_scores_of_a_half_precision_model_are_single_precision() -> None:
    model = model_of(around(lambda layer, x: layer(x).half()))
    assert answers(exported(model)[2], x=ROWS[:2])[2].dtype == np.float32


def test_exporting_leaves_the_log_level_of_pytorch_alone(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    exported(model_of())
    assert logger.level == before
    assert not [record for record in caplog.records if record.name.startswith("torch.onnx")]
