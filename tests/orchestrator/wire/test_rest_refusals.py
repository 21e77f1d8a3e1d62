"""HTTP bodies that are wrong: each is refused with 400 and one sentence, before the data plane hears of it."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.orchestrator.wire.bodies import HEADER, INFER, binary, head, tensor, with_buffer
from tests.orchestrator.wire.stock_clients import send

if TYPE_CHECKING:
    from tests.orchestrator.wire.echo_plane import EchoPlane


@pytest.mark.parametrize(
    ("body", "sentence"),
    [
        (b"", "cannot read the request JSON"),
        (b"{", "cannot read the request JSON"),
        (b"[]", "Expected `object`, got `array`"),
        (b"null", "Expected `object`, got `null`"),
        (b"\xff\xfe", "cannot read the request JSON"),
        (b'{"inputs":' + b"[" * 100_000, "cannot read the request JSON"),
        (b'{"x":' + b"[" * 100_000, "cannot read the request JSON"),
        (b'{"inputs":[{"name":"x","datatype":"INT8","shape":[1],"data":[NaN]}]}', "Expected `int`, got `float`"),
        (b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":[NaN}]}', "cannot read the request JSON"),
        (b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":[Nan]}]}', "cannot read the request JSON"),
        (b"[NaN]", "Expected `object`"),
        (b"{}", "missing required field `inputs`"),
        (b'{"inputs":{}}', "$.inputs"),
        (b'{"inputs":[1]}', "$.inputs[0]"),
        (head(tensor([1]), id=5), "$.id"),
        (head(tensor([1]), outputs=5), "$.outputs"),
        (head(tensor([1]), outputs=None), "$.outputs"),
        (head(tensor([1]), outputs=[{}]), "missing required field `name`"),
        (head(tensor([1]), outputs=[{"name": "x", "parameters": {"classification": "a"}}]), "a number of classes"),
        (head(tensor([1]), outputs=[{"name": "x", "parameters": {"classification": -1}}]), "a number of classes"),
        (head(tensor([1]), outputs=[{"name": "x", "parameters": {"classification": True}}]), "a number of classes"),
        (head(tensor([1]), parameters={"a": [1]}), "$.parameters"),
        (head(tensor([1]), parameters={"a": 2**64}), "'a' does not fit into 64 bits"),
        (head(tensor([1]), parameters={"a": 10**30}), "'a' does not fit into 64 bits"),
        (head(tensor([1]), parameters={"triton_x": 1}), "reserved"),
        (head(tensor([1]), parameters={"binary_data_output": 1}), "binary_data_output"),
        (head({"datatype": "INT8", "shape": [1], "data": [1]}), "missing required field `name`"),
        (head({"name": "x", "shape": [1], "data": [1]}), "missing required field `datatype`"),
        (head({"name": "x", "datatype": "INT8", "data": [1]}), "missing required field `shape`"),
        (head({"name": "x", "datatype": "INT8", "shape": [1]}), "exactly one of 'data'"),
        (head(binary(1) | {"data": [1]}), "exactly one of 'data'"),
        (head(tensor([1], "INT7")), "unknown datatype 'INT7'"),
        (head(tensor([1], shape=[-1])), ">= 0"),
        (head(tensor([1], shape=[2**63])), "<= 9223372036854775807"),
        (head(tensor([1], shape=[10**30])), "$.inputs[0].shape[0]"),
        (head(tensor([1], shape=[1.0])), "Expected `int`, got `float`"),
        (head(tensor([1, 2], shape=[3])), "has 2 elements but its shape [3] has 3"),
        (head(tensor([1, 2], shape=[2**62, 2**62])), "has 2 elements"),
        (head(tensor([], shape=[0, 2**62, 2**62])), "too large dimensions"),
        (head(tensor([1], shape=[1] * 40)), "too many"),
        (head(tensor(1, shape=[1])), "Expected `array`"),
        (head(tensor(None, shape=[1])), "Expected `array`"),
        (head(tensor([1.5])), "as INT32: Expected `int`, got `float`"),
        (head(tensor([True])), "Expected `int`, got `bool`"),
        (head(tensor([1], "BOOL")), "Expected `bool`, got `int`"),
        (head(tensor(["1"], "FP32")), "Expected `float`, got `str`"),
        (head(tensor([True], "FP32")), "Expected `float`, got `bool`"),
        (head(tensor([None], "FP32")), "Expected `float`, got `null`"),
        (head(tensor([1], "BYTES")), "Expected `str`, got `int`"),
        (head(tensor([[1, 2], [3, "4"]], shape=[2, 2])), "Expected `int`, got `str`"),
        (head(tensor([2**31])), "<= 2147483647"),
        (head(tensor([-1], "UINT64")), ">= 0"),
        (head(tensor([2**64], "UINT64")), "outside the range of UINT64"),
        (head(tensor([1e39], "FP32")), "outside the range of FP32"),
        (head(tensor([1.0], "FP16")), "receiving FP16 data via JSON is not supported"),
        (head(tensor([1.0], "BF16")), "receiving BF16 data via JSON is not supported"),
        (head(tensor(json.loads("[" * 40 + "1" + "]" * 40), shape=[1])), "nested more than 32 levels"),
        (head(tensor([1]), tensor([1])), "'x' already exists in request"),
        (head(binary(4)), "only 0 bytes follow"),
        (head(binary(-4)), "binary_data_size"),
        (head(binary(2**70)), "binary_data_size"),
    ],
)
async def test_bad_json_is_refused(rest_address: str, plane: EchoPlane, body: bytes, sentence: str) -> None:
    reply = await send(rest_address, INFER, body)
    assert reply.status == 400
    assert sentence in reply.error
    assert plane.requests == []


@pytest.mark.parametrize(
    ("item", "buffer", "sentence"),
    [
        (binary(3), b"abc", "needs 4 bytes of data but got 3"),
        (binary(4), b"abc", "only 3 bytes follow"),
        (binary(4), b"abcde", "1 bytes follow the data of the last input"),
        (binary(0, shape=[1]), b"", "needs 4 bytes of data but got 0"),
        (binary(2, "BOOL", [2]), b"\x01\x02", "neither 0 nor 1"),
        (binary(3, "BYTES"), b"\0\0\0", "fewer than the 1 elements"),
        (binary(6, "BYTES"), b"\x03\0\0\0ab", "ends within an element"),
        (binary(8, "BYTES"), b"\xff\xff\xff\xffabcd", "ends within an element"),
        (binary(9, "BYTES", [2]), b"\x03\0\0\0abc\0\0", "ends within the length"),
        (binary(8, "BYTES"), b"\x03\0\0\0abcd", "1 bytes after the 1 elements"),
        (binary(4, "BYTES", [2**50]), b"\0\0\0\0", "fewer than"),
        (binary(4, shape=[2**40, 2**40]), b"abcd", "needs"),
    ],
)
async def test_bad_buffers_are_refused(rest_address: str, item: dict[str, Any], buffer: bytes, sentence: str) -> None:
    body, length = with_buffer(item, buffer)
    reply = await send(rest_address, INFER, body, headers={HEADER: str(length)})
    assert reply.status == 400
    assert sentence in reply.error


@pytest.mark.parametrize("value", ["-1", "1e3", "abc", "", "1_0", "٣", "999999", "9" * 5000])
async def test_wrong_header_length(rest_address: str, value: str) -> None:
    reply = await send(rest_address, INFER, head(tensor([1])), headers={HEADER: value})
    assert reply.status == 400
    assert HEADER in reply.error


@pytest.mark.parametrize("shift", [-1, 1])
async def test_header_length_off_by_one(rest_address: str, shift: int) -> None:
    body, length = with_buffer(binary(4), b"abcd")
    reply = await send(rest_address, INFER, body, headers={HEADER: str(length + shift)})
    assert reply.status == 400
    assert reply.error
