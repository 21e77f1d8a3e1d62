"""What stock clients can ask for beside their answer, on a real Triton; and what they get when it is full."""

from __future__ import annotations

import concurrent.futures
import http.client
import os
import signal
import time
import urllib.request
from typing import TYPE_CHECKING, Any

import grpc
import pytest
import tritonclient.grpc
import tritonclient.http
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException

from orchestrator.wire.limits import PEEK_BYTES
from tests.e2e.conftest import tiny_stack
from tests.fakes.certified import CERTIFICATE
from tests.fakes.servers import running, server_pid
from tests.fakes.tiny import plan_document, rows

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.fakes.servers import Stack

pytestmark = [pytest.mark.triton, pytest.mark.timeout(120)]

X = rows([1, 2, 3], [0.9, 0.6, 0.1])


def document() -> dict[str, Any]:
    """Batches of the large model are planned to take 0.2 s, and the plan is certified."""
    made = plan_document(("a",))
    family = made["families"]["family"]
    family["models"]["large"]["busy_s"] = [[1, 0.2], [64, 0.2]]
    family["ladder"][1]["epsilon"] = 0.004
    family["certificate"] = dict(CERTIFICATE)
    return made


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder: Path = tmp_path_factory.mktemp("tiny")
    with running(tiny_stack(folder, ("a",), document())) as stack:
        yield stack


@pytest.fixture(params=["http", "grpc"])
def client(request: pytest.FixtureRequest, tiny: Stack) -> Iterator[Any]:
    if request.param == "http":
        made: Any = tritonclient.http.InferenceServerClient(tiny.url.removeprefix("http://"), concurrency=20)
    else:
        made = tritonclient.grpc.InferenceServerClient(tiny.grpc_address)
    yield made
    made.close()


def ask(client: Any, **options: Any) -> tuple[list[int], list[int], Any]:
    """Labels, stages and whether they are certified."""
    module = tritonclient.http if isinstance(client, tritonclient.http.InferenceServerClient) else tritonclient.grpc
    tensor = module.InferInput("x", list(X.shape), "FP32")
    tensor.set_data_from_numpy(X)
    outputs = [module.InferRequestedOutput(name) for name in ("label", "stage")]
    result = client.infer("family", [tensor], outputs=outputs, **options)
    response = result.get_response()
    if module is tritonclient.http:
        certified = response["parameters"]["certified"]
    else:
        certified = response.parameters["certified"].bool_param
    return result.as_numpy("label").ravel().tolist(), result.as_numpy("stage").ravel().tolist(), certified


@pytest.mark.parametrize(
    ("options", "answer"),
    [
        ({}, ([1, 2, 103], [0, 0, 1], True)),
        ({"priority": 1}, ([1, 2, 103], [0, 0, 1], True)),
        ({"priority": 9, "timeout": 5_000_000}, ([1, 2, 103], [0, 0, 1], True)),
        ({"timeout": 150_000}, ([1, 2, 3], [0, 0, 0], False)),
        ({"parameters": {"cascade_reference": True}}, ([101, 102, 103], [0, 0, 0], True)),
        ({"parameters": {"cascade_max_stage": 0}}, ([1, 2, 3], [0, 0, 0], False)),
        ({"parameters": {"cascade_min_certainty": 0.8}}, ([1, 102, 103], [0, 1, 1], False)),
        ({"parameters": {"work": "1,0.5,0.2", "colour": "red"}}, ([1, 2, 103], [0, 0, 1], True)),
    ],
)
def test_stock_clients_ask_for_it(client: Any, options: dict[str, Any], answer: tuple[Any, ...]) -> None:
    assert ask(client, **options) == answer


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"timeout": 1}, "too late|deadline passed"),  # before it is sent, or while it is
        ({"priority": -1}, "priority|out of range"),
        ({"parameters": {"cascade_maxstage": 0}}, "cascade_maxstage"),
        ({"parameters": {"work": "1,2"}}, "'work'"),
    ],
)
def test_what_cannot_be_is_refused(client: Any, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises((InferenceServerException, ValueError), match=sentence):
        ask(client, **options)


@pytest.fixture
def full(tmp_path: Path) -> Iterator[Stack]:
    """A Triton that stands still with two batches, of 1.5 s each by the plan: more than the default deadline of 2 s."""
    made = plan_document(("a",))
    made["families"]["family"]["models"]["small"]["busy_s"] = [[1, 1.5], [64, 1.5]]
    with running(tiny_stack(tmp_path, ("a",), made)) as stack, concurrent.futures.ThreadPoolExecutor() as pool:
        server = server_pid(stack.tritons["a"])
        os.kill(server, signal.SIGSTOP)
        try:
            before = [pool.submit(infer_by_http, stack) for _ in range(2)]
            time.sleep(0.3)
            yield stack
        finally:
            os.kill(server, signal.SIGCONT)
        assert [done.result() for done in before] == [[1, 2, 103]] * 2


def infer_by_http(stack: Stack) -> list[int]:
    with tritonclient.http.InferenceServerClient(stack.url.removeprefix("http://")) as client:
        return ask(client, timeout=20_000_000)[0]


def test_when_too_much_waits_it_is_refused_and_told_when_to_come_again(full: Stack) -> None:
    connection = http.client.HTTPConnection(full.url.removeprefix("http://"), timeout=5)
    # the head, and the beginning that may speak of a priority: nobody waits for the rest
    connection.putrequest("POST", "/v2/models/family/infer")
    connection.putheader("Content-Length", "1000000")
    connection.endheaders(b" " * PEEK_BYTES)
    answer = connection.getresponse()
    assert answer.status == 503
    assert int(answer.headers["Retry-After"]) >= 1
    assert b"so much work waits" in answer.read()
    connection.close()

    request = service_pb2.ModelInferRequest(model_name="family", raw_input_contents=[X.tobytes()])
    request.inputs.add(name="x", datatype="FP32", shape=X.shape)
    with grpc.insecure_channel(full.grpc_address) as channel, pytest.raises(grpc.RpcError) as caught:
        service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(request, timeout=5)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert int(dict(caught.value.trailing_metadata())["grpc-retry-pushback-ms"]) >= 500

    with urllib.request.urlopen(f"{full.url}/metrics", timeout=5) as metrics:
        assert 'requests_total{family="family",outcome="Overloaded"} 2.0' in metrics.read().decode()
