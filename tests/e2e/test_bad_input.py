"""Bad requests get the status Triton would give and one sentence; bad files end a command with exit 2 and the field."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

import grpc
import pytest
from tritonclient.grpc import service_pb2, service_pb2_grpc

from tests.e2e.conftest import ONE_PROCESS_OR_FRONTS, ROOT

if TYPE_CHECKING:
    from pathlib import Path

    from tests.fakes.servers import Stack

pytestmark = [pytest.mark.triton, pytest.mark.timeout(120)]

SHAPE = [1, 1, 32, 32]
GOOD: dict[str, Any] = {"name": "image", "shape": SHAPE, "datatype": "FP32", "data": [0.0] * 1024}


def post(stack: Stack, body: bytes, *, model: str = "digits", headers: dict[str, str] | None = None) -> tuple[int, str]:
    request = urllib.request.Request(
        f"{stack.url}/v2/models/{model}/infer",
        data=body,
        headers={"Content-Type": "application/json"} | (headers or {}),
    )
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())["error"]


def body(**changes: Any) -> bytes:
    return json.dumps({"inputs": [GOOD | changes]}).encode()


@ONE_PROCESS_OR_FRONTS
@pytest.mark.parametrize(
    ("content", "status", "word"),
    [
        (body(name="picture"), 400, "picture"),
        (body(datatype="FP64"), 400, "FP64"),
        (body(datatype="FLOAT"), 400, "FLOAT"),
        (body(shape=[1, 32, 32]), 400, "shape"),
        (body(shape=[2, 1, 32, 32]), 400, "image"),
        (body(shape=[0, 1, 32, 32], data=[]), 400, "shape"),
        (body(shape=[-1, 1, 32, 32]), 400, "shape"),
        (body(data=[0.0] * 1023), 400, "1023"),
        (body(data=["x"] * 1024), 400, ""),
        (b'{"inputs": [', 400, ""),
        (b"[]", 400, ""),
        (b"", 400, ""),
        (b'{"inputs": []}', 400, "image"),
        (json.dumps({"inputs": [GOOD], "outputs": [{"name": "logits"}]}).encode(), 400, "logits"),
        (json.dumps({"inputs": [GOOD], "parameters": {"timeout": "x"}}).encode(), 400, "timeout"),
    ],
)
def test_http(digits: Stack, content: bytes, status: int, word: str) -> None:
    got, sentence = post(digits, content)
    assert got == status, sentence
    assert word in sentence
    assert sentence
    assert "\n" not in sentence
    assert "Traceback" not in sentence


@ONE_PROCESS_OR_FRONTS
def test_http_unknown_model(digits: Stack) -> None:
    assert post(digits, body(), model="nope") == (404, "Request for unknown model: 'nope' is not found")
    assert post(digits, body(), model="digits/versions/9")[0] == 404
    assert post(digits, body(), model="digits_cnn")[0] == 404  # stages are not offered one by one


@ONE_PROCESS_OR_FRONTS
def test_http_wrong_byte_count(digits: Stack) -> None:
    entry = {"name": "image", "shape": SHAPE, "datatype": "FP32", "parameters": {"binary_data_size": 4096}}
    head = json.dumps({"inputs": [entry]}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head)), "Content-Type": "application/octet-stream"}
    for size in (0, 4092, 5000):
        status, sentence = post(digits, head + bytes(size), headers=headers)
        assert status == 400
        assert sentence
    assert post(digits, head + bytes(4096), headers=headers)[0] == 200


@ONE_PROCESS_OR_FRONTS
def test_http_oversize(digits: Stack) -> None:
    entry = {"name": "image", "shape": [20_000, 1, 32, 32], "datatype": "FP32"}
    size = 20_000 * 4096  # over the default of 64 MiB
    entry["parameters"] = {"binary_data_size": size}
    head = json.dumps({"inputs": [entry]}).encode()
    headers = {"Inference-Header-Content-Length": str(len(head)), "Content-Type": "application/octet-stream"}
    try:
        status, sentence = post(digits, head + bytes(size), headers=headers)
    except urllib.error.URLError as error:  # refused while the body was still being sent
        assert isinstance(error.reason, BrokenPipeError | ConnectionResetError)  # noqa: PT017
        return
    assert status == 413
    assert "\n" not in sentence


def grpc_code(stack: Stack, **changes: Any) -> tuple[grpc.StatusCode, str]:
    fields: dict[str, Any] = {
        "model": "digits",
        "name": "image",
        "datatype": "FP32",
        "shape": SHAPE,
        "raw": bytes(4096),
    }
    fields |= changes
    request = service_pb2.ModelInferRequest(model_name=fields["model"])
    request.inputs.add(name=fields["name"], datatype=fields["datatype"], shape=fields["shape"])
    request.raw_input_contents.append(fields["raw"])
    with grpc.insecure_channel(stack.grpc_address, options=[("grpc.max_send_message_length", -1)]) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        try:
            stub.ModelInfer(request, timeout=20)
        except grpc.RpcError as error:
            return error.code(), error.details()
    return grpc.StatusCode.OK, ""


@ONE_PROCESS_OR_FRONTS
@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({}, grpc.StatusCode.OK),
        ({"model": "nope"}, grpc.StatusCode.NOT_FOUND),
        ({"name": "picture"}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"datatype": "FP16", "raw": bytes(2048)}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"datatype": "FLOAT"}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"shape": [1, 32, 32]}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"shape": [-1, 1, 32, 32]}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"raw": bytes(4095)}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"raw": b""}, grpc.StatusCode.INVALID_ARGUMENT),
        ({"shape": [20_000, 1, 32, 32], "raw": bytes(20_000 * 4096)}, grpc.StatusCode.RESOURCE_EXHAUSTED),
    ],
)
def test_grpc(digits: Stack, changes: dict[str, Any], code: grpc.StatusCode) -> None:
    got, sentence = grpc_code(digits, **changes)
    assert got == code, sentence
    assert "\n" not in sentence


@ONE_PROCESS_OR_FRONTS
def test_the_server_is_well_after_all_that(digits: Stack) -> None:
    assert post(digits, body())[0] == 200


CLUSTER = (ROOT / "examples" / "digits" / "cluster.toml").read_text()
PLAN = json.loads((ROOT / "examples" / "digits" / "gear_plan.json").read_text())


def changed_plan(**changes: Any) -> str:
    family = PLAN["families"]["digits"] | changes
    return json.dumps(PLAN | {"families": {"digits": family}})


@pytest.mark.parametrize(
    ("plan", "cluster", "field"),
    [
        (json.dumps(PLAN | {"gears": []}), CLUSTER, "gears"),
        (json.dumps(PLAN | {"schema_version": 2}), CLUSTER, "$.schema_version"),
        (changed_plan(slo_s="fast"), CLUSTER, "$.families[...].slo_s"),
        (changed_plan(reference_model="nope"), CLUSTER, "$.families.digits.reference_model"),
        ("{", CLUSTER, "plan.json"),
        (json.dumps(PLAN), CLUSTER.replace("triton0", "other"), "$.layouts[0].instances.triton0"),
        (json.dumps(PLAN), CLUSTER.replace("slots = 1", "slots = 0"), "$.endpoints[0].slots"),
        (json.dumps(PLAN), CLUSTER + "\ncolour = 1\n", "colour"),
        (json.dumps(PLAN), "schema_version = ", "cluster.toml"),
    ],
)
def test_broken_files(tmp_path: Path, plan: str, cluster: str, field: str) -> None:
    (tmp_path / "plan.json").write_text(plan)
    (tmp_path / "cluster.toml").write_text(cluster)
    result = subprocess.run(
        [sys.executable, "-m", "cascadeserve", "serve", f"--plan={tmp_path / 'plan.json'}",
         f"--cluster={tmp_path / 'cluster.toml'}"],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert result.returncode == 2
    assert field in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert result.stderr.startswith("Error: ")
