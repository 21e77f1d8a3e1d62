"""Families, and beside them in the same Triton a model of equal name, signature and values for each.

Whatever a client asks of `family` or `mixed`, Triton and the orchestrator should answer alike.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from tests.fakes.servers import Stack
from tests.fakes.tiny import LABEL_OFFSET, THRESHOLD, plan_document, write_repository

if TYPE_CHECKING:
    from pathlib import Path

MAX_BATCH = 64
# input of `mixed`: (datatype in the protocol, numpy's, ONNX's, Triton's)
MIXED: dict[str, tuple[str, Any, int, str]] = {
    "bool": ("BOOL", np.bool_, TensorProto.BOOL, "TYPE_BOOL"),
    "uint8": ("UINT8", np.uint8, TensorProto.UINT8, "TYPE_UINT8"),
    "uint16": ("UINT16", np.uint16, TensorProto.UINT16, "TYPE_UINT16"),
    "uint32": ("UINT32", np.uint32, TensorProto.UINT32, "TYPE_UINT32"),
    "uint64": ("UINT64", np.uint64, TensorProto.UINT64, "TYPE_UINT64"),
    "int8": ("INT8", np.int8, TensorProto.INT8, "TYPE_INT8"),
    "int16": ("INT16", np.int16, TensorProto.INT16, "TYPE_INT16"),
    "int32": ("INT32", np.int32, TensorProto.INT32, "TYPE_INT32"),
    "int64": ("INT64", np.int64, TensorProto.INT64, "TYPE_INT64"),
    "fp16": ("FP16", np.float16, TensorProto.FLOAT16, "TYPE_FP16"),
    "fp64": ("FP64", np.float64, TensorProto.DOUBLE, "TYPE_FP64"),
    "text": ("BYTES", np.object_, TensorProto.STRING, "TYPE_STRING"),
}
WORDS = ["", "zwei", "drei\n", "vier \u00fc"]


def make_stack(folder: Path) -> Stack:
    """Write repository and plan; nothing runs yet."""
    repository = folder / "repository"
    repository.mkdir()
    write_repository(repository)
    _write(repository, "family", _cascade(), ["x"], staged=True)
    for name in ("mixed", "mixed_only"):
        _write(repository, name, _mixed(name), list(MIXED), staged=name == "mixed")
    document = plan_document(("a",))
    document["families"]["mixed"] = {
        "inputs": [{"name": name, "datatype": kinds[0], "shape": [1]} for name, kinds in MIXED.items()],
        "num_classes": len(MIXED),
        "models": {"mixed_only": {"max_batch": MAX_BATCH, "busy_s": [[1, 0.001], [64, 0.002]]}},
        "reference_model": "mixed_only",
        "slo_s": 0.5,
        "max_rows_per_request": MAX_BATCH,
        "ladder": [{"name": "reference", "stages": [{"model": "mixed_only"}], "reach": [1.0]}],
        "gears": [
            {"name": "narrow", "layout": "narrow", "min_rate_per_s": 0.0, "max_rate_per_s": 1000.0},
            {"name": "broad", "layout": "broad", "min_rate_per_s": 0.0, "max_rate_per_s": 4000.0},
            {"name": "overload", "layout": "broad", "min_rate_per_s": 4000.0, "max_rate_per_s": None, "degraded": True},
        ],
    }  # fmt: skip
    for gear in document["families"]["mixed"]["gears"]:
        gear["ladder_entry"] = "reference"
    for layout in document["layouts"]:
        layout["instances"]["a"]["mixed_only"] = 1
    plan = folder / "plan.json"
    plan.write_text(json.dumps(document))
    return Stack(folder, repository, plan, ("a",))


def _write(repository: Path, name: str, model: onnx.ModelProto, inputs: list[str], *, staged: bool) -> None:
    (repository / name / "1").mkdir(parents=True)
    onnx.save(model, repository / name / "1" / "model.onnx")
    triton = {"x": ("TYPE_FP32", 3)} | {key: (kinds[3], 1) for key, kinds in MIXED.items()}
    classes = 3 if inputs == ["x"] else len(MIXED)
    outputs = [("label", "TYPE_INT64", 1), ("certainty", "TYPE_FP32", 1), ("scores", "TYPE_FP32", classes)]
    outputs += [("stage", "TYPE_INT32", 1)] if staged else []
    lines = [f'name: "{name}"', 'backend: "onnxruntime"', f"max_batch_size: {MAX_BATCH}"]
    lines += [
        f'input [{{ name: "{key}" data_type: {triton[key][0]} dims: [{triton[key][1]}] }}]' for key in inputs
    ]  # fmt: skip
    lines += [f'output [{{ name: "{key}" data_type: {kind} dims: [{dim}] }}]' for key, kind, dim in outputs]
    lines += [
        "instance_group [{ count: 1 kind: KIND_AUTO }]",
        'parameters { key: "intra_op_thread_count" value { string_value: "1" } }',
    ]
    (repository / name / "config.pbtxt").write_text("\n".join(lines) + "\n")


def _cascade() -> onnx.ModelProto:
    """What `small` and then `large` answer together: see `tests.fakes.tiny`."""
    nodes = [
        helper.make_node("Identity", ["x"], ["scores"]),
        helper.make_node("Gather", ["x", "zero"], ["first"], axis=1),
        helper.make_node("Gather", ["x", "one"], ["certainty"], axis=1),
        # not "certainty < threshold": a certainty that is no number escalates
        helper.make_node("GreaterOrEqual", ["certainty", "threshold"], ["certain"]),
        helper.make_node("Not", ["certain"], ["escalated"]),
        helper.make_node("Cast", ["escalated"], ["stage"], to=TensorProto.INT32),
        helper.make_node("Cast", ["escalated"], ["large"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["large", "offset"], ["shift"]),
        helper.make_node("Add", ["first", "shift"], ["shifted"]),
        helper.make_node("Cast", ["shifted"], ["label"], to=TensorProto.INT64),
    ]
    constants = [
        helper.make_tensor("zero", TensorProto.INT64, [1], [0]),
        helper.make_tensor("one", TensorProto.INT64, [1], [1]),
        helper.make_tensor("threshold", TensorProto.FLOAT, [1], [THRESHOLD]),
        helper.make_tensor("offset", TensorProto.FLOAT, [1], [float(LABEL_OFFSET["large"])]),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3])]
    return _model("family", nodes, inputs, constants, classes=3)


def _mixed(name: str) -> onnx.ModelProto:
    """scores = every input as a number; label = how often 1 is among them; certain of all."""
    nodes = [
        helper.make_node(
            "LabelEncoder", ["text"], ["number_text"], domain="ai.onnx.ml",
            keys_strings=WORDS, values_floats=[float(i) for i in range(len(WORDS))], default_float=-1.0,
        )
    ]  # fmt: skip
    nodes += [
        helper.make_node("Cast", [key], [f"number_{key}"], to=TensorProto.FLOAT) for key in MIXED if key != "text"
    ]
    nodes += [
        helper.make_node("Concat", [f"number_{key}" for key in MIXED], ["scores"], axis=1),
        helper.make_node("Equal", ["scores", "one"], ["ones"]),
        helper.make_node("Cast", ["ones"], ["counted"], to=TensorProto.INT64),
        helper.make_node("ReduceSum", ["counted", "axis"], ["label"], keepdims=1),
        helper.make_node("Gather", ["scores", "zero"], ["column"], axis=1),
        helper.make_node("Mul", ["column", "nought"], ["nothing"]),
        helper.make_node("Add", ["nothing", "one"], ["certainty"]),
        helper.make_node("Cast", ["nothing"], ["stage"], to=TensorProto.INT32),
    ]
    constants = [
        helper.make_tensor("zero", TensorProto.INT64, [1], [0]),
        helper.make_tensor("axis", TensorProto.INT64, [1], [1]),
        helper.make_tensor("nought", TensorProto.FLOAT, [1], [0.0]),
        helper.make_tensor("one", TensorProto.FLOAT, [1], [1.0]),
    ]
    inputs = [helper.make_tensor_value_info(key, kinds[2], ["n", 1]) for key, kinds in MIXED.items()]
    return _model(name, nodes, inputs, constants, classes=len(MIXED))


def _model(name: str, nodes: list[Any], inputs: list[Any], constants: list[Any], *, classes: int) -> onnx.ModelProto:
    outputs = [
        helper.make_tensor_value_info("label", TensorProto.INT64, ["n", 1]),
        helper.make_tensor_value_info("certainty", TensorProto.FLOAT, ["n", 1]),
        helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", classes]),
        helper.make_tensor_value_info("stage", TensorProto.INT32, ["n", 1]),
    ]
    graph = helper.make_graph(nodes, name, inputs, outputs, constants)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9)
