"""A family made to be steered by its input: what a row answers, and how certain, stands in the row itself.

Input `x` FP32 [n, 3]: column 0 is the label, column 1 the certainty; the large model adds LABEL_OFFSET, so an answer
tells which model gave it, and every further version adds VERSION_OFFSET. Column 2 is a mark: what harm the row does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from cascadeserve.artefacts import decode_json
from cascadeserve.gear_plan import GearPlan

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

LABEL_OFFSET = {"small": 0, "large": 100, "third": 0, "tokens": 0, "classifier": 0}
# added by every version after the first
VERSION_OFFSET = 1000
THRESHOLD = 0.5
# marks: the model answers with an error, its process ends, the server is killed
ERRS, EXITS, KILLS = 1.0, 2.0, 3.0

_MARKED_MODEL = """import os
import signal
from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def initialize(self, args):
        self._crashes = Path(args["model_repository"]).parents[1] / "crashes"

    def _crash(self, x):
        with self._crashes.open("a") as file:
            file.write(f"{x[:, 0].astype(int).tolist()}\\n")

    def execute(self, requests):
        return [self._answer(pb_utils.get_input_tensor_by_name(each, "x").as_numpy()) for each in requests]

    def _answer(self, x):
        if (x[:, 2] == 1.0).any():
            raise ValueError("a row is marked")
        if (x[:, 2] == 2.0).any():
            self._crash(x)
            os._exit(1)
        if (x[:, 2] == 3.0).any():
            self._crash(x)
            os.kill(os.getppid(), signal.SIGKILL)
        outputs = {"label": x[:, :1].astype(np.int64), "certainty": x[:, 1:2], "scores": x}
        return pb_utils.InferenceResponse([pb_utils.Tensor(*each) for each in outputs.items()])
"""


def rows(labels: list[int], certainties: list[float]) -> NDArray[np.float32]:
    """Input rows [n, 3]."""
    return np.array([[label, certainty, 0.0] for label, certainty in zip(labels, certainties, strict=True)], np.float32)


def write_version(folder: Path, name: str, version: int) -> None:
    """Write a version of a model as a real ONNX file."""
    import onnx  # noqa: PLC0415 - only the tests on a real Triton need it
    from onnx import TensorProto, helper  # noqa: PLC0415

    offset = LABEL_OFFSET[name] + VERSION_OFFSET * (version - 1)
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["x", "zero"], ["first"], axis=1),
            helper.make_node("Add", ["first", "offset"], ["shifted"]),
            helper.make_node("Cast", ["shifted"], ["label"], to=TensorProto.INT64),
            helper.make_node("Gather", ["x", "one"], ["certainty"], axis=1),
            helper.make_node("Identity", ["x"], ["scores"]),
        ],
        name,
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3])],
        [
            helper.make_tensor_value_info("label", TensorProto.INT64, ["n", 1]),
            helper.make_tensor_value_info("certainty", TensorProto.FLOAT, ["n", 1]),
            helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["n", 3]),
        ],
        [
            helper.make_tensor("zero", TensorProto.INT64, [1], [0]),
            helper.make_tensor("one", TensorProto.INT64, [1], [1]),
            helper.make_tensor("offset", TensorProto.FLOAT, [1], [float(offset)]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    (folder / name / str(version)).mkdir(parents=True)
    onnx.save(model, folder / name / str(version) / "model.onnx")


def write_repository(folder: Path, models: tuple[str, ...] = ("small", "large")) -> Path:
    """Write the two models with complete Triton configs."""
    for name in models:
        write_version(folder, name, 1)
        (folder / name / "config.pbtxt").write_text(
            f"""name: "{name}"
backend: "onnxruntime"
max_batch_size: 64
input [{{ name: "x" data_type: TYPE_FP32 dims: [3] }}]
output [
  {{ name: "label" data_type: TYPE_INT64 dims: [1] }},
  {{ name: "certainty" data_type: TYPE_FP32 dims: [1] }},
  {{ name: "scores" data_type: TYPE_FP32 dims: [3] }}
]
instance_group [{{ count: 1 kind: KIND_AUTO }}]
parameters {{ key: "intra_op_thread_count" value {{ string_value: "1" }} }}
"""
        )
    return folder


def mark_model(folder: Path, name: str) -> None:
    """Have a model of the repository be one of the Python backend that obeys the marks.

    The batches that crash it are listed, by labels, in the file `crashes` beside the repository.
    """
    version = folder / name / "1"
    (version / "model.onnx").unlink()
    (version / "model.py").write_text(_MARKED_MODEL)
    config = folder / name / "config.pbtxt"
    config.write_text(config.read_text().replace('backend: "onnxruntime"', 'backend: "python"'))


def marked(label: int, certainty: float, mark: float) -> NDArray[np.float32]:
    """An input row [1, 3] with a mark."""
    return np.array([[label, certainty, mark]], np.float32)


def plan_document(endpoints: tuple[str, ...] = ("a",)) -> dict[str, Any]:
    """A valid plan as plain data: two layouts, three gears, to be changed by tests."""
    return {
        "schema_version": 1,
        "name": "tiny",
        "families": {
            "family": {
                "inputs": [{"name": "x", "datatype": "FP32", "shape": [3]}],
                "num_classes": 3,
                "models": {
                    "small": {"max_batch": 64, "busy_s": [[1, 0.001], [64, 0.002]]},
                    "large": {"max_batch": 64, "busy_s": [[1, 0.002], [64, 0.010]]},
                },
                "reference_model": "large",
                "slo_s": 0.5,
                "max_rows_per_request": 64,
                "ladder": [
                    {"name": "reference", "stages": [{"model": "large"}], "reach": [1.0]},
                    {
                        "name": "cascade",
                        "stages": [{"model": "small", "threshold": THRESHOLD}, {"model": "large"}],
                        "reach": [1.0, 0.3],
                    },
                ],
                "gears": [
                    {
                        "name": "calm",
                        "layout": "narrow",
                        "min_rate_per_s": 0.0,
                        "max_rate_per_s": 100.0,
                        "ladder_entry": "cascade",
                    },
                    {
                        "name": "busy",
                        "layout": "narrow",
                        "min_rate_per_s": 100.0,
                        "max_rate_per_s": 1000.0,
                        "ladder_entry": "cascade",
                        "triggers": {"small": {"min_batch": 8, "max_batch": 32, "max_wait_s": 0.01}},
                    },
                    {
                        "name": "wide",
                        "layout": "broad",
                        "min_rate_per_s": 0.0,
                        "max_rate_per_s": 4000.0,
                        "ladder_entry": "cascade",
                    },
                    {
                        "name": "overload",
                        "layout": "broad",
                        "min_rate_per_s": 4000.0,
                        "max_rate_per_s": None,
                        "ladder_entry": "cascade",
                        "degraded": True,
                    },
                ],
            }
        },
        "layouts": [
            {"name": "narrow", "instances": {name: {"small": 1, "large": 1} for name in endpoints}},
            {"name": "broad", "instances": {name: {"small": 1, "large": 2} for name in endpoints}},
        ],
    }


def plan(document: dict[str, Any] | None = None) -> GearPlan:
    """The same as a GearPlan."""
    return decode_json(msgspec.json.encode(document or plan_document()), GearPlan)
