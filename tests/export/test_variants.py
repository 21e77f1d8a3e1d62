from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper, parser

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime as ort
from onnxruntime.quantization import quantize_dynamic

from cascadeserve.errors import ExportRefused
from export.family import Head, Variant
from export.variants import (
    make_variant,
    optimize,
    quantize_static_int8,
    refuse_dynamic_quantisation,
    to_float16,
)
from tests.export.tiny_torch import QUANTISATION_ROWS, ROWS, deep, exported, family_of, linear, model_of, with_head

if TYPE_CHECKING:
    from numpy.typing import NDArray

pytestmark = pytest.mark.torch
# those that are another file; TensorRT is asked for in the config
VARIANTS: tuple[Variant, ...] = tuple(variant for variant in get_args(Variant) if variant != "tensorrt")
OUTPUTS = ["label", "certainty", "scores"]
ROOT = Path(__file__).parents[2]


@cache
def bare(build: Any = deep, name: str = "tiny") -> onnx.ModelProto:
    """A model before it gets its head."""
    return exported(model_of(build, name=name))[1].onnx_model()


@cache
def float_model() -> bytes:
    return with_head(bare())


@cache
def bare_variant(variant: Variant) -> onnx.ModelProto:
    model = model_of(deep, variant=variant)
    return make_variant(family_of(model), model, bare())


@cache
def made(variant: Variant) -> bytes:
    return with_head(bare_variant(variant))


def graph_of(onnx_model: bytes) -> onnx.GraphProto:
    return onnx.load_model_from_string(onnx_model).graph


def weights(onnx_model: bytes) -> dict[str, NDArray[Any]]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in graph_of(onnx_model).initializer}


def session_of(onnx_model: bytes) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(onnx_model, options, providers=["CPUExecutionProvider"])


def answers(onnx_model: bytes, rows: NDArray[np.float32], size: int = 64) -> dict[str, NDArray[Any]]:
    session = session_of(onnx_model)
    parts = [session.run(OUTPUTS, {"x": rows[start : start + size]}) for start in range(0, len(rows), size)]
    return {name: np.concatenate([part[i] for part in parts]) for i, name in enumerate(OUTPUTS)}


def dynamic() -> onnx.ModelProto:
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "float.onnx"), Path(folder, "dynamic.onnx")
        source.write_bytes(float_model())
        quantize_dynamic(source, target)
        return onnx.load(target)


@pytest.mark.parametrize("variant", VARIANTS)
def test_inputs_and_outputs_stay_what_they_are(variant: Variant) -> None:
    source, found = graph_of(float_model()), graph_of(made(variant))
    for one, other in ((source.input, found.input), (source.output, found.output)):
        described = [
            [
                (value.name, value.type.tensor_type.elem_type, len(value.type.tensor_type.shape.dim), batch.dim_param)
                for value in values
                for batch in value.type.tensor_type.shape.dim[:1]
            ]
            for values in (one, other)
        ]
        assert described[0] == described[1]
    found_types = {name: array.dtype for name, array in answers(made(variant), ROWS[:2]).items()}
    assert found_types == {"label": np.int64, "certainty": np.float32, "scores": np.float32}


@pytest.mark.parametrize("variant", VARIANTS)
def test_servers_that_read_the_float_model_read_the_variant(variant: Variant) -> None:
    model = onnx.load_model_from_string(made(variant))
    assert model.ir_version == 9
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 17)]
    assert {node.domain for node in model.graph.node} == {""}


@pytest.mark.parametrize("variant", VARIANTS)
def test_no_word_of_the_machine_it_was_made_on_stands_in_the_file(variant: Variant) -> None:
    for trace in (sys.prefix, str(Path.cwd()), str(Path.home()), tempfile.gettempdir(), ".py"):
        assert trace.encode() not in made(variant)


@pytest.mark.parametrize(("variant", "error"), [("optimised", 1e-6), ("fp16", 2e-3), ("int8", 0.02)])
def test_answers_are_those_of_the_float_model_but_for_rounding(variant: Variant, error: float) -> None:
    wanted, found = answers(float_model(), ROWS), answers(made(variant), ROWS)
    np.testing.assert_allclose(found["scores"], wanted["scores"], rtol=0, atol=error)
    np.testing.assert_allclose(found["certainty"], wanted["certainty"], rtol=0, atol=2 * error)
    clear = wanted["certainty"] > 2 * error
    np.testing.assert_array_equal(found["label"][clear], wanted["label"][clear])


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_row_is_answered_the_same_alone_in_any_batch_and_beside_outliers(variant: Variant) -> None:
    wanted = answers(made(variant), ROWS[:96], 1)
    beside = np.concatenate([ROWS[:96], 1000 * ROWS[96:128], -1000 * ROWS[96:128]])
    order = np.random.default_rng(0).permutation(len(beside))
    shuffled = answers(made(variant), beside[order], 64)
    for found in (
        *(answers(made(variant), ROWS[:96], size) for size in (3, 8, 96)),
        {name: array[np.argsort(order)][:96] for name, array in shuffled.items()},
    ):
        np.testing.assert_array_equal(found["label"], wanted["label"])
        np.testing.assert_allclose(found["scores"], wanted["scores"], rtol=0, atol=1e-6)
        np.testing.assert_allclose(found["certainty"], wanted["certainty"], rtol=0, atol=1e-6)


def test_variants_are_the_same_bytes_in_another_process(tmp_path: Path) -> None:
    """Where Python's sets hand out names in another order."""
    onnx.save(bare(), tmp_path / "float.onnx")
    np.save(tmp_path / "rows.npy", QUANTISATION_ROWS)
    program = (
        "import numpy, onnx, export.variants as variants\n"
        "model, rows = onnx.load('float.onnx'), numpy.load('rows.npy')\n"
        "onnx.save(variants.optimize(model), 'optimised')\n"
        "onnx.save(variants.to_float16(model), 'fp16')\n"
        "onnx.save(variants.quantize_static_int8(model, {'x': rows}), 'int8')\n"
    )
    environment = os.environ | {"PYTHONHASHSEED": "1", "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=environment, check=True)
    for variant in VARIANTS:
        assert onnx.load(tmp_path / variant, format="protobuf") == bare_variant(variant), variant


def test_a_variant_made_twice_is_the_same_bytes() -> None:
    rows = {"x": QUANTISATION_ROWS}
    assert quantize_static_int8(bare(), rows) == bare_variant("int8")
    assert to_float16(bare()) == bare_variant("fp16")
    assert optimize(bare()) == bare_variant("optimised")


def test_int8_weights_have_7_bits_and_a_scale_per_channel_and_the_last_layer_is_float() -> None:
    graph, arrays = graph_of(made("int8")), weights(made("int8"))
    matrices = {name: array for name, array in arrays.items() if array.dtype == np.int8 and array.ndim > 1}
    assert sorted(array.shape for array in matrices.values()) == [(4, 1, 1, 1), (8, 16)]
    assert all(np.abs(array.astype(int)).max() <= 64 for array in matrices.values())
    scales = {node.input[0]: node.input[1] for node in graph.node if node.op_type == "DequantizeLinear"}
    assert {name: len(arrays[scales[name]]) for name in matrices} == {
        name: 4 if array.ndim == 4 else 8 for name, array in matrices.items()
    }
    (last,) = [array for array in arrays.values() if array.dtype == np.float32 and array.ndim == 2]
    assert last.shape == (3, 8)


def test_int8_scales_are_constants_and_none_stands_behind_the_logits() -> None:
    graph, arrays = graph_of(made("int8")), weights(made("int8"))
    quantising = [node for node in graph.node if node.op_type == "QuantizeLinear"]
    assert quantising
    assert all(node.input[1] in arrays and node.input[2] in arrays for node in quantising)
    kinds = [node.op_type for node in graph.node]
    assert "DequantizeLinear" not in kinds[len(kinds) - kinds[::-1].index("Gemm") :]


def test_int8_scales_come_from_the_quantisation_rows() -> None:
    wide = with_head(quantize_static_int8(bare(), {"x": 4 * QUANTISATION_ROWS}))
    assert wide != made("int8")
    largest = 4 * ROWS[:64]
    off = [
        np.abs(answers(onnx_model, largest)["scores"] - answers(float_model(), largest)["scores"]).max()
        for onnx_model in (wide, made("int8"))
    ]
    assert off[0] < off[1] / 2


def test_int8_of_a_single_layer_is_refused() -> None:
    with pytest.raises(ExportRefused, match=r"^shallow: INT8 leaves the last layer in float and there is none before"):
        quantize_static_int8(bare(linear, "shallow"), {"x": QUANTISATION_ROWS})


def test_fp16_weights_are_halves_and_scores_are_not_rounded_to_halves() -> None:
    arrays = weights(made("fp16"))
    assert {array.dtype for array in arrays.values() if array.ndim > 1} == {np.dtype(np.float16)}
    types = {
        value.name: value.type.tensor_type.elem_type
        for value in onnx.shape_inference.infer_shapes(onnx.load_model_from_string(made("fp16"))).graph.value_info
    }
    graph = graph_of(made("fp16"))
    computing = [node for node in graph.node if node.op_type in {"Conv", "Gemm", "Relu"}]
    assert computing
    assert {types[name] for node in computing for name in node.output} == {TensorProto.FLOAT16}
    (softmax,) = [node for node in graph.node if node.op_type == "Softmax"]
    assert types[softmax.input[0]] == TensorProto.FLOAT
    scores = answers(made("fp16"), ROWS)["scores"]
    assert np.mean(scores == scores.astype(np.float16)) < 0.05


@pytest.mark.parametrize("tail", ["scores = Softmax(logits)", "copy = Identity(logits) scores = Softmax(copy)"])
def test_fp16_and_int8_leave_the_softmax_of_a_model_that_gives_probabilities_in_float(tail: str) -> None:
    model = parser.parse_model(
        f"""<ir_version: 9, opset_import: ["" : 17]>
        tiny (float[n, 4] x) => (float[n, 4] scores)
        <float[4, 4] first = {{0.1,0.2,0,0, 0,0.3,0,0, 0,0,0.7,0, 0.1,0,0,0.9}}, float[4, 4] w = {{1,0,0,0, 0,1,0,0,
         0,0,1,0, 0,0,0,1}}>
        {{ hidden = MatMul(x, first) active = Relu(hidden) logits = MatMul(active, w) {tail} }}"""
    )
    head = Head(output="probabilities")
    wanted = answers(with_head(model, head), ROWS)
    for variant, error in ((to_float16(model), 1e-3), (quantize_static_int8(model, {"x": QUANTISATION_ROWS}), 0.02)):
        types = {
            value.name: value.type.tensor_type.elem_type
            for value in onnx.shape_inference.infer_shapes(variant).graph.value_info
        }
        (softmax,) = [node for node in variant.graph.node if node.op_type == "Softmax"]
        assert types.get(softmax.input[0], TensorProto.FLOAT) == TensorProto.FLOAT
        assert [node.op_type for node in variant.graph.node][-1] == "Softmax"
        found = answers(with_head(variant, head), ROWS)
        np.testing.assert_allclose(found["scores"], wanted["scores"], rtol=0, atol=error)
        assert np.mean(found["scores"] == found["scores"].astype(np.float16)) < 0.05


def test_an_optimised_graph_has_its_constants_folded_and_is_smaller() -> None:
    before, after = ([node.op_type for node in model.graph.node] for model in (bare(), bare_variant("optimised")))
    assert "Constant" in before
    assert "Constant" not in after
    assert len(after) < len(before)


def test_dynamic_quantisation_is_refused_with_the_operator_the_reason_and_what_to_do() -> None:
    assert "DynamicQuantizeLinear" in {node.op_type for node in dynamic().graph.node}
    with pytest.raises(
        ExportRefused,
        match=r"^small: holds DynamicQuantizeLinear, .* whole batch, .* batch mates .* certificate .* static INT8",
    ):
        refuse_dynamic_quantisation(dynamic(), "small")


def test_the_reason_why_dynamic_quantisation_is_refused_is_true() -> None:
    alone = answers(dynamic().SerializeToString(), ROWS[:1])["scores"]
    beside = answers(dynamic().SerializeToString(), np.concatenate([ROWS[:1], 100 * ROWS[1:2]]))["scores"][:1]
    assert np.abs(alone - beside).max() > 1e-3


@pytest.mark.parametrize("operator", ["DynamicQuantizeLinear", "DynamicQuantizeMatMul", "DynamicQuantizeLSTM"])
@pytest.mark.parametrize("where", ["graph", "branch", "function"])
def test_a_dynamic_operator_is_found_wherever_it_stands(operator: str, where: str) -> None:
    model = onnx.load_model_from_string(float_model())
    node = helper.make_node(operator, ["x"], ["q"], domain="com.microsoft")
    branch = helper.make_graph([node], "branch", [], [helper.make_tensor_value_info("q", TensorProto.UINT8, None)])
    if where == "graph":
        model.graph.node.append(node)
    elif where == "branch":
        model.graph.node.append(helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch))
    else:
        model.functions.append(helper.make_function("mine", "F", ["x"], ["q"], [node], model.opset_import))
    with pytest.raises(ExportRefused, match=f"^m: holds {operator},"):
        refuse_dynamic_quantisation(model, "m")


@pytest.mark.parametrize("variant", VARIANTS)
def test_static_scales_are_not_taken_for_dynamic_ones(variant: Variant) -> None:
    refuse_dynamic_quantisation(bare(), "float")
    refuse_dynamic_quantisation(bare_variant(variant), variant)
