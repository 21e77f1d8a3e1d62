"""A model of a Triton that is no cascade: through the orchestrator its answers are Triton's own, to the byte."""

from __future__ import annotations

import contextlib
import http.client
import json
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from tests.fakes.servers import Stack, running
from tests.fakes.tiny import plan_document, write_repository

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.triton, pytest.mark.timeout(120)]

X = np.array([[7, 0.9, 0.0], [8, 0.1, 0.0]], np.float32)
GUEST = "third"
BINARY = json.dumps(
    {
        "id": "one",
        "inputs": [
            {"name": "x", "datatype": "FP32", "shape": [2, 3], "parameters": {"binary_data_size": X.nbytes}},
        ],
        "parameters": {"binary_data_output": True},
    }
).encode()
LISTED = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [2, 3], "data": X.tolist()}]}
# method, path after the model, body, headers
REQUESTS: dict[str, tuple[str, str, bytes, dict[str, str]]] = {
    "metadata": ("GET", "", b"", {}),
    "metadata of a version": ("GET", "/versions/1", b"", {}),
    "metadata of no version": ("GET", "/versions/7", b"", {}),
    "config": ("GET", "/config", b"", {}),
    "ready": ("GET", "/ready", b"", {}),
    "ready of no version": ("GET", "/versions/7/ready", b"", {}),
    "infer": ("POST", "/infer", json.dumps(LISTED).encode(), {}),
    "infer a version": ("POST", "/versions/1/infer", json.dumps(LISTED).encode(), {}),
    "infer no version": ("POST", "/versions/7/infer", json.dumps(LISTED).encode(), {}),
    "infer binary": ("POST", "/infer", BINARY + X.tobytes(), {"Inference-Header-Content-Length": str(len(BINARY))}),
    "infer, answered in gzip": ("POST", "/infer", json.dumps(LISTED).encode(), {"Accept-Encoding": "gzip"}),
    "infer too many rows": (
        "POST", "/infer",
        json.dumps({"inputs": [LISTED["inputs"][0] | {"shape": [100, 3], "data": [0.5] * 300}]}).encode(), {},
    ),
    "infer nonsense": ("POST", "/infer", b"{", {}),
}  # fmt: skip
COMPARED = ("content-type", "content-encoding", "inference-header-content-length")


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder: Path = tmp_path_factory.mktemp("passing")
    (folder / "repository").mkdir()
    repository = write_repository(folder / "repository", ("small", "large", GUEST))
    plan = folder / "plan.json"
    plan.write_text(json.dumps(plan_document(("a",))))
    with running(Stack(folder, repository, plan, ("a",))) as stack:
        yield stack


def ask(port: int, model: str, request: tuple[str, str, bytes, dict[str, str]]) -> tuple[int, bytes, dict[str, Any]]:
    """Status, body and headers."""
    method, path, body, headers = request
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as connection:
        connection.request(method, f"/v2/models/{model}{path}", body or None, headers)
        answer = connection.getresponse()
        return answer.status, answer.read(), {name: answer.headers.get(name) for name in COMPARED}


def call(address: str, name: str, request: Any) -> Any:
    """The response, or code and sentence of the error."""
    with grpc.insecure_channel(address) as channel:
        try:
            return getattr(service_pb2_grpc.GRPCInferenceServiceStub(channel), name)(request, timeout=20)
        except grpc.RpcError as error:
            return error.code(), error.details()


def infer_request(model: str = GUEST, version: str = "", rows: Any = X) -> Any:
    request = service_pb2.ModelInferRequest(model_name=model, model_version=version, id="two")
    request.inputs.add(name="x", datatype="FP32", shape=rows.shape)
    request.raw_input_contents.append(rows.tobytes())
    return request


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
def test_over_http_the_answer_is_tritons(stack: Stack, request_: tuple[str, str, bytes, dict[str, str]]) -> None:
    theirs = ask(stack.ports["a"][0], GUEST, request_)
    assert ask(stack.http_port, GUEST, request_) == theirs
    if request_ is REQUESTS["infer binary"]:
        assert theirs[0] == 200
        assert np.array([7, 8], np.int64).tobytes() in theirs[1]


@pytest.mark.parametrize("version", ["", "1", "7"])
def test_over_grpc_the_answer_is_tritons(stack: Stack, version: str) -> None:
    requests = {
        "ModelMetadata": service_pb2.ModelMetadataRequest(name=GUEST, version=version),
        "ModelConfig": service_pb2.ModelConfigRequest(name=GUEST, version=version),
        "ModelReady": service_pb2.ModelReadyRequest(name=GUEST, version=version),
        "ModelInfer": infer_request(version=version),
    }
    triton = f"127.0.0.1:{stack.ports['a'][1]}"
    for name, request in requests.items():
        assert call(stack.grpc_address, name, request) == call(triton, name, request)
    if version != "7":
        labels = call(stack.grpc_address, "ModelInfer", requests["ModelInfer"]).raw_output_contents
        assert X[:, 0].astype(np.int64).tobytes() in labels
    wrong = infer_request(rows=np.zeros((2, 5), np.float32))
    assert call(stack.grpc_address, "ModelInfer", wrong) == call(triton, "ModelInfer", wrong)


def test_over_a_stream_too(stack: Stack) -> None:
    with grpc.insecure_channel(stack.grpc_address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        answers = list(stub.ModelStreamInfer(iter([infer_request(), infer_request("family")]), timeout=20))
    assert [answer.infer_response.model_name for answer in answers] == [GUEST, "family"]
    assert not any(answer.error_message for answer in answers)


def test_models_of_the_plan_and_unknown_ones_are_answered_as_ever(stack: Stack) -> None:
    for model in ("small", "nobody"):
        for request in ("infer", "metadata", "config"):
            status, body, _ = ask(stack.http_port, model, REQUESTS[request])
            assert (status, json.loads(body)) == (
                404, {"error": f"Request for unknown model: '{model}' is not found"}
            )  # fmt: skip
        assert call(stack.grpc_address, "ModelInfer", infer_request(model))[0] is grpc.StatusCode.NOT_FOUND
    assert ask(stack.http_port, "family", REQUESTS["infer"])[0] == 200


def test_behind_fronts_it_is_refused_in_a_sentence(stack: Stack) -> None:
    """The last one: it starts the orchestrator anew."""
    assert stack.orchestrator is not None
    stack.orchestrator.stop()
    stack.start_orchestrator("--fronts=1")
    status, body, _ = ask(stack.http_port, GUEST, REQUESTS["infer"])
    assert (status, "passes nothing on; ask its Triton" in body.decode()) == (501, True)
    code, sentence = call(stack.grpc_address, "ModelInfer", infer_request())
    assert code is grpc.StatusCode.UNIMPLEMENTED
    assert "passes nothing on; ask its Triton" in sentence
    assert ask(stack.ports["a"][0], GUEST, REQUESTS["ready"])[0] == 200
