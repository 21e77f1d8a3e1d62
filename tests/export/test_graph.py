from __future__ import annotations

from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper, parser

from cascadeserve.errors import ExportRefused
from export.graph import Cut, all_nodes, name_nodes, read_by, tidy

HEADER = '<ir_version: 9, opset_import: ["" : 17]>\n'
# two layers, a residual that joins them, and probabilities
MODEL = """tiny (float[n, 4] x) => (float[n, 4] scores)
<float[4, 4] first = {1,0,0,0, 0,1,0,0, 0,0,1,0, 0,0,0,1}, float[4, 4] second = {1,0,0,0, 0,1,0,0, 0,0,1,0, 0,0,0,1},
 float[4] bias = {1, 2, 3, 4}>
{
    hidden = MatMul(x, first)
    active = Relu(hidden)
    product = MatMul(active, second)
    sum = Add(product, active)
    logits = Add(sum, bias)
    cast = Cast<to = 1>(logits)
    scores = Softmax(cast)
}"""


def model_of(text: str = MODEL) -> onnx.ModelProto:
    return parser.parse_model(HEADER + text)


def operators(nodes: Any) -> list[str]:
    return [node.op_type for node in nodes]


def test_the_tail_is_all_that_does_not_lead_to_the_logits() -> None:
    cut = Cut(model_of().graph)
    assert cut.logits == "logits"
    assert operators(cut.body) == ["MatMul", "Relu", "MatMul", "Add", "Add"]
    assert operators(cut.tail) == ["Cast", "Softmax"]


def test_the_last_layer_reaches_back_to_the_last_matrix_on_every_way() -> None:
    graph = model_of().graph
    # the residual leads past the second matrix to the first
    assert operators(Cut(graph).last_layer(graph.initializer)) == ["MatMul", "Relu", "MatMul", "Add", "Add"]
    graph = model_of(MODEL.replace("Add(product, active)", "Add(product, product)")).graph
    assert operators(Cut(graph).last_layer(graph.initializer)) == ["MatMul", "Add", "Add"]


def test_an_output_that_is_no_softmax_is_the_logits_themselves() -> None:
    cut = Cut(model_of(MODEL.replace("scores = Softmax(cast)", "scores = Relu(cast)")).graph)
    assert cut.logits == "scores"
    assert cut.tail == []


def with_branches() -> onnx.NodeProto:
    """An If whose branches read `outer` and have tensors of their own."""
    value = helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)
    branch = helper.make_graph([helper.make_node("Relu", ["outer"], ["inner"])], "branch", [], [value])
    return helper.make_node("If", ["condition"], ["y"], then_branch=branch, else_branch=branch)


def test_a_node_reads_what_its_subgraphs_capture() -> None:
    assert read_by(with_branches()) == {"condition", "outer"}


def test_nodes_of_subgraphs_and_functions_are_found() -> None:
    model = model_of()
    model.graph.node.append(with_branches())
    model.functions.append(
        helper.make_function("mine", "F", ["a"], ["b"], [helper.make_node("Exp", ["a"], ["b"])], model.opset_import)
    )
    found = operators(all_nodes(model))
    assert len(found) == 7 + 1 + 2 + 1
    assert found.count("Relu") == 3
    assert found[-1] == "Exp"


def test_every_node_gets_a_name_of_its_own() -> None:
    graph = model_of().graph
    graph.node[0].name = graph.node[1].name = "taken"
    name_nodes(graph)
    names = [node.name for node in graph.node]
    assert names[0] == "taken"
    assert len(set(names)) == len(names)
    assert all(names)


def test_a_tidy_model_is_in_order_and_says_no_more_than_its_source() -> None:
    source = model_of()
    wanted = tidy(model_of(), source)
    model = model_of()
    model.ir_version = 10
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    model.graph.name = "made by a tool"
    helper.set_model_props(model, {"made": "somewhere"})
    model.graph.value_info.append(helper.make_tensor_value_info("hidden", TensorProto.FLOAT, ["n", 4]))
    model.graph.initializer.append(helper.make_tensor("left over", TensorProto.FLOAT, [1], [0.0]))
    last = model.graph.initializer.pop()
    model.graph.initializer.insert(0, last)
    backwards = list(model.graph.node)[::-1]
    del model.graph.node[:]
    model.graph.node.extend(backwards)
    found = tidy(model, source)
    onnx.checker.check_model(found, full_check=True)
    assert sorted(operators(found.graph.node)) == sorted(operators(source.graph.node))
    assert found.graph.name == "tiny"
    assert (found.ir_version, [opset.domain for opset in found.opset_import]) == (9, [""])
    assert not found.metadata_props
    del found.graph.node[:]
    del wanted.graph.node[:]
    assert found == wanted


def test_operators_of_a_domain_that_the_source_did_not_need_are_refused() -> None:
    model = model_of()
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    model.graph.node[1].domain = "com.microsoft"
    with pytest.raises(ExportRefused, match=r"^tiny: .* put in operators of com\.microsoft"):
        tidy(model, model_of())


def test_a_cycle_is_refused() -> None:
    with pytest.raises(ExportRefused, match="its graph has a cycle"):
        tidy(model_of(MODEL.replace("MatMul(x, first)", "MatMul(active, first)")), model_of())
