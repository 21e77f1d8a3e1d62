"""Cases that the stock clients cannot send: HTTP by hand, and gRPC through the bare stub."""

from __future__ import annotations

import gzip
import http.client
import json
import zlib
from dataclasses import dataclass, field
from typing import Any

import grpc
import numpy as np
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from orchestrator.wire.limits import MAX_ENTRIES, MAX_ID_BYTES
from tests.conformance.outcomes import Outcome, of_http, sentence
from tests.fakes.tiny import rows

INFER = "/v2/models/family/infer"
LENGTH = "Inference-Header-Content-Length"
TENSOR = {"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [7, 0.9, 0]}
RAW = rows([7], [0.9]).tobytes()
BINARY = {"name": "x", "datatype": "FP32", "shape": [1, 3], "parameters": {"binary_data_size": len(RAW)}}
LABEL = [{"name": "label"}]
ALL = [{"name": name} for name in ("label", "certainty", "scores", "stage")]


@dataclass
class Http:
    """One request, as sent."""

    method: str
    path: str
    body: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)

    def run(self, address: str) -> Outcome:
        """What came back, unfolded."""
        host, _, port = address.partition(":")
        connection = http.client.HTTPConnection(host, int(port), timeout=10)
        try:
            connection.request(self.method, self.path, self.body, self.headers)
            response = connection.getresponse()
            body = response.read()
            if (encoding := response.getheader("Content-Encoding")) is not None:
                body = gzip.decompress(body) if encoding == "gzip" else zlib.decompress(body)
            return of_http(response.status, dict(response.getheaders()), body)
        finally:
            connection.close()


def _infer(**changes: Any) -> Http:
    """A JSON request; a key that is None is left out."""
    document = {"inputs": [TENSOR], "outputs": LABEL} | changes
    return Http(
        "POST", INFER, json.dumps({key: value for key, value in document.items() if value is not None}).encode()
    )


def _tensor(**changes: Any) -> Http:
    tensor = TENSOR | changes
    return _infer(inputs=[{key: value for key, value in tensor.items() if value is not None}])


def _binary(item: dict[str, Any], *buffers: bytes, **changes: Any) -> Http:
    head = json.dumps({"inputs": [item], "outputs": LABEL} | changes).encode()
    return Http("POST", INFER, head + b"".join(buffers), {LENGTH: str(len(head))})


def _with(request: Http, body: bytes | None = None, **headers: str) -> Http:
    named = {key.replace("_", "-"): value for key, value in headers.items()}
    return Http(request.method, request.path, request.body if body is None else body, request.headers | named)


_GOOD = _infer().body or b""
_LONG = _infer(inputs=[TENSOR | {"shape": [64, 3], "data": [7, 0.9, 0] * 64}], outputs=ALL)

HTTP: dict[str, Http] = {
    "path-unknown": Http("GET", "/v2/nothing"),
    "path-of-a-model-unknown": Http("GET", "/v2/models/family/nothing"),
    "path-with-a-slash-behind": Http("GET", "/v2/"),
    "path-infer-get": Http("GET", INFER),
    "path-metadata-post": Http("POST", "/v2/models/family"),
    "path-config-post": Http("POST", "/v2/models/family/config"),
    "path-index-get": Http("GET", "/v2/repository/index"),
    "path-put": Http("PUT", "/v2"),
    "path-head": Http("HEAD", "/v2"),
    "path-no-version": Http("GET", "/v2/models/family/versions/x"),
    "health-live": Http("GET", "/v2/health/live"),
    "health-ready": Http("GET", "/v2/health/ready"),
    "model-ready-http": Http("GET", "/v2/models/family/versions/1/ready"),
    "model-not-ready-http": Http("GET", "/v2/models/nope/ready"),
    "index-bad-json": Http("POST", "/v2/repository/index", b"{"),
    "index-of-ready-models": Http("POST", "/v2/repository/index", b'{"ready": "yes"}'),
    "json": _infer(outputs=ALL),
    "json-nested": _tensor(data=[[7, 0.9, 0]]),
    "json-oddly-nested": _tensor(data=[[7], [0.9, 0]]),
    "json-unknown-keys": _infer(anything={"a": [1]}),
    "json-empty-id": _infer(id=""),
    "json-id": _infer(id="a"),
    "json-without-outputs": _infer(outputs=None),
    "json-broken": Http("POST", INFER, b'{"inputs": ['),
    "json-array": Http("POST", INFER, b"[]"),
    "json-no-inputs": _infer(inputs=None),
    "json-inputs-no-list": _infer(inputs={}),
    "json-empty-inputs": _infer(inputs=[]),
    "json-no-name": _tensor(name=None),
    "json-no-shape": _tensor(shape=None),
    "json-no-datatype": _tensor(datatype=None),
    "json-no-data": _tensor(data=None),
    "json-wrong-name": _tensor(name="y"),
    "json-unknown-datatype": _tensor(datatype="INT7"),
    "json-wrong-datatype": _tensor(datatype="FP64"),
    "json-negative-shape": _tensor(shape=[-1, 3]),
    "json-wrong-shape": _tensor(shape=[1, 2], data=[1, 2]),
    "json-too-few-elements": _tensor(data=[1, 2]),
    "json-too-many-elements": _tensor(data=[1, 2, 3, 4]),
    "json-text-for-a-number": _tensor(data=["a", 1, 2]),
    "json-truth-for-a-number": _tensor(data=[True, 1, 2]),
    "json-null-for-a-number": _tensor(data=[None, 1, 2]),
    "json-beyond-the-range": _infer(inputs=[TENSOR | {"data": [7, 0.9, 1e39]}], outputs=[{"name": "scores"}]),
    "json-input-twice": _infer(inputs=[TENSOR, TENSOR]),
    "json-two-inputs": _infer(inputs=[TENSOR, TENSOR | {"name": "y"}]),
    "json-long-id": _infer(id="a" * (MAX_ID_BYTES + 1)),
    "json-many-outputs": _infer(outputs=LABEL * (MAX_ENTRIES + 1)),
    "json-many-parameters": _infer(parameters={str(i): 1 for i in range(MAX_ENTRIES + 1)}),
    "json-id-no-text": _infer(id=5),
    "json-output-without-name": _infer(outputs=[{}]),
    "json-unknown-output": _infer(outputs=[{"name": "nope"}]),
    "json-parameter-no-scalar": _infer(parameters={"a": [1]}),
    "json-binary-output-no-truth": _infer(parameters={"binary_data_output": 1}),
    "json-binary-outputs": _infer(parameters={"binary_data_output": True}, outputs=None),
    "json-binary-and-named-outputs": _infer(parameters={"binary_data_output": True}),
    "json-one-binary-output": _infer(
        outputs=[{"name": "label", "parameters": {"binary_data": True}}, {"name": "stage"}]
    ),
    "binary": _binary(BINARY, RAW),
    "binary-out": _binary(BINARY, RAW, outputs=[output | {"parameters": {"binary_data": True}} for output in ALL]),
    "binary-too-long": _binary(BINARY, RAW + b"x"),
    "binary-too-short": _binary(BINARY, RAW[:-1]),
    "binary-size-too-small": _binary(BINARY | {"parameters": {"binary_data_size": 8}}, RAW),
    "binary-size-negative": _binary(BINARY | {"parameters": {"binary_data_size": -1}}, RAW),
    "binary-and-data": _binary(BINARY | {"data": [1, 2, 3]}, RAW),
    "binary-header-beyond-the-body": _with(_infer(), **{LENGTH: "99999"}),
    "binary-header-negative": _with(_infer(), **{LENGTH: "-1"}),
    "binary-header-no-number": _with(_infer(), **{LENGTH: "x"}),
    "raw": Http("POST", INFER, RAW, {LENGTH: "0"}),
    "raw-too-long": Http("POST", INFER, RAW + b"abcd", {LENGTH: "0"}),
    "raw-for-many-inputs": Http("POST", "/v2/models/mixed/infer", RAW, {LENGTH: "0"}),
    "raw-empty": Http("POST", INFER, b""),
    "gzip-in": _with(_infer(), gzip.compress(_GOOD), Content_Encoding="gzip"),
    "deflate-in": _with(_infer(), zlib.compress(_GOOD), Content_Encoding="deflate"),
    "identity-in": _with(_infer(), Content_Encoding="identity"),
    "br-in": _with(_infer(), Content_Encoding="br"),
    "gzip-in-that-is-none": _with(_infer(), Content_Encoding="gzip"),
    "gzip-in-cut-short": _with(_infer(), gzip.compress(_GOOD)[:-12], Content_Encoding="gzip"),
    "gzip-out": _with(_LONG, Accept_Encoding="gzip"),
    "deflate-out": _with(_LONG, Accept_Encoding="deflate"),
    "gzip-or-deflate-out": _with(_LONG, Accept_Encoding="gzip, deflate"),
    "deflate-or-gzip-out": _with(_LONG, Accept_Encoding="deflate, gzip"),
    "deflate-rather-than-gzip-out": _with(_LONG, Accept_Encoding="gzip;q=0.1, deflate;q=0.5"),
    "br-out": _with(_LONG, Accept_Encoding="br"),
    "anything-out": _with(_LONG, Accept_Encoding="*"),
    "gzip-out-of-little": _with(_infer(), Accept_Encoding="gzip"),
    "gzip-out-of-an-error": _with(_tensor(name="y"), Accept_Encoding="gzip"),
    "generate": Http("POST", "/v2/models/family/generate", b"{}"),
    "load-http": Http("POST", "/v2/repository/models/nope/load", b"{}"),
    "load-of-a-repository": Http("POST", "/v2/repository/other/models/nope/load", b"{}"),
}


def _message(inputs: Any = None, raw: tuple[bytes, ...] = (RAW,), **changes: Any) -> Any:
    fields: dict[str, Any] = {"model_name": "family", "outputs": LABEL} | changes
    given = [{"name": "x", "datatype": "FP32", "shape": [1, 3]}] if inputs is None else inputs
    return service_pb2.ModelInferRequest(inputs=given, raw_input_contents=raw, **fields)


def _typed(shape: tuple[int, ...] = (1, 3), datatype: str = "FP32", **contents: Any) -> Any:
    given = {"name": "x", "datatype": datatype, "shape": shape, "contents": contents}
    return _message([given], ())


_X = {"name": "x", "datatype": "FP32", "shape": [1, 3]}

GRPC: dict[str, Any] = {
    "typed": _typed(fp32_contents=[7, 0.9, 0]),
    "typed-wrong-field": _typed(int_contents=[1, 2, 3]),
    "typed-too-few": _typed(fp32_contents=[1, 2]),
    "typed-too-many": _typed(fp32_contents=[1, 2, 3, 4]),
    "typed-and-raw": _message([_X | {"contents": {"fp32_contents": [7, 0.9, 0]}}]),
    "raw-none": _message(raw=()),
    "raw-too-many": _message(raw=(RAW, RAW)),
    "raw-short": _message(raw=(RAW[:-1],)),
    "version-no-number": _message(model_version="x"),
    "datatype-unknown": _message([_X | {"datatype": "INT7"}]),
    "shape-negative": _message([_X | {"shape": [-1, 3]}]),
    "input-twice": _message([_X, _X], (RAW, RAW)),
    "parameter-without-value": _message(parameters={"a": {}}),
    "parameter-uint64": _message(parameters={"a": {"uint64_param": 1}}),
    "parameter-double": _message(parameters={"a": {"double_param": 1.5}}),
    "parameter-empty-final": _message(parameters={"triton_enable_empty_final_response": {"bool_param": True}}),
    "parameter-empty-final-no-truth": _message(
        parameters={"triton_enable_empty_final_response": {"string_param": "yes"}}
    ),
    "long-id": _message(id="a" * (MAX_ID_BYTES + 1)),
    "many-outputs": _message(outputs=LABEL * (MAX_ENTRIES + 1)),
    "many-parameters": _message(parameters={str(i): {"int64_param": 1} for i in range(MAX_ENTRIES + 1)}),
    "metadata-version-no-number": ("ModelMetadata", {"name": "family", "version": "x"}),
    "ready-version-no-number": ("ModelReady", {"name": "family", "version": "x"}),
    "config-version-no-number": ("ModelConfig", {"name": "family", "version": "x"}),
    "statistics-version-no-number": ("ModelStatistics", {"name": "family", "version": "x"}),
    "metadata-no-name": ("ModelMetadata", {}),
    "index-of-a-repository": ("RepositoryIndex", {"repository_name": "other"}),
}


def run_grpc(case: Any, address: str) -> Outcome:
    """Send one message; a pair names another RPC and its request."""
    with grpc.insecure_channel(address) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        rpc, request = ("ModelInfer", case)
        if isinstance(case, tuple):
            rpc, request = case[0], getattr(service_pb2, f"{case[0]}Request")(**case[1])
        try:
            answer = getattr(stub, rpc)(request, timeout=10)
        except grpc.RpcError as error:
            return {"status": error.code().name, "message": sentence(error.details() or "")}
    outcome: Outcome = {"status": "ok"}
    if rpc == "ModelInfer":
        outcome["label"] = [np.frombuffer(raw, np.int64).tolist() for raw in answer.raw_output_contents]
        outcome["form"] = ["contents" if output.HasField("contents") else "raw" for output in answer.outputs]
    return outcome


def run_services(address: str) -> dict[str, Outcome]:
    """What the services beside the protocol's own say."""
    outcomes: dict[str, Outcome] = {}
    with grpc.insecure_channel(address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", "inference.GRPCInferenceService", "anything"):
            status = health.Check(health_pb2.HealthCheckRequest(service=name)).status
            outcomes[f"health-of-{name or 'all'}"] = {"status": "ok", "answer": status}
        try:
            next(health.Watch(health_pb2.HealthCheckRequest(), timeout=5))
        except grpc.RpcError as error:
            outcomes["health-watch"] = {"status": error.code().name}
        try:
            reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
            asked = reflection_pb2.ServerReflectionRequest(list_services="")
            next(reflection.ServerReflectionInfo(iter([asked]), timeout=5))
            outcomes["reflection"] = {"status": "ok"}
        except grpc.RpcError as error:
            outcomes["reflection"] = {"status": error.code().name}
    return outcomes
