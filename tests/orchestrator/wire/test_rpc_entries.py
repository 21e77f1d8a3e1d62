"""Messages of very many entries are refused before they are read."""

from __future__ import annotations

import time
from typing import Any

import pytest
from tritonclient.grpc import service_pb2

from cascadeserve.errors import InvalidRequest, RequestTooLarge
from orchestrator.wire.rpc_entries import check_message
from tests.orchestrator.wire.test_rpc import message, typed

SOON_S = 1.0
BASE = message(typed("FP32", [1], fp32_contents=[1])).SerializeToString()
INPUTS, OUTPUTS, RAW, PARAMETERS = (
    bytes([service_pb2.ModelInferRequest.DESCRIPTOR.fields_by_name[name].number << 3 | 2, 0])
    for name in ("inputs", "outputs", "raw_input_contents", "parameters")
)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >> 7:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])


def inside(data: bytes) -> bytes:
    return INPUTS[:1] + _varint(len(data)) + data


UNKNOWN = {"none": b"", "number": b"\xf8\x01\x05", "fixed": b"\xfd\x01abcd", "group": b"\xfb\x01\xfc\x01"}


@pytest.mark.parametrize("unknown", UNKNOWN.values(), ids=UNKNOWN.keys())
@pytest.mark.parametrize("entry", [INPUTS, OUTPUTS, RAW, PARAMETERS])
def test_too_many_entries(entry: bytes, unknown: bytes) -> None:
    began_s = time.perf_counter()
    for data in (entry * 1_000_000, inside(PARAMETERS * 1_000_000)):
        with pytest.raises(RequestTooLarge, match="too many fields"):
            check_message(BASE + unknown + data)
    assert time.perf_counter() - began_s < SOON_S


def test_too_many_dimensions() -> None:
    with pytest.raises(InvalidRequest, match="there may be 32"):
        check_message(message(typed("FP32", [1] * 100_000)).SerializeToString())
    raw = [b"a" * 1_000_000]
    check_message(message({"name": "x", "shape": [2**63 - 1] * 32}, raw_input_contents=raw).SerializeToString())


def test_too_many_texts() -> None:
    with pytest.raises(RequestTooLarge, match="lists more than 100000 elements"):
        check_message(message(typed("BYTES", [1], bytes_contents=[b""] * 100_001)).SerializeToString(), 100_000)
    # B is what a text's tag looks like
    for length in (1, 127, 128, 1000, 20_000):
        texts = [b"B" * length] * max(40_000 // length, 600)
        data = message(typed("BYTES", [1], bytes_contents=texts)).SerializeToString() + RAW * 10_000
        check_message(data, len(texts))
        with pytest.raises(RequestTooLarge, match="elements"):
            check_message(data, len(texts) - 1)


@pytest.mark.parametrize("field", ["int_contents", "bool_contents", "fp64_contents"])
@pytest.mark.parametrize("num_inputs", [1, 3])
def test_too_many_numbers(field: str, num_inputs: int) -> None:
    values = [1] * 200_000
    for before in ([], [b"text"]):
        inputs = [typed("FP32", [1], **{field: values}, bytes_contents=before)] * num_inputs
        data = message(*inputs).SerializeToString()
        check_message(data, len(values) * num_inputs)
        with pytest.raises(RequestTooLarge, match="elements"):
            check_message(data, len(values) // 12)


def test_as_many_of_everything_as_there_may_be() -> None:
    some = {f"parameter {number}": {"int64_param": number} for number in range(2)}
    inputs = [typed("FP32", [1, 2], fp32_contents=[1, 2]) | {"parameters": some} for _ in range(1000)]
    outputs = [{"name": "x", "parameters": some} for _ in range(1000)]
    parameters = {f"parameter {number}": {"int64_param": number} for number in range(1000)}
    raw = [b"a" * 8] * 1000
    request_ = message(*inputs, outputs=outputs, parameters=parameters, raw_input_contents=raw, id="1")
    check_message(request_.SerializeToString())


@pytest.mark.parametrize(
    "request_",
    [
        message(*[typed("FP32", [1], fp32_contents=[1] * 100)] * 1000),
        message(typed("BYTES", [100_000], bytes_contents=[b"B"] * 100_000)),
        message({"name": "x"}, raw_input_contents=[b"a" * 1_000_000]),
        message(typed("INT64", [10], int64_contents=range(100_000))),
    ],
)
def test_honest_messages(request_: Any) -> None:
    check_message(request_.SerializeToString())


@pytest.mark.parametrize(
    "data", [b"\xff" * 100_000, b"\x12" * 100_000, b"\x2a\xff\xff\xff\xff\xff\xff\xff\xff\x01" * 10_000]
)
def test_what_is_no_message_is_left_to_protobuf(data: bytes) -> None:
    check_message(data)
