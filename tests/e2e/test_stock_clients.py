"""Stock tritonclient clients, pointed at the orchestrator instead of Triton, work unchanged."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.grpc.aio
import tritonclient.http
import tritonclient.http.aio

from examples.digits.data import rows
from tests.e2e.conftest import ONE_PROCESS_OR_FRONTS, ROOT
from tests.fakes.servers import status_of

if TYPE_CHECKING:
    from tests.fakes.servers import Stack

pytestmark = [pytest.mark.triton, pytest.mark.timeout(120), ONE_PROCESS_OR_FRONTS]

BATCH = rows("test", 5).inputs


def tensor(module: Any) -> Any:
    entry = module.InferInput("image", list(BATCH.shape), "FP32")
    entry.set_data_from_numpy(BATCH)
    return entry


def check_metadata(metadata: dict[str, Any]) -> None:
    assert (metadata["name"], metadata["versions"]) == ("digits", ["1"])
    assert [entry["name"] for entry in metadata["inputs"]] == ["image"]
    assert [int(size) for size in metadata["inputs"][0]["shape"]] == [-1, 1, 32, 32]
    assert [entry["name"] for entry in metadata["outputs"]] == ["label", "certainty", "scores", "stage"]


def check_answer(result: Any) -> None:
    assert result.as_numpy("label").shape == (5, 1)
    assert result.as_numpy("label").dtype == np.int64
    scores = result.as_numpy("scores")
    assert scores.shape == (5, 10)
    np.testing.assert_allclose(scores.sum(axis=1), 1.0, atol=1e-4)
    np.testing.assert_array_equal(scores.argmax(axis=1), result.as_numpy("label")[:, 0])
    ordered = np.sort(scores, axis=1)
    np.testing.assert_allclose(result.as_numpy("certainty")[:, 0], ordered[:, -1] - ordered[:, -2], atol=1e-5)
    assert result.as_numpy("stage").dtype == np.int32


@pytest.mark.parametrize("binary", [True, False])
def test_http(digits: Stack, binary: bool) -> None:
    client = tritonclient.http.InferenceServerClient(digits.url.removeprefix("http://"))
    try:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("digits")
        assert not client.is_model_ready("nope")
        assert client.get_server_metadata()["name"] == "cascadeserve"
        check_metadata(client.get_model_metadata("digits"))
        entry = tritonclient.http.InferInput("image", list(BATCH.shape), "FP32")
        entry.set_data_from_numpy(BATCH, binary_data=binary)
        outputs = [
            tritonclient.http.InferRequestedOutput(name, binary_data=binary)
            for name in ("label", "certainty", "scores", "stage")
        ]
        result = client.infer("digits", [entry], outputs=outputs, request_id="r-1", timeout=5_000_000)
        check_answer(result)
        assert result.get_response()["id"] == "r-1"
        assert client.infer("digits", [entry]).as_numpy("label").shape == (5, 1)
        assert client.async_infer("digits", [entry]).get_result().as_numpy("label").shape == (5, 1)
    finally:
        client.close()


def test_grpc(digits: Stack) -> None:
    client = tritonclient.grpc.InferenceServerClient(digits.grpc_address)
    try:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("digits")
        assert client.get_server_metadata(as_json=True)["name"] == "cascadeserve"
        check_metadata(client.get_model_metadata("digits", as_json=True))
        outputs = [tritonclient.grpc.InferRequestedOutput(name) for name in ("label", "certainty", "scores", "stage")]
        result = client.infer(
            "digits", [tensor(tritonclient.grpc)], outputs=outputs, request_id="r-2", client_timeout=5.0
        )
        check_answer(result)
        assert result.get_response().id == "r-2"
        assert client.infer("digits", [tensor(tritonclient.grpc)]).as_numpy("label").shape == (5, 1)
    finally:
        client.close()


async def test_http_aio(digits: Stack) -> None:
    async with tritonclient.http.aio.InferenceServerClient(digits.url.removeprefix("http://")) as client:
        assert await client.is_server_ready()
        check_metadata(await client.get_model_metadata("digits"))
        result = await client.infer("digits", [tensor(tritonclient.http)])
        assert result.as_numpy("label").shape == (5, 1)


async def test_grpc_aio(digits: Stack) -> None:
    async with tritonclient.grpc.aio.InferenceServerClient(digits.grpc_address) as client:
        assert await client.is_server_ready()
        result = await client.infer("digits", [tensor(tritonclient.grpc)])
        assert result.as_numpy("label").shape == (5, 1)


def test_the_example_of_the_readme(digits: Stack, capsys: pytest.CaptureFixture[str]) -> None:
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert code is not None
    names: dict[str, Any] = {}
    exec(code[1].replace("localhost:8080", digits.url.removeprefix("http://")), names)
    names["client"].close()
    assert names["result"].as_numpy("label").shape == (5, 1)
    assert "'plan': 'digits" in capsys.readouterr().out


def test_metrics_are_at_the_same_address(digits: Stack) -> None:
    assert status_of(f"{digits.url}/metrics") == 200


def test_the_same_client_code_on_triton_gives_the_largest_models_labels(digits: Stack) -> None:
    """What the cascade answers is what its stages answer: here the last one, asked directly."""
    direct = tritonclient.http.InferenceServerClient(digits.triton_url("triton0").removeprefix("http://"))
    try:
        labels = direct.infer("digits_resnet", [tensor(tritonclient.http)]).as_numpy("label")
    finally:
        direct.close()
    client = tritonclient.http.InferenceServerClient(digits.url.removeprefix("http://"))
    try:
        result = client.infer("digits", [tensor(tritonclient.http)])
    finally:
        client.close()
    if result.get_response()["parameters"]["gear"] == "calm-reference":
        np.testing.assert_array_equal(result.as_numpy("label"), labels)
