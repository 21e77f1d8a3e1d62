"""The codecs without sockets: properties, and what no transport can reach."""

from __future__ import annotations

import contextlib
import json
import math
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from tritonclient.grpc import service_pb2

from cascadeserve.errors import CascadeServeError, InternalError, NotFound, RequestError
from orchestrator.wire.codec_grpc import decode_infer_request, encode_infer_response
from orchestrator.wire.codec_http import (
    EncodedResponse,
    decode_raw_request,
    decode_request,
    encode_response,
    parse_header_length,
)
from orchestrator.wire.datatypes import DTYPES, array_from_raw, array_to_bytes, bytes_array
from orchestrator.wire.status import STATUS, message_of, status_of
from orchestrator.wire.tensors import InferRequest, InferResponse, RequestedOutput, Tensor
from tests.orchestrator.wire.echo_plane import MODELS

SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)


@st.composite
def tensors(draw: st.DrawFn, *, text: bool = False) -> Tensor:
    """Any tensor; with `text`, one that JSON can carry."""
    datatypes = sorted(set(DTYPES) - {"FP16", "BF16"}) if text else sorted(DTYPES)
    datatype = draw(st.sampled_from(datatypes))
    shape = draw(SHAPES)
    if datatype == "BYTES":
        element = st.text(max_size=5).map(str.encode) if text else st.binary(max_size=9)
        count = math.prod(shape)
        array = bytes_array([draw(element) for _ in range(count)]).reshape(shape)
        return Tensor("x", datatype, array)
    elements = None
    if DTYPES[datatype].kind == "f" and text:
        elements = st.floats(width=32 if datatype == "FP32" else 64, allow_nan=False, allow_infinity=False)
    return Tensor("x", datatype, draw(hnp.arrays(DTYPES[datatype], shape, elements=elements)))


def request_from(encoded: EncodedResponse) -> InferRequest:
    """Read a rendered response as if it were a request: the two have the same `inputs` and `outputs`."""
    length = len(encoded.body) if encoded.header_length is None else encoded.header_length
    head = json.loads(encoded.body[:length])
    inputs = json.dumps({"inputs": head["outputs"]}).encode()
    if encoded.header_length is None:
        return decode_request(inputs, None, model_name="m")
    return decode_request(inputs + encoded.body[length:], len(inputs), model_name="m")


def assert_same(left: Tensor, right: Tensor) -> None:
    assert (left.name, left.datatype) == (right.name, right.datatype)
    assert left.array.shape == right.array.shape
    assert left.array.dtype == right.array.dtype
    assert array_to_bytes(left.array, left.datatype) == array_to_bytes(right.array, right.datatype)


@given(tensors())
def test_binary_round_trip(tensor: Tensor) -> None:
    request = InferRequest("m", [], binary_outputs=True)
    (back,) = request_from(encode_response(request, InferResponse("m", "1", [tensor]))).inputs
    assert_same(tensor, back)


@given(tensors(text=True))
def test_json_round_trip(tensor: Tensor) -> None:
    request = InferRequest("m", [])
    (back,) = request_from(encode_response(request, InferResponse("m", "1", [tensor]))).inputs
    assert_same(tensor, back)


@given(tensors())
def test_grpc_round_trip(tensor: Tensor) -> None:
    answer = encode_infer_response(InferRequest("m", []), InferResponse("m", "1", [tensor]))
    (output,) = answer.outputs
    item = {"name": output.name, "datatype": output.datatype, "shape": output.shape}
    message = service_pb2.ModelInferRequest(inputs=[item], raw_input_contents=answer.raw_output_contents)
    assert_same(tensor, decode_infer_request(message, None).inputs[0])


@given(st.lists(tensors(), max_size=3), st.data())
def test_mixed_forms_keep_their_buffers_in_order(some: list[Tensor], data: st.DataObject) -> None:
    for index, tensor in enumerate(some):
        tensor.name = f"x{index}"
    forms = [
        tensor.datatype in ("FP16", "BF16", "BYTES", "FP32", "FP64") or data.draw(st.booleans()) for tensor in some
    ]
    outputs = [RequestedOutput(tensor.name, form) for tensor, form in zip(some, forms, strict=True)]
    request = InferRequest("m", [], outputs=outputs)
    encoded = encode_response(request, InferResponse("m", "1", some))
    assert (encoded.header_length is not None) is any(forms)
    for tensor, back in zip(some, request_from(encoded).inputs, strict=True):
        assert_same(tensor, back)


def _sample_body() -> tuple[bytes, int]:
    inputs = [
        {"name": "a", "datatype": "FP32", "shape": [1, 2], "parameters": {"binary_data_size": 8}},
        {"name": "b", "datatype": "BYTES", "shape": [2], "parameters": {"binary_data_size": 11}},
        {"name": "c", "datatype": "INT16", "shape": [2, 1], "data": [[1], [2]]},
        {"name": "d", "datatype": "BYTES", "shape": [1], "data": ["x"]},
        {"name": "e", "datatype": "BOOL", "shape": [1], "parameters": {"binary_data_size": 1}},
    ]
    parameters = {"binary_data_output": True, "timeout": 5, "plan": "p"}
    outputs = [{"name": "a", "parameters": {"binary_data": False}}]
    head = json.dumps({"id": "1", "inputs": inputs, "parameters": parameters, "outputs": outputs}).encode()
    return head + b"abcdefgh" + b"\x02\0\0\0hi" + b"\x01\0\0\0j" + b"\x01", len(head)


BODY, HEAD_LENGTH = _sample_body()
EDITS = st.lists(
    st.tuples(st.integers(0, len(BODY)), st.integers(0, 6), st.binary(max_size=6) | st.sampled_from([b"null", b"-1"])),
    min_size=1,
    max_size=4,
)


def edited(body: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    for start, removed, added in edits:
        body = body[:start] + added + body[start + removed :]
    return body


def test_the_sample_body_is_read() -> None:
    request = decode_request(BODY, HEAD_LENGTH, model_name="m")
    assert [tensor.name for tensor in request.inputs] == ["a", "b", "c", "d", "e"]
    assert request.inputs[1].array.tolist() == [b"hi", b"j"]


@settings(max_examples=500)
@given(EDITS, st.none() | st.integers(0, len(BODY)) | st.just(HEAD_LENGTH))
def test_mutated_bodies_raise_request_errors_only(
    edits: list[tuple[int, int, bytes]], header_length: int | None
) -> None:
    body = edited(BODY, edits)
    with contextlib.suppress(RequestError):
        length = parse_header_length(None if header_length is None else str(header_length), len(body))
        request = decode_request(body, length, model_name="m")
        encode_response(request, InferResponse("m", "1", request.inputs))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=500)
@given(JSON, st.sampled_from(["datatype", "shape", "data", "parameters", "name"]), st.sampled_from(sorted(DTYPES)))
def test_any_json_value_anywhere_raises_request_errors_only(value: Any, field: str, datatype: str) -> None:
    item = {"name": "x", "datatype": datatype, "shape": [1], "data": [1]} | {field: value}
    for body in ({"inputs": [item]}, {"inputs": [item], field: value}, {"inputs": value}, value):
        with contextlib.suppress(RequestError):
            decode_request(json.dumps(body).encode(), None, model_name="m")


@given(st.binary(max_size=64))
def test_any_bytes_raise_request_errors_only(body: bytes) -> None:
    with contextlib.suppress(RequestError):
        decode_request(body, None, model_name="m")
    for metadata in MODELS.values():
        with contextlib.suppress(RequestError):
            decode_raw_request(body, metadata)


@given(st.sampled_from(sorted(DTYPES)), st.lists(st.integers(-(2**70), 2**70) | st.integers(-2, 4)), st.binary())
def test_any_shape_raises_request_errors_only(datatype: str, shape: list[int], buffer: bytes) -> None:
    with contextlib.suppress(RequestError):
        assert array_from_raw("x", datatype, shape, buffer).shape == tuple(shape)


@settings(max_examples=500)
@given(st.lists(st.tuples(st.integers(0, 120), st.integers(0, 4), st.binary(max_size=4)), min_size=1, max_size=3))
def test_mutated_messages_raise_request_errors_only(edits: list[tuple[int, int, bytes]]) -> None:
    inputs = [
        {"name": "a", "datatype": "FP32", "shape": [1, 2], "contents": {"fp32_contents": [1, 2]}},
        {"name": "b", "datatype": "BYTES", "shape": [1], "contents": {"bytes_contents": [b"x"]}},
        {"name": "c", "datatype": "UINT8", "shape": [1], "contents": {"uint_contents": [3]}},
    ]
    whole = service_pb2.ModelInferRequest(model_name="m", inputs=inputs, outputs=[{"name": "a"}]).SerializeToString()
    try:
        message = service_pb2.ModelInferRequest.FromString(edited(whole, edits))
    except DecodeError:
        return
    with contextlib.suppress(RequestError):
        decode_infer_request(message, None)


def test_numeric_inputs_are_views_of_the_body() -> None:
    request = decode_request(BODY, HEAD_LENGTH, model_name="m")
    assert np.shares_memory(request.inputs[0].array, np.frombuffer(BODY, np.uint8))


def test_every_request_error_has_a_status() -> None:
    def below(kind: type[RequestError]) -> set[type[RequestError]]:
        return {kind}.union(*(below(child) for child in kind.__subclasses__()))

    named = {kind for kind in below(RequestError) if kind.__module__ == CascadeServeError.__module__}
    assert named - {RequestError} == set(STATUS)


def test_status_of_a_subclass_and_of_the_base() -> None:
    class ModelGone(NotFound):
        pass

    assert status_of(ModelGone("x")) == STATUS[NotFound]
    assert status_of(RequestError("x")) == STATUS[InternalError]


def test_messages_are_one_line_that_every_wire_carries() -> None:
    assert message_of(NotFound(" a\n\tb ")) == "a b"
    assert message_of(NotFound("\ud800")) == "?"


def test_an_unknown_output_datatype_is_our_fault() -> None:
    broken = InferResponse("m", "1", [Tensor("y", "INT7", np.ones(1, np.int8))])
    with pytest.raises(InternalError):
        encode_response(InferRequest("m", []), broken)
