"""What every stock client may expect, over both transports."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import pytest
from tritonclient.utils import InferenceServerException

from cascadeserve.errors import (
    DeadlineExceeded,
    InternalError,
    InvalidRequest,
    NotFound,
    NotSupported,
    RequestTooLarge,
    Unavailable,
)
from orchestrator.wire.tensors import Tensor

if TYPE_CHECKING:
    from orchestrator.wire.tensors import Array
    from tests.orchestrator.wire.echo_plane import EchoPlane
    from tests.orchestrator.wire.stock_clients import StockClient

ARRAYS: dict[str, Array] = {
    "BOOL": np.array([[True, False, True]]),
    "UINT8": np.array([[0, 7, 255]], np.uint8),
    "UINT16": np.array([[0, 7, 65535]], np.uint16),
    "UINT32": np.array([[0, 7, 2**32 - 1]], np.uint32),
    "UINT64": np.array([[0, 7, 2**64 - 1]], np.uint64),
    "INT8": np.array([[-128, 0, 127]], np.int8),
    "INT16": np.array([[-(2**15), 0, 2**15 - 1]], np.int16),
    "INT32": np.array([[-(2**31), 0, 2**31 - 1]], np.int32),
    "INT64": np.array([[-(2**63), 0, 2**63 - 1]], np.int64),
    "FP16": np.array([[-1.5, 0.1, 65504]], np.float16),
    "FP32": np.array([[-1.5, 0.1, 3e38]], np.float32),
    "FP64": np.array([[-1.5, 0.1, 1e308]], np.float64),
    "BF16": np.array([[-1.5, 0.1, 3e38]], ml_dtypes.bfloat16),
    "BYTES": np.array([[b"", b"\x00\xff\x00", "Grüße".encode()]], object),
}
SENTENCE = "this is the sentence"


async def refused(client: StockClient, *args: Any, **kwargs: Any) -> tuple[str, str]:
    """Infer, and return the status and the sentence that the client was refused with."""
    with pytest.raises(InferenceServerException) as caught:
        await client.call("infer", *args, **kwargs)
    return caught.value.status(), caught.value.message()


@pytest.mark.parametrize("datatype", ARRAYS)
async def test_datatypes_round_trip(client: StockClient, datatype: str) -> None:
    array = ARRAYS[datatype]
    result = await client.call("infer", "echo", [client.input("x", datatype, array)])
    np.testing.assert_array_equal(result.as_numpy("x"), array)


@pytest.mark.parametrize("shape", [(0,), (2, 0, 3), (1, 1, 1, 1, 1), (2, 3, 4)])
@pytest.mark.parametrize("datatype", ["FP32", "BYTES"])
async def test_shapes_round_trip(client: StockClient, datatype: str, shape: tuple[int, ...]) -> None:
    array = np.full(shape, b"ab", object) if datatype == "BYTES" else np.ones(shape, np.float32)
    result = await client.call("infer", "echo", [client.input("x", datatype, array)])
    np.testing.assert_array_equal(result.as_numpy("x"), array)


async def test_many_inputs_keep_their_data(client: StockClient) -> None:
    inputs = [client.input(name, name, array) for name, array in ARRAYS.items()]
    result = await client.call("infer", "echo", inputs)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(result.as_numpy(name), array)


async def test_id_is_echoed_only_if_given(client: StockClient) -> None:
    inputs = [client.input("x", "INT8", np.ones((1, 1), np.int8))]
    given = await client.call("infer", "echo", inputs, request_id="request 7 ü")
    assert client.answer(given)["id"] == "request 7 ü"
    without = await client.call("infer", "echo", inputs)
    assert client.answer(without)["id"] == ""
    if client.is_http:
        assert "id" not in without.get_response()


async def test_parameters_travel_both_ways(client: StockClient, plane: EchoPlane) -> None:
    inputs = [client.input("x", "INT8", np.ones((1, 1), np.int8))]
    sent = {"flag": True, "count": -3, "ratio": 0.5, "name": "Grüße"}
    plane.parameters = {"certified": False, "gear": 2**64 - 1, "share": 0.25, "plan": "ü", "negative": -1}
    result = await client.call("infer", "echo", inputs, parameters=sent, priority=3, timeout=1000)
    received = plane.requests[0].parameters
    assert received == sent | {"priority": 3, "timeout": 1000}
    assert {key: type(received[key]) for key in sent} == {key: type(value) for key, value in sent.items()}
    answered = client.answer(result)["parameters"]
    assert answered == plane.parameters
    assert answered["certified"] is False


async def test_sequence_parameters_pass_through(client: StockClient, plane: EchoPlane) -> None:
    inputs = [client.input("x", "INT8", np.ones((1, 1), np.int8))]
    await client.call("infer", "echo", inputs, sequence_id=5, sequence_start=True, sequence_end=False)
    assert plane.requests[0].parameters == {"sequence_id": 5, "sequence_start": True, "sequence_end": False}


async def test_requested_outputs_come_in_their_order(client: StockClient) -> None:
    inputs = [client.input(name, "INT8", np.ones((1, 1), np.int8)) for name in ("a", "b", "c")]
    outputs = [client.output(name) for name in ("c", "a")]
    result = await client.call("infer", "echo", inputs, outputs=outputs)
    assert client.answer(result)["outputs"] == ["c", "a"]
    assert result.as_numpy("b") is None


async def test_version_in_the_request_is_answered(client: StockClient, plane: EchoPlane) -> None:
    inputs = [client.input("x", "INT8", np.ones((1, 1), np.int8))]
    result = await client.call("infer", "echo", inputs, model_version="2")
    assert client.answer(result)["version"] == "2"
    assert plane.requests[0].model_version == "2"


async def test_compressed_requests(client: StockClient) -> None:
    array = np.ones((1, 5000), np.float32)
    name = "request_compression_algorithm" if client.is_http else "compression_algorithm"
    for algorithm in ("gzip", "deflate"):
        result = await client.call("infer", "echo", [client.input("x", "FP32", array)], **{name: algorithm})
        np.testing.assert_array_equal(result.as_numpy("x"), array)


async def test_server_state(client: StockClient, plane: EchoPlane) -> None:
    assert await client.call("is_server_live")
    assert await client.call("is_server_ready")
    plane.is_ready = False
    assert await client.call("is_server_live")
    assert not await client.call("is_server_ready")


async def test_model_state(client: StockClient) -> None:
    assert await client.call("is_model_ready", "echo")
    assert await client.call("is_model_ready", "echo", "2")
    assert not await client.call("is_model_ready", "echo", "9")
    assert not await client.call("is_model_ready", "loading")
    assert not await client.call("is_model_ready", "nobody")


async def test_metadata(client: StockClient) -> None:
    kwargs = {} if client.is_http else {"as_json": True}
    server = await client.call("get_server_metadata", **kwargs)
    assert server == {"name": "cascadeserve", "version": "0.1.0", "extensions": ["binary_tensor_data"]}
    for version in ("", "2"):
        model = await client.call("get_model_metadata", "echo", version, **kwargs)
        assert (model["name"], model["versions"], model["platform"]) == ("echo", ["1", "2"], "echo")
        (only,) = model["inputs"]
        assert (only["name"], only["datatype"]) == ("image", "FP32")
        assert [int(dim) for dim in only["shape"]] == [-1, 1, 32, 32]
        assert [output["name"] for output in model["outputs"]] == ["image", "label"]


async def test_metadata_of_an_unknown_model(client: StockClient) -> None:
    with pytest.raises(InferenceServerException, match="no model 'nobody'") as caught:
        await client.call("get_model_metadata", "nobody")
    assert caught.value.status() == ("404" if client.is_http else "StatusCode.NOT_FOUND")


@pytest.mark.parametrize(
    ("error", "http", "grpc"),
    [
        (InvalidRequest(SENTENCE), "400", "INVALID_ARGUMENT"),
        (NotFound(SENTENCE), "404", "NOT_FOUND"),
        (RequestTooLarge(SENTENCE), "413", "RESOURCE_EXHAUSTED"),
        (NotSupported(SENTENCE), "501", "UNIMPLEMENTED"),
        (Unavailable(SENTENCE), "503", "UNAVAILABLE"),
        (DeadlineExceeded(SENTENCE), "504", "DEADLINE_EXCEEDED"),
        (InternalError(SENTENCE), "500", "INTERNAL"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else value,
)
async def test_request_errors_become_statuses(
    client: StockClient, plane: EchoPlane, error: Exception, http: str, grpc: str
) -> None:
    plane.error = error
    inputs = [client.input("x", "INT8", np.ones((1, 1), np.int8))]
    assert await refused(client, "echo", inputs) == (http if client.is_http else f"StatusCode.{grpc}", SENTENCE)


async def test_a_bug_is_answered_without_its_text_and_logged_once(
    client: StockClient, plane: EchoPlane, caplog: pytest.LogCaptureFixture
) -> None:
    plane.error = ZeroDivisionError("secret")
    inputs = [client.input("x", "INT8", np.ones((1, 1), np.int8))]
    status = "500" if client.is_http else "StatusCode.INTERNAL"
    assert await refused(client, "echo", inputs) == (status, "internal error")
    (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], ZeroDivisionError)


async def test_long_and_strange_messages_survive(client: StockClient, plane: EchoPlane) -> None:
    plane.error = InvalidRequest("ü\n" * 20_000)
    inputs = [client.input("x", "INT8", np.ones((1, 1), np.int8))]
    status, sentence = await refused(client, "echo", inputs)
    assert status == ("400" if client.is_http else "StatusCode.INVALID_ARGUMENT")
    assert sentence.startswith("ü ü")
    assert sentence.endswith("...")


async def test_unknown_model_and_version(client: StockClient) -> None:
    inputs = [client.input("x", "INT8", np.ones((1, 1), np.int8))]
    status = "404" if client.is_http else "StatusCode.NOT_FOUND"
    assert await refused(client, "nobody", inputs) == (status, "no model 'nobody'")
    assert await refused(client, "echo", inputs, model_version="9") == (status, "model 'echo' has no version '9'")


async def test_duplicate_inputs(client: StockClient) -> None:
    inputs = [client.input("x", "INT8", np.ones((1, 1), np.int8)) for _ in range(2)]
    status, sentence = await refused(client, "echo", inputs)
    assert status == ("400" if client.is_http else "StatusCode.INVALID_ARGUMENT")
    assert sentence == "input 'x' already exists in request; give each input once"


async def test_wrong_byte_count(client: StockClient) -> None:
    tensor = client.input("x", "FP32", np.ones((1, 4), np.float32))
    tensor.set_shape([1, 5])
    status, sentence = await refused(client, "echo", [tensor])
    assert status == ("400" if client.is_http else "StatusCode.INVALID_ARGUMENT")
    assert sentence == "input 'x' of datatype FP32 and shape [1, 5] needs 20 bytes of data but got 16"


@pytest.mark.parametrize("shape", [[-1, -4], [2**62, 2**62], [2**40, 2**40, 0], [0, 2**62, 2**62], [1] * 70])
async def test_impossible_shapes(client: StockClient, shape: list[int]) -> None:
    tensor = client.input("x", "FP32", np.ones((1, 4), np.float32))
    tensor.set_shape(shape)
    status, _ = await refused(client, "echo", [tensor])
    assert status == ("400" if client.is_http else "StatusCode.INVALID_ARGUMENT")


async def test_impossible_shapes_without_elements(client: StockClient) -> None:
    tensor = client.input("x", "FP32", np.ones((0,), np.float32))
    tensor.set_shape([0, 2**62, 2**62])
    status, sentence = await refused(client, "echo", [tensor])
    assert status == ("400" if client.is_http else "StatusCode.INVALID_ARGUMENT")
    assert "too large dimensions" in sentence


async def test_shared_memory_is_refused(client: StockClient) -> None:
    status = "501" if client.is_http else "StatusCode.UNIMPLEMENTED"
    tensor = client.module.InferInput("x", [1], "FP32")
    tensor.set_shared_memory("region", 4)
    assert (await refused(client, "echo", [tensor]))[0] == status
    plain = client.input("x", "INT8", np.ones((1, 1), np.int8))
    output = client.module.InferRequestedOutput("x")
    output.set_shared_memory("region", 4)
    assert (await refused(client, "echo", [plain], outputs=[output]))[0] == status


@pytest.mark.parametrize(
    ("array", "datatype", "texts"),
    [
        (
            np.array([[0.5, 2, -1], [1, 1, 0]], np.float32),
            "FP32",
            [["2.000000:1", "0.500000:0"], ["1.000000:0", "1.000000:1"]],
        ),
        (np.array([[7], [-3]], np.int64), "INT64", [["7:0"], ["-3:0"]]),
        (np.zeros((0, 3), np.int8), "INT8", []),
        (np.zeros((2, 0), np.float16), "FP16", [[], []]),
    ],
)
async def test_classes(client: StockClient, array: Any, datatype: str, texts: list[list[str]]) -> None:
    wanted = [client.output("x", class_count=2)]
    result = await client.call("infer", "echo", [client.input("x", datatype, array)], outputs=wanted)
    assert [[text.decode() for text in row] for row in result.as_numpy("x").tolist()] == texts


async def test_classes_of_text_are_refused(client: StockClient) -> None:
    text = client.input("x", "BYTES", np.array([[b"a"]], np.object_))
    status, sentence = await refused(client, "echo", [text], outputs=[client.output("x", class_count=3)])
    assert status == ("400" if client.is_http else "StatusCode.INVALID_ARGUMENT")
    assert "class result not available" in sentence


async def test_oversize(client: StockClient) -> None:
    tensor = client.input("x", "FP32", np.ones((1, 1 << 17), np.float32))
    status, sentence = await refused(client, "echo", [tensor])
    assert status == ("413" if client.is_http else "StatusCode.RESOURCE_EXHAUSTED")
    assert "larger than" in sentence


async def test_a_broken_data_plane_contract_is_our_fault(client: StockClient, plane: EchoPlane) -> None:
    plane.outputs = [Tensor("x", "FP32", np.ones(1, np.float64))]
    status, sentence = await refused(client, "echo", [client.input("x", "INT8", np.ones((1, 1), np.int8))])
    assert status == ("500" if client.is_http else "StatusCode.INTERNAL")
    assert sentence == "output 'x' is declared as FP32 but holds float64"
