from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from cascadeserve.errors import DeadlineExceeded, InvalidRequest, NotFound, Unavailable
from orchestrator.wire.tensors import InferRequest, RequestedOutput, Tensor
from tests.fakes.tiny import plan_document, rows
from tests.orchestrator.conftest import make_rig

pytestmark = pytest.mark.looptime

X = rows([1, 2], [0.9, 0.1])


def request(**changes: Any) -> InferRequest:
    fields: dict[str, Any] = {"model_name": "family", "inputs": [Tensor("x", "FP32", X)]}
    return InferRequest(**fields | changes)


async def test_label_is_the_answer_when_no_output_is_named() -> None:
    rig = await make_rig()
    response = await rig.orchestrator.data_plane.infer(request(id="7"))
    assert [output.name for output in response.outputs] == ["label"]
    assert response.outputs[0].array.tolist() == [[1], [102]]
    assert (response.id, response.model_name, response.model_version) == ("7", "family", "1")
    assert response.parameters == {"gear": "calm", "plan": "tiny", "certified": False}


@pytest.mark.parametrize(("epsilon", "certified"), [(0.004, True), (0.0, True), (None, False)])
async def test_an_answer_is_certified_if_its_cascade_is(epsilon: float | None, certified: bool) -> None:
    document = plan_document()
    document["families"]["family"]["ladder"][1]["epsilon"] = epsilon
    rig = await make_rig(document)
    response = await rig.orchestrator.data_plane.infer(request())
    assert response.parameters["certified"] is certified


async def test_outputs_come_in_the_order_asked_for() -> None:
    rig = await make_rig()
    names = ["stage", "scores", "label", "certainty"]
    response = await rig.orchestrator.data_plane.infer(request(outputs=[RequestedOutput(name) for name in names]))
    assert [(output.name, output.datatype, output.array.shape) for output in response.outputs] == [
        ("stage", "INT32", (2, 1)),
        ("scores", "FP32", (2, 3)),
        ("label", "INT64", (2, 1)),
        ("certainty", "FP32", (2, 1)),
    ]
    np.testing.assert_array_equal(response.outputs[1].array, X)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"inputs": []}, "expected 1 inputs but got 0 inputs for model 'family'; it takes 'x'"),
        ({"inputs": [Tensor("y", "FP32", X)]}, "unexpected inference input 'y' for model 'family'; it takes 'x'"),
        ({"inputs": [Tensor("x", "FP32", X), Tensor("y", "FP32", X)]}, "expected 1 inputs but got 2 inputs"),
        ({"inputs": [Tensor("x", "FP64", X.astype(float))]}, "data-type is 'FP64', but model 'family' expects 'FP32'"),
        ({"inputs": [Tensor("x", "FP32", X[0])]}, r"Expected \[-1,3\], got \[3\]"),
        ({"inputs": [Tensor("x", "FP32", X[:, :2])]}, r"Expected \[-1,3\], got \[2,2\]"),
        ({"inputs": [Tensor("x", "FP32", X[:0])]}, r"got \[0,3\]"),
        ({"outputs": [RequestedOutput("logits")]}, "unexpected inference output 'logits'"),
        ({"parameters": {"timeout": "soon"}}, "'timeout' must be a whole number"),
        ({"parameters": {"timeout": -1}}, "'timeout' must be a whole number"),
        ({"parameters": {"timeout": True}}, "'timeout' must be a whole number"),
    ],
)
async def test_requests_that_do_not_fit_the_family_are_refused(changes: dict[str, Any], sentence: str) -> None:
    rig = await make_rig()
    with pytest.raises(InvalidRequest, match=sentence):
        await rig.orchestrator.data_plane.infer(request(**changes))
    assert not rig.fakes["a"].calls


@pytest.mark.parametrize("changes", [{"model_name": "small"}, {"model_name": ""}, {"model_version": "2"}])
async def test_unknown_models_and_versions_are_not_found(changes: dict[str, str]) -> None:
    rig = await make_rig()
    with pytest.raises(NotFound, match="is not found"):
        await rig.orchestrator.data_plane.infer(request(**changes))


async def test_timeout_parameter_is_in_microseconds(looptime: float) -> None:
    rig = await make_rig(busy_s={"small": 10.0})
    with pytest.raises(DeadlineExceeded):
        await rig.orchestrator.data_plane.infer(request(parameters={"timeout": 250_000}))
    assert looptime == pytest.approx(0.25, abs=0.01)


async def test_the_shorter_of_timeout_and_transport_deadline_counts(looptime: float) -> None:
    rig = await make_rig(busy_s={"small": 10.0})
    with pytest.raises(DeadlineExceeded):
        await rig.orchestrator.data_plane.infer(request(parameters={"timeout": 9_000_000}, client_timeout_s=0.5))
    assert looptime == pytest.approx(0.5, abs=0.01)


async def test_default_deadline_is_four_slos(looptime: float) -> None:
    rig = await make_rig(busy_s={"small": 10.0})
    plane = rig.orchestrator.data_plane
    assert [plane.default_deadline_s(name, "1") for name in ("family", "unknown")] == [2.0, None]
    with pytest.raises(DeadlineExceeded):
        await plane.infer(request())
    assert looptime == pytest.approx(2.0, abs=0.01)


async def test_readiness_follows_the_endpoints_and_the_shutdown() -> None:
    rig = await make_rig()
    plane = rig.orchestrator.data_plane
    assert plane.ready()
    assert plane.model_ready("family", "1")
    rig.fakes["a"].down = True
    await rig.probe()
    assert not plane.ready()
    assert not plane.model_ready("family", "")
    with pytest.raises(Unavailable):
        await plane.infer(request())
    rig.fakes["a"].down = False
    await rig.probe()
    assert plane.ready()
    plane.draining = True
    assert not plane.ready()
    assert (await plane.infer(request())).outputs  # what is open is still answered
    plane.refusing = True
    with pytest.raises(Unavailable, match="shutting down"):
        await plane.infer(request())


async def test_metadata_describes_the_cascade_as_one_model() -> None:
    rig = await make_rig()
    metadata = rig.orchestrator.data_plane.model_metadata("family", "")
    assert (metadata.name, metadata.versions) == ("family", ("1",))
    assert [(tensor.name, tensor.datatype, tensor.shape) for tensor in metadata.inputs] == [("x", "FP32", (-1, 3))]
    assert [tensor.name for tensor in metadata.outputs] == ["label", "certainty", "scores", "stage"]


async def test_a_family_without_scores_offers_none_and_refuses_to_give_them() -> None:
    document = plan_document()
    document["families"]["family"]["num_classes"] = None
    plane = (await make_rig(document)).orchestrator.data_plane
    assert [tensor.name for tensor in plane.model_metadata("family", "").outputs] == ["label", "certainty", "stage"]
    with pytest.raises(InvalidRequest, match=r"output 'scores' for model 'family'; it has label, certainty, stage$"):
        await plane.infer(request(outputs=[RequestedOutput("scores")]))
    assert (await plane.infer(request())).outputs[0].array.tolist() == [[1], [102]]


async def test_outcomes_are_counted() -> None:
    rig = await make_rig()
    await rig.orchestrator.data_plane.infer(request())
    with pytest.raises(InvalidRequest):
        await rig.orchestrator.data_plane.infer(request(inputs=[]))
    text = rig.orchestrator.metrics.render()[0].decode()
    assert 'cascadeserve_requests_total{family="family",outcome="ok"} 1.0' in text
    assert 'cascadeserve_requests_total{family="family",outcome="InvalidRequest"} 1.0' in text
    assert 'cascadeserve_rows_answered_total{family="family",stage="0"} 1.0' in text
    assert 'cascadeserve_rows_answered_total{family="family",stage="1"} 1.0' in text
