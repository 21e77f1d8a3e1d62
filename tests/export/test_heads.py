from __future__ import annotations

import itertools
import os
from functools import cache, partial
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from onnx import TensorProto, helper, numpy_helper, parser
from scipy.special import log_softmax, softmax

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # must be set before the import

import onnxruntime as ort

from cascadeserve.errors import UsageError
from export.family import Head
from export.heads import add_head, answers_of
from export.onnx_versions import IR_VERSION, OPSET
from export.temperature import HIGHEST, LOWEST, fit_temperature
from tests.export.tiny_torch import ROWS, exported, linear
from tests.export.tiny_torch import model_of as model_of_torch

if TYPE_CHECKING:
    from numpy.typing import NDArray

pytestmark = pytest.mark.torch

KINDS = ("margin", "max_probability", "negative_entropy")
HEADS = [
    Head(certainty=certainty, output=output, temperature=temperature)
    for certainty, output, temperature in itertools.product(KINDS, ("logits", "probabilities"), (1.0, 2.5))
]
LOGITS = "g (float[n, c] x) => (float[n, c] logits) { logits = Identity (x) }"
each_head = pytest.mark.parametrize(
    "head", HEADS, ids=lambda head: f"{head.certainty}-{head.output}-{head.temperature}"
)


def model_of(text: str, *, opset: int = OPSET, ir_version: int = IR_VERSION, functions: str = "") -> onnx.ModelProto:
    opsets = f'"": {opset}, "local": 1, "com.microsoft": 1'
    return parser.parse_model(f"<ir_version: {ir_version}, opset_import: [{opsets}]> {text} {functions}")


def answers(model: onnx.ModelProto, **inputs: Any) -> dict[str, NDArray[Any]]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return outputs_of_session(session, **inputs)


def outputs_of_session(session: ort.InferenceSession, **inputs: Any) -> dict[str, NDArray[Any]]:
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


@cache
def session_of(head: Head) -> ort.InferenceSession:
    """Of a model that returns its input."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    model = add_head(model_of(LOGITS), head)
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def run(head: Head, values: NDArray[Any]) -> dict[str, NDArray[Any]]:
    return outputs_of_session(session_of(head), x=values)


def reference(head: Head, values: NDArray[Any]) -> dict[str, NDArray[Any]]:
    """In double precision, by other formulas where there are any."""
    values = values.astype(np.float64)
    if head.output == "logits":
        scores = softmax(values / head.temperature, axis=1)
    else:
        scores = values ** (1 / head.temperature)
        scores = scores if head.temperature == 1.0 else scores / scores.sum(1, keepdims=True)
    ordered = np.partition(scores, -2, axis=1)
    if head.certainty == "margin":
        certainty = ordered[:, -1] - ordered[:, -2]
    elif head.certainty == "max_probability":
        certainty = ordered[:, -1]
    else:
        with np.errstate(divide="ignore", invalid="ignore"):
            certainty = np.where(scores > 0, scores * np.log(scores), 0).sum(1)
    return {"label": values.argmax(1)[:, None], "certainty": certainty[:, None], "scores": scores}


def assert_same(found: dict[str, NDArray[Any]], wanted: dict[str, NDArray[Any]], tolerance: float = 2e-6) -> None:
    n = len(wanted["label"])
    assert (found["label"].dtype, found["certainty"].dtype) == (np.int64, np.float32)
    assert (found["label"].shape, found["certainty"].shape) == ((n, 1), (n, 1))
    np.testing.assert_array_equal(found["label"], wanted["label"])
    np.testing.assert_allclose(found["certainty"], wanted["certainty"], atol=tolerance, rtol=tolerance)
    if "scores" in found:
        assert found["scores"].dtype == np.float32
        np.testing.assert_allclose(found["scores"], wanted["scores"], atol=tolerance)


def rows_for(head: Head, n: int, classes: int, seed: int = 0, scale: float = 3.0) -> NDArray[np.float32]:
    values = np.random.default_rng(seed).normal(size=(n, classes), scale=scale)
    return (values if head.output == "logits" else softmax(values, axis=1)).astype(np.float32)


# --- the numbers


@each_head
@pytest.mark.parametrize("n", [1, 64])
@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_onnx_runtime_gives_the_numbers_of_numpy(head: Head, n: int, classes: int) -> None:
    values = rows_for(head, n, classes)
    found = run(head, values)
    assert found.keys() == {"label", "certainty", "scores"}
    assert_same(found, reference(head, values))


@pytest.mark.parametrize("head", [head for head in HEADS if head.output == "logits"], ids=str)
@settings(max_examples=15, deadline=None)
@given(
    values=arrays(
        np.float32,
        array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=12),
        elements=st.floats(-1e4, 1e4, width=32) | st.integers(-2, 2).map(float),
    )
)
def test_onnx_runtime_gives_the_numbers_of_numpy_for_any_logits(head: Head, values: NDArray[Any]) -> None:
    assert_same(run(head, values), reference(head, values))


@each_head
@settings(max_examples=8, deadline=None)
@given(counts=arrays(np.int64, (3, 5), elements=st.integers(0, 3)))
def test_tied_classes_and_impossible_ones_are_handled(head: Head, counts: NDArray[Any]) -> None:
    counts[:, 0] += 1
    values = (counts / counts.sum(1, keepdims=True)).astype(np.float32)
    if head.output == "logits":
        with np.errstate(divide="ignore"):
            values = np.log(values)
    found = run(head, values)
    assert np.isfinite(found["certainty"]).all()
    assert_same(found, reference(head, values))


@each_head
@pytest.mark.parametrize("classes", [2, 7, 100, 5000])
def test_of_equal_classes_the_first_is_the_label_as_in_numpy(head: Head, classes: int) -> None:
    values = np.random.default_rng(0).integers(1, 4, size=(32, classes)).astype(np.float32)
    values /= values.sum(1, keepdims=True)
    np.testing.assert_array_equal(run(head, values)["label"][:, 0], values.argmax(1))


@pytest.mark.parametrize("temperature", [1.0, 0.3, 20.0])
def test_the_label_is_that_of_the_logits_where_softmax_cannot_tell_them_apart(temperature: float) -> None:
    logits = np.array([[1e-9, 2e-9, 1.5e-9], [-3e-10, -2e-10, -1e-10]], dtype=np.float32)
    found = run(Head(temperature=temperature), logits)
    assert np.unique(found["scores"]).size == 1
    np.testing.assert_array_equal(found["label"], [[1], [2]])


def test_a_temperature_keeps_the_precision_of_large_logits() -> None:
    logits = (10_000 + np.random.default_rng(0).normal(size=(64, 10))).astype(np.float32)
    for temperature in (0.7, 3.0):
        head = Head(temperature=temperature)
        assert_same(run(head, logits), reference(head, logits))


@each_head
def test_more_certainty_is_surer(head: Head) -> None:
    sureness = np.linspace(0.4, 1.0, 12)
    values = np.stack([sureness, (1 - sureness) * 0.6, (1 - sureness) * 0.4], axis=1).astype(np.float32)
    if head.output == "logits":
        values = np.log(np.maximum(values, 1e-30))
    certainty = run(head, values)["certainty"][:, 0]
    assert (np.diff(certainty) > 0).all()
    assert certainty[-1] == pytest.approx(0.0 if head.certainty == "negative_entropy" else 1.0, abs=1e-6)


@pytest.mark.parametrize("logits", [[1e4, -1e4, -1e4], [0.0, -np.inf, -np.inf], [65504.0, 0.0, -65504.0]])
def test_a_sure_row_has_no_entropy(logits: list[float]) -> None:
    for temperature in (1.0, 0.05, 2.0):
        head = Head(certainty="negative_entropy", temperature=temperature)
        assert run(head, np.array([logits], dtype=np.float32))["certainty"] == 0.0


@each_head
@pytest.mark.parametrize("classes", [3, 40])
def test_a_row_with_a_value_that_is_no_number_has_no_certainty_and_leaves_its_mates_alone(
    head: Head, classes: int
) -> None:
    values = rows_for(head, 6, classes)
    wanted = run(head, values)
    broken = values.copy()
    broken[1, 0], broken[2, classes // 2], broken[3, -1], broken[4, 1] = np.nan, np.nan, np.nan, np.inf
    found = run(head, broken)
    np.testing.assert_array_equal(np.isnan(found["certainty"][:, 0]), [False, True, True, True, True, False])
    for name in found:
        np.testing.assert_array_equal(found[name][[0, 5]], wanted[name][[0, 5]])


@each_head
def test_a_row_is_answered_the_same_alone_and_beside_any_others(head: Head) -> None:
    # the last bits of sums and logarithms depend on where in the batch a number stands
    exact = head.certainty != "negative_entropy" and (head.output == "logits" or head.temperature == 1.0)
    same = partial(np.testing.assert_allclose, rtol=0 if exact else 1e-6, atol=0 if exact else 1e-6)
    values = rows_for(head, 64, 33)
    together = run(head, values)
    order = np.random.default_rng(1).permutation(64)
    shuffled = run(head, values[order])
    beside = run(head, np.concatenate([values[:1], rows_for(head, 8, 33, seed=9, scale=300.0)]))
    singly = [run(head, values[i : i + 1]) for i in range(64)]
    for name, array in together.items():
        same(np.concatenate([answer[name] for answer in singly]), array)
        same(shuffled[name], array[order])
        same(beside[name][0], array[0])


@pytest.mark.parametrize("certainty", KINDS)
@pytest.mark.parametrize("n", [1, 64])
def test_of_a_vocabulary_only_label_and_certainty_leave_the_device(certainty: Any, n: int) -> None:
    head = Head(certainty=certainty, temperature=1.7, keep_scores=False)
    logits = rows_for(head, n, 50_000)
    found = run(head, logits)
    assert sum(array.nbytes for array in found.values()) == 12 * n
    assert_same(found, reference(head, logits), 1e-5)


@each_head
@pytest.mark.parametrize(("datatype", "digits"), [("float16", 11), ("bfloat16", 8)])
def test_half_precision_is_widened_before_anything_else(head: Head, datatype: str, digits: int) -> None:
    code = {"float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}[datatype]
    text = f"g (float[n, c] x) => ({datatype}[n, c] y) {{ y = Cast <to = {code}> (x) }}"
    # few enough digits to be the same number in either precision
    mantissa, exponent = np.frexp(rows_for(head, 16, 12))
    values = np.ldexp(np.round(np.ldexp(mantissa, digits - 1)), exponent - digits + 1).astype(np.float32)
    values[values < 1e-4 if head.output == "probabilities" else False] = 0.0
    assert_same(answers(add_head(model_of(text), head), x=values), reference(head, values))


@each_head
@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_the_numbers_that_models_are_checked_against_are_those_of_the_graph(head: Head, classes: int) -> None:
    values = rows_for(head, 64, classes)
    values[0] = values[0, 0]  # all tied
    assert_same(run(head, values), answers_of(values, head))
    for name, array in reference(head, values).items():
        np.testing.assert_allclose(answers_of(values, head)[name], array, rtol=1e-9, atol=1e-12)


def test_the_margin_of_a_module_is_the_distance_of_its_two_largest_softmax_probabilities() -> None:
    module = linear().eval()
    onnx_model = exported(model_of_torch())[2]
    found = answers(onnx.load_model_from_string(onnx_model), x=ROWS)
    with torch.inference_mode():
        scores = torch.softmax(module(torch.from_numpy(ROWS)), dim=1)
        top, index = torch.topk(scores, k=2, dim=1)
    wanted = {"label": index[:, :1].numpy(), "certainty": (top[:, :1] - top[:, 1:]).numpy(), "scores": scores.numpy()}
    assert_same(found, wanted, 1e-6)


# --- any model


def matmul(columns: str = "n, 3", head: str = "y = MatMul (x, w)") -> str:
    return f"g (float[n, 2] x) => (float[{columns}] y) <float[2, 3] w = {{1, 2, 3, 4, 5, 6}}> {{ {head} }}"


X = np.array([[1.0, -1.0], [-2.0, 0.5], [0.0, 0.25]], dtype=np.float32)
Y = X @ np.array([[1, 2, 3], [4, 5, 6]], dtype=np.float32)


def outputs_of(model: onnx.ModelProto) -> dict[str, tuple[int, list[int | str]]]:
    return {
        value.name: (
            value.type.tensor_type.elem_type,
            [size.dim_param or size.dim_value for size in value.type.tensor_type.shape.dim],
        )
        for value in model.graph.output
    }


def test_outputs_are_named_typed_and_of_any_batch_size_and_the_given_model_is_left_alone() -> None:
    model = model_of(matmul().replace("n,", "batch,"))
    before = model.SerializeToString(deterministic=True)
    assert outputs_of(add_head(model, Head())) == {
        "label": (TensorProto.INT64, ["batch", 1]),
        "certainty": (TensorProto.FLOAT, ["batch", 1]),
        "scores": (TensorProto.FLOAT, ["batch", 3]),
    }
    assert outputs_of(add_head(model, Head(keep_scores=False))).keys() == {"label", "certainty"}
    assert model.SerializeToString(deterministic=True) == before


def test_two_models_with_the_same_head_are_the_same_bytes() -> None:
    first, second = (add_head(model_of(matmul()), Head()).SerializeToString(deterministic=True) for _ in range(2))
    assert first == second


@pytest.mark.parametrize("columns", ["?, 3", "n, c"])
def test_a_shape_that_is_not_stated_is_inferred(columns: str) -> None:
    model = model_of(matmul(columns.replace("?", "n")))
    if columns.startswith("?"):
        model.graph.output[0].type.tensor_type.ClearField("shape")
    assert outputs_of(add_head(model, Head()))["scores"][1] == ["n", 3]


@pytest.mark.parametrize("certainty", KINDS)
@pytest.mark.parametrize("opset", [9, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21])
def test_models_of_many_operator_sets_are_given_a_head(certainty: Any, opset: int) -> None:
    head = Head(certainty=certainty, temperature=2.0)
    model = add_head(model_of(matmul(), opset=opset), head)
    assert [entry.version for entry in model.opset_import if not entry.domain] == [max(opset, 13)]
    onnx.checker.check_model(model, full_check=True)
    assert_same(answers(model, x=X), reference(head, Y))


def test_models_of_operator_sets_that_servers_may_not_read_are_refused() -> None:
    with pytest.raises(
        UsageError, match=r"^the model uses operator set 22, .* up to 21: export it with opset_version="
    ):
        add_head(model_of(matmul(), opset=22), Head())


def test_a_model_that_cannot_be_converted_is_refused() -> None:
    withdrawn = matmul(head="z = Affine (x) y = MatMul (z, w)")
    with pytest.raises(UsageError, match=r"^the model uses operator set 9, which onnx cannot convert to 13: export it"):
        add_head(model_of(withdrawn, opset=9), Head())


def test_a_model_made_of_foreign_operators_only_is_given_a_standard_operator_set() -> None:
    text = '<ir_version: 8, opset_import: ["com.microsoft": 1]> ' + LOGITS.replace("Identity", "com.microsoft.Gelu")
    model = add_head(parser.parse_model(text), Head())
    assert {(entry.domain, entry.version) for entry in model.opset_import} == {("", OPSET), ("com.microsoft", 1)}
    gelu = torch.nn.functional.gelu(torch.from_numpy(X)).numpy()
    assert_same(answers(model, x=X), reference(Head(), gelu))


@pytest.mark.parametrize(("given_version", "kept"), [(3, 4), (4, 4), (8, 8), (9, 9), (10, 9), (11, 9)])
def test_the_ir_version_is_one_that_servers_read(given_version: int, kept: int) -> None:
    assert add_head(model_of(matmul(), ir_version=given_version), Head()).ir_version == kept


def test_the_ir_version_that_a_model_needs_is_kept() -> None:
    model = model_of(matmul(head="z = Cast <to = 1> (four) y = MatMul (x, z)"), ir_version=10, opset=21)
    model.graph.initializer.append(helper.make_tensor("four", TensorProto.INT4, [2, 3], [1, 2, 3, 4, 5, 6]))
    model = add_head(model, Head())
    assert model.ir_version == 10
    assert_same(answers(model, x=X), reference(Head(), Y))


def test_weights_that_old_models_list_as_inputs_are_weights_only() -> None:
    model = model_of(matmul(), ir_version=3)
    model.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [2, 3]))
    model = add_head(model, Head())
    assert [value.name for value in model.graph.input] == ["x"]
    assert_same(answers(model, x=X), reference(Head(), Y))


SEVERAL = """
    g (float[n, 2] x) => (float[n, 3] logits, float[n, 3] label, int64[n] scores, float[n, 4] hidden)
    <float[2, 3] w = {1, 2, 3, 4, 5, 6}, float[2, 4] v = {1, 2, 3, 4, 5, 6, 7, 8}> {
        logits = MatMul (x, w)
        label = Softmax (logits)
        certainty = Neg (label)
        scores = ArgMax <axis = 1, keepdims = 0> (certainty)
        hidden = MatMul (x, v)
    }
"""


def test_of_several_outputs_one_must_be_named() -> None:
    with pytest.raises(
        UsageError, match=r"^the model has the outputs logits, label, scores, hidden: say by output_name which"
    ):
        add_head(model_of(SEVERAL), Head())
    with pytest.raises(UsageError, match=r"^the model has no output 'logit', only logits, label, scores, hidden"):
        add_head(model_of(SEVERAL), Head(), output_name="logit")


@pytest.mark.parametrize(("name", "output"), [("logits", "logits"), ("label", "probabilities")])
def test_the_other_outputs_are_dropped_with_all_that_only_they_need(name: str, output: Any) -> None:
    model = add_head(model_of(SEVERAL), Head(), output_name="logits") if name == "logits" else None
    model = model or add_head(model_of(SEVERAL), Head(output=output), output_name=name)
    assert outputs_of(model).keys() == {"label", "certainty", "scores"}
    assert [tensor.name for tensor in model.graph.initializer] == ["w"]
    assert not {"Neg", "ArgMax"} & {node.op_type for node in model.graph.node}
    onnx.checker.check_model(model, full_check=True)
    assert_same(answers(model, x=X), reference(Head(), Y))


def test_a_head_can_be_put_behind_the_scores_of_another_head() -> None:
    once = add_head(model_of(matmul()), Head(temperature=2.0))
    twice = add_head(once, Head(output="probabilities", temperature=0.5), output_name="scores")
    thrice = add_head(twice, Head(output="probabilities"), output_name="scores")
    assert_same(answers(thrice, x=X), reference(Head(), Y))


def test_an_input_with_the_name_of_an_output_of_the_head_is_refused() -> None:
    model = model_of(LOGITS.replace("x", "scores"))
    assert outputs_of(add_head(model, Head(keep_scores=False))).keys() == {"label", "certainty"}
    with pytest.raises(UsageError, match=r"^the input 'scores' has the name of an output of the head"):
        add_head(model, Head())


BRANCHES = """
    g (float[n, 2] x) => (float[n, 3] y)
    <float[2, 3] w = {1, 2, 3, 4, 5, 6}, float label = {0.5}, float unused = {1.0}> {
        total = ReduceSum <keepdims = 0> (x)
        positive = Greater (total, label)
        scores = MatMul (x, w)
        y = If (positive) <
            then_branch = yes () => (float[n, 3] certain) { certain = Add (scores, label) },
            else_branch = no () => (float[n, 3] certainty) { certainty = Sub (scores, label) }
        >
    }
"""


def test_what_branches_take_from_around_them_stays_and_is_renamed_with_them() -> None:
    model = add_head(model_of(BRANCHES), Head())
    assert len(model.graph.initializer) == 2
    onnx.checker.check_model(model, full_check=True)
    for x in (X, X + 5):
        logits = x @ np.array([[1, 2, 3], [4, 5, 6]], dtype=np.float32)
        assert_same(answers(model, x=x), reference(Head(), logits))


def test_what_else_the_model_holds_is_kept() -> None:
    function = '<opset_import: ["": 17], domain: "local"> twice (a) => (b) { b = Add (a, a) }'
    model = model_of(LOGITS.replace("Identity", "local.twice"), functions=function)
    model.producer_name, model.graph.doc_string, model.model_version = "someone", "something", 7
    helper.set_model_props(model, {"trained": "yes"})
    headed = add_head(model, Head())
    assert (headed.producer_name, headed.graph.name, headed.graph.doc_string) == ("someone", "g", "something")
    assert (headed.model_version, headed.metadata_props[0].value) == (7, "yes")
    assert_same(answers(headed, x=X), reference(Head(), 2 * X))


def test_weights_in_files_beside_the_model_stay_there() -> None:
    model = model_of(matmul())
    weights = model.graph.initializer[0]
    weights.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weights), "w"))
    onnx.external_data_helper.set_external_data(weights, location="absent.bin")
    weights.ClearField("raw_data")
    headed = add_head(model, Head())
    assert headed.graph.initializer[0].external_data[0].value == "absent.bin"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (matmul("1, 3"), "^the output 'y' is fixed to a batch of 1: export the model with a dynamic batch axis$"),
        (matmul().replace("n, 2", "4, 2"), "^the input 'x' is fixed to a batch of 4: export"),
        ("g (float[n, c] x) => (float[n, 1] y) { y = Identity (x) }", r"^the shape of the output 'y' is \[n, 1\], but"),
        ("g (float[n, t, 9] x) => (float[n, t, 9] y) { y = Identity (x) }", r"^the shape .* 'y' is \[n, t, 9\], but a"),
        ("g (float[n] x) => (float[n] y) { y = Identity (x) }", r"^the shape of the output 'y' is \[n\], but a head"),
        ("g (float x) => (float y) { y = local.magic (x) }", "^the shape of the output 'y' is .*, but a head needs"),
        ("g (int64[n, 3] x) => (int64[n, 3] y) { y = Identity (x) }", "^the output 'y' is INT64, but a head needs"),
        ("g (double[n, 3] x) => (double[n, 3] y) { y = Identity (x) }", "^the output 'y' is DOUBLE, but a head needs"),
        (
            "g (float[n, 3] x) => (seq(float[n, 3]) y) { y = SequenceConstruct (x) }",
            "^the output 'y' is no tensor, but",
        ),
    ],
)
def test_outputs_that_no_head_fits_are_refused(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        add_head(model_of(text), Head())


@pytest.mark.parametrize("after", ["y = Identity (z)", "h = Cast <to = 10> (z) y = Cast <to = 1> (h)"])
def test_probabilities_are_not_taken_for_logits_nor_logits_for_probabilities(after: str) -> None:
    softmax_last = matmul(head=f"a = MatMul (x, w) z = Softmax (a) {after}")
    with pytest.raises(UsageError, match=r"^the output 'y' holds probabilities: ask for a head with output='probabil"):
        add_head(model_of(softmax_last), Head())
    add_head(model_of(softmax_last), Head(output="probabilities"))
    log_softmax_last = softmax_last.replace("Softmax", "LogSoftmax")
    with pytest.raises(UsageError, match=r"^the output 'y' holds log-probabilities, .* with output='logits'"):
        add_head(model_of(log_softmax_last), Head(output="probabilities"))
    add_head(model_of(log_softmax_last), Head())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"certainty": "entropy"},
            "^certainty must be one of margin, max_probability, negative_entropy, got 'entropy'",
        ),
        ({"output": "scores"}, "^output must be one of logits, probabilities, got 'scores'"),
        ({"temperature": 0.0}, "^temperature must be a positive number, got 0.0"),
        ({"temperature": -1.0}, "^temperature must be"),
        ({"temperature": float("nan")}, "^temperature must be"),
        ({"temperature": float("inf")}, "^temperature must be"),
        ({"temperature": 1e-60}, "^temperature must be"),
    ],
)
def test_a_head_that_makes_no_sense_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Head(**fields)


# --- temperature


def loss(logits: NDArray[Any], label: NDArray[Any], temperature: float) -> float:
    likelihoods = log_softmax(logits.astype(np.float64) / temperature, axis=1)
    return -float(np.mean(likelihoods[np.arange(len(label)), label]))


def drawn(logits: NDArray[Any], temperature: float, seed: int = 0) -> NDArray[Any]:
    """Labels that are as likely as softmax(logits / temperature) says."""
    noise = np.random.default_rng(seed).gumbel(size=logits.shape)
    return np.asarray((logits / temperature + noise).argmax(1))


@pytest.mark.parametrize("temperature", [0.2, 0.7, 1.0, 1.5, 4.0])
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_a_known_temperature_is_found(temperature: float, offset: float) -> None:
    logits = np.random.default_rng(1).normal(size=(20_000, 10), scale=3.0) * temperature + offset
    assert fit_temperature(logits, drawn(logits, temperature)) == pytest.approx(temperature, rel=0.03)


def test_probabilities_are_fitted_by_their_logarithms_to_the_same_temperature() -> None:
    logits = np.random.default_rng(1).normal(size=(5_000, 5), scale=3.0)
    label = drawn(logits, 2.0)
    assert fit_temperature(np.log(softmax(logits, axis=1)), label) == pytest.approx(fit_temperature(logits, label))


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 1000),
    n=st.integers(1, 30),
    scale=st.sampled_from([0.0, 1e-3, 1.0, 100.0, 1e4]),
    datatype=st.sampled_from([np.float16, np.float32, np.float64]),
)
def test_the_fit_is_never_worse_than_none_and_stays_in_its_range(
    seed: int, n: int, scale: float, datatype: Any
) -> None:
    random = np.random.default_rng(seed)
    logits = random.normal(size=(n, 4), scale=scale).astype(datatype)
    label = random.integers(0, 4, size=n)
    temperature = fit_temperature(logits, label)
    assert LOWEST <= temperature <= HIGHEST
    assert loss(logits, label, temperature) <= loss(logits, label, 1.0) * (1 + 1e-12)


@pytest.mark.parametrize(("label", "bound"), [(0, LOWEST), (1, HIGHEST)])
def test_a_model_that_is_always_right_or_always_wrong_is_taken_to_the_end_of_the_range(
    label: int, bound: float
) -> None:
    logits = np.tile(np.array([1.0, 0.0], dtype=np.float32), (100, 1))
    assert fit_temperature(logits, np.full(100, label)) == pytest.approx(bound, rel=1e-3)


def test_classes_that_are_ruled_out_do_not_disturb_the_fit() -> None:
    logits = np.random.default_rng(1).normal(size=(5_000, 4), scale=3.0)
    label = drawn(logits, 2.0)
    with_more = np.concatenate([logits, np.full((5_000, 3), -np.inf)], axis=1)
    assert fit_temperature(with_more, label) == pytest.approx(fit_temperature(logits, label))


GOOD = np.zeros((3, 2))


def changed(value: float) -> NDArray[Any]:
    logits = GOOD.copy()
    logits[1, 0] = value
    return logits


@pytest.mark.parametrize(
    ("logits", "label", "message"),
    [
        (np.zeros((0, 2)), np.zeros(0, int), r"^a temperature cannot be fitted to logits of shape \[0, 2\]"),
        (np.zeros((3, 0)), np.zeros(3, int), r"^a temperature cannot be fitted to logits of shape \[3, 0\]"),
        (GOOD, np.zeros(2, int), "^a temperature is fitted to one label per row, not to 2 for 3 rows"),
        (GOOD[:, 0], np.zeros(3, int), r"^a temperature is fitted to .* not to \[3\] and \[3\]"),
        (GOOD, np.zeros((3, 1), int), r"^a temperature is fitted to .* not to \[3, 2\] and \[3, 1\]"),
        (GOOD, np.zeros(3), "^the labels that a temperature is fitted to must be integers, not float64"),
        (GOOD, np.array([0, 1, 2]), "^the label of row 2 is 2, but the logits have the classes 0 to 1"),
        (GOOD, np.array([0, -1, 0]), "^the label of row 1 is -1, but"),
        (changed(np.nan), np.zeros(3, int), "^the logits of row 1 hold NaN or infinity"),
        (changed(np.inf), np.zeros(3, int), "^the logits of row 1 hold NaN or infinity"),
        (changed(-np.inf), np.zeros(3, int), "^the right class of row 1 has the logit -inf"),
    ],
)
def test_what_no_temperature_can_be_fitted_to_is_refused(logits: Any, label: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        fit_temperature(logits, label)


@pytest.mark.parametrize("certainty", KINDS)
def test_a_fitted_temperature_in_the_graph_makes_the_labels_as_likely_as_the_fit_says(certainty: Any) -> None:
    logits = np.random.default_rng(1).normal(size=(2_000, 5), scale=6.0).astype(np.float32)
    label = drawn(logits, 2.5)
    temperature = fit_temperature(logits, label)
    scores = run(Head(certainty=certainty, temperature=temperature), logits)["scores"]
    likelihood = -float(np.mean(np.log(scores[np.arange(2_000), label])))
    assert likelihood == pytest.approx(loss(logits, label, temperature), rel=1e-4)
