"""Every KServe datatype from a stock client through the cascade to a real Triton and back: one family per datatype."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
import tritonclient.grpc
import tritonclient.http
from onnx import TensorProto, helper

from tests.e2e.conftest import tiny_stack
from tests.fakes.servers import Stack, running

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.triton, pytest.mark.timeout(180)]

# datatype -> (numpy, ONNX, Triton's config)
TYPES: dict[str, tuple[Any, int, str]] = {
    "BOOL": (np.bool_, TensorProto.BOOL, "TYPE_BOOL"),
    "UINT8": (np.uint8, TensorProto.UINT8, "TYPE_UINT8"),
    "UINT16": (np.uint16, TensorProto.UINT16, "TYPE_UINT16"),
    "UINT32": (np.uint32, TensorProto.UINT32, "TYPE_UINT32"),
    "UINT64": (np.uint64, TensorProto.UINT64, "TYPE_UINT64"),
    "INT8": (np.int8, TensorProto.INT8, "TYPE_INT8"),
    "INT16": (np.int16, TensorProto.INT16, "TYPE_INT16"),
    "INT32": (np.int32, TensorProto.INT32, "TYPE_INT32"),
    "INT64": (np.int64, TensorProto.INT64, "TYPE_INT64"),
    "FP16": (np.float16, TensorProto.FLOAT16, "TYPE_FP16"),
    "FP32": (np.float32, TensorProto.FLOAT, "TYPE_FP32"),
    "FP64": (np.float64, TensorProto.DOUBLE, "TYPE_FP64"),
    "BYTES": (np.object_, TensorProto.STRING, "TYPE_STRING"),
}
WORDS = ["", "zwei", "drei\n", "vier \u00fc"]
# FP16 does not travel as JSON, in Triton neither
JSON_TYPES = [name for name in TYPES if name != "FP16"]


def write_model(repository: Path, name: str, datatype: str) -> None:
    """label = the number in column 0 (BYTES: its index in WORDS), certainty = 1, scores = both columns."""
    _, onnx_type, triton_type = TYPES[datatype]
    if datatype == "BYTES":
        first = helper.make_node(
            "LabelEncoder", ["x"], ["numbers"], domain="ai.onnx.ml",
            keys_strings=WORDS, values_floats=[float(i) for i in range(len(WORDS))], default_float=-1.0,
        )  # fmt: skip
    else:
        first = helper.make_node("Cast", ["x"], ["numbers"], to=TensorProto.FLOAT)
    graph = helper.make_graph(
        [
            first,
            helper.make_node("Gather", ["numbers", "zero"], ["column"], axis=1),
            helper.make_node("Cast", ["column"], ["label"], to=TensorProto.INT64),
            helper.make_node("Mul", ["column", "nought"], ["nothing"]),
            helper.make_node("Add", ["nothing", "one"], ["certainty"]),
            helper.make_node("Identity", ["numbers"], ["scores"]),
        ],
        name,
        [helper.make_tensor_value_info("x", onnx_type, ["n", 2])],
        [
            helper.make_tensor_value_info("label", TensorProto.INT64, ["n", 1]),
            helper.make_tensor_value_info("certainty", TensorProto.FLOAT, ["n", 1]),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", 2]),
        ],
        [
            helper.make_tensor("zero", TensorProto.INT64, [1], [0]),
            helper.make_tensor("nought", TensorProto.FLOAT, [1], [0.0]),
            helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0]),
        ],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    (repository / name / "1").mkdir(parents=True)
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), repository / name / "1" / "model.onnx")
    (repository / name / "config.pbtxt").write_text(
        f'name: "{name}"\nbackend: "onnxruntime"\nmax_batch_size: 8\n'
        f'input [{{ name: "x" data_type: {triton_type} dims: [2] }}]\n'
        'output [{ name: "label" data_type: TYPE_INT64 dims: [1] },\n'
        ' { name: "certainty" data_type: TYPE_FP32 dims: [1] }, { name: "scores" data_type: TYPE_FP32 dims: [2] }]\n'
        "instance_group [{ count: 1 kind: KIND_AUTO }]\n"
    )


def family(model: str, datatype: str) -> dict[str, Any]:
    gear = {"name": "only", "layout": "one", "min_rate_per_s": 0.0, "max_rate_per_s": 100.0, "ladder_entry": "one"}
    return {
        "inputs": [{"name": "x", "datatype": datatype, "shape": [2]}],
        "num_classes": 2,
        "models": {model: {"max_batch": 8, "busy_s": [[1, 0.001]]}},
        "reference_model": model,
        "slo_s": 1.0,
        "max_rows_per_request": 8,
        "ladder": [{"name": "one", "stages": [{"model": model}], "reach": [1.0]}],
        "gears": [gear],
    }


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    models = {f"model_{datatype.lower()}": datatype for datatype in TYPES}
    document = {
        "schema_version": 1,
        "name": "datatypes",
        "families": {datatype.lower(): family(model, datatype) for model, datatype in models.items()},
        "layouts": [{"name": "one", "instances": {"a": dict.fromkeys(models, 1)}}],
    }
    stack = tiny_stack(tmp_path_factory.mktemp("datatypes"), ("a",), document)
    for model, datatype in models.items():
        write_model(stack.repository, model, datatype)
    with running(stack):
        yield stack


def batch(datatype: str) -> tuple[Any, np.ndarray[Any, Any]]:
    """(rows [4, 2], what the scores must be)."""
    if datatype == "BYTES":
        words = np.array([[word.encode(), WORDS[0].encode()] for word in WORDS], dtype=np.object_)
        return words, np.array([[i, 0] for i in range(4)], np.float32)
    kind = TYPES[datatype][0]
    numbers = np.array([[3, 1], [0, 2], [100, 7], [9, 9]])
    if datatype == "BOOL":
        numbers = np.array([[0, 1], [1, 0], [1, 1], [0, 0]])
    if datatype.startswith(("INT", "FP")):
        numbers = numbers * np.array([[1, -1]])
    return numbers.astype(kind), numbers.astype(np.float32)


def check(result: Any, expected: np.ndarray[Any, Any]) -> None:
    np.testing.assert_array_equal(result.as_numpy("scores"), expected)
    np.testing.assert_array_equal(result.as_numpy("label")[:, 0], expected[:, 0].astype(np.int64))


@pytest.mark.parametrize("datatype", TYPES)
def test_grpc(stack: Stack, datatype: str) -> None:
    rows, expected = batch(datatype)
    client = tritonclient.grpc.InferenceServerClient(stack.grpc_address)
    try:
        tensor = tritonclient.grpc.InferInput("x", list(rows.shape), datatype)
        tensor.set_data_from_numpy(rows)
        outputs = [tritonclient.grpc.InferRequestedOutput(name) for name in ("label", "scores")]
        check(client.infer(datatype.lower(), [tensor], outputs=outputs), expected)
    finally:
        client.close()


@pytest.mark.parametrize(
    ("datatype", "binary"), [(name, True) for name in TYPES] + [(name, False) for name in JSON_TYPES]
)
def test_http(stack: Stack, datatype: str, binary: bool) -> None:
    rows, expected = batch(datatype)
    client = tritonclient.http.InferenceServerClient(stack.url.removeprefix("http://"))
    try:
        tensor = tritonclient.http.InferInput("x", list(rows.shape), datatype)
        tensor.set_data_from_numpy(rows, binary_data=binary)
        outputs = [tritonclient.http.InferRequestedOutput(name, binary_data=binary) for name in ("label", "scores")]
        check(client.infer(datatype.lower(), [tensor], outputs=outputs), expected)
    finally:
        client.close()
