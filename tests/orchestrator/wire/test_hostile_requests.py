"""Requests within the size limit that are made to cost much: refused early, in a sentence, and never as our fault."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import service_pb2

from cascadeserve.errors import InvalidRequest, RequestTooLarge
from orchestrator.request_options import read_options
from orchestrator.wire.codec_grpc import decode_infer_request
from orchestrator.wire.codec_http import decode_request
from orchestrator.wire.datatypes import MAX_DIM, MAX_DIMS
from orchestrator.wire.limits import MAX_ENTRIES, MAX_ID_BYTES
from tests.orchestrator.wire.bodies import INFER, binary, head, tensor
from tests.orchestrator.wire.stock_clients import send
from tests.orchestrator.wire.test_rpc import message, refused, typed

if TYPE_CHECKING:
    from collections.abc import Callable

    from orchestrator.wire.tensors import InferRequest

# far below what they took before, far above what they take on a busy machine
SOON_S = 5.0
MANY = MAX_ENTRIES + 1


def read(body: bytes, header_length: int | None = None, **limits: Any) -> InferRequest:
    return decode_request(body, header_length, model_name="m", **limits)


def read_grpc(request: Any, **limits: int) -> InferRequest:
    return decode_infer_request(request, None, **limits)


def empty(name: str) -> dict[str, Any]:
    return tensor([], "BOOL", name=name)


@pytest.mark.parametrize(
    ("what", "request_"),
    [
        ("inputs", {"inputs": [empty(str(i)) for i in range(MANY)]}),
        ("outputs", {"inputs": [empty("x")], "outputs": [{"name": "x"}] * MANY}),
        ("parameters", {"inputs": [empty("x")], "parameters": {str(i): 1 for i in range(MANY)}}),
    ],
)
def test_so_many_entries_and_no_more(what: str, request_: dict[str, Any]) -> None:
    with pytest.raises(RequestTooLarge, match=f"has {MANY} {what}; there may be {MAX_ENTRIES}"):
        read(json.dumps(request_).encode())
    entries = request_[what]
    fewer = entries[1:] if isinstance(entries, list) else dict(list(entries.items())[1:])
    assert read(json.dumps(request_ | {what: fewer}).encode()).inputs


def test_so_many_entries_over_grpc() -> None:
    item = {"name": "x", "datatype": "BOOL", "shape": [0]}
    many = message(item)
    for i in range(MANY):
        many.parameters[str(i)].bool_param = True
    for request_ in (
        message(*[item] * MANY),
        message(item, outputs=[service_pb2.ModelInferRequest.InferRequestedOutputTensor()] * MANY),
        many,
    ):
        with pytest.raises(RequestTooLarge, match="there may be 1000"):
            read_grpc(request_)


async def test_statuses_of_too_many_entries(rest_address: str, rpc_address: str) -> None:
    reply = await send(rest_address, INFER, head(empty("x"), outputs=[{"name": "x"}] * MANY))
    assert (reply.status, "there may be 1000" in reply.error) == (413, True)
    item = {"name": "x", "datatype": "BOOL", "shape": [0]}
    code, _ = await refused(rpc_address, message(*[item] * MANY))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("number", [b"1", b"NaN"])
def test_very_many_entries_are_refused_unread(number: bytes) -> None:
    item = b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":[%s]}],' % number
    parameters = b'"parameters":{%s}}' % b",".join(b'"%d":1' % i for i in range(200_000))
    outputs = b'"outputs":[%s]}' % b",".join([b'{"name":"x"}'] * 200_000)
    for rest in (parameters, outputs):
        with pytest.raises(RequestTooLarge, match="there may be 1000 inputs, outputs and parameters"):
            read(item + rest)
    # Texts have colons too.
    texts = [":" * 50] * 4000
    assert read(head(tensor(texts, "BYTES"), parameters={"a": ":" * 50_000})).inputs[0].array.size == len(texts)


def test_one_input_twice_among_many_is_found_soon() -> None:
    names = [str(i) for i in range(MAX_ENTRIES - 2)] + ["z", "z"]
    began_s = time.perf_counter()
    with pytest.raises(InvalidRequest, match="input 'z' already exists"):
        read(head(*map(empty, names)))
    assert time.perf_counter() - began_s < SOON_S


@pytest.mark.parametrize("shape", [[MAX_DIM] * 230, [MAX_DIM] * 40_000 + [0], [MAX_DIM] * MAX_DIMS])
@pytest.mark.parametrize("datatype", ["FP32", "BYTES"])
def test_absurd_shapes(shape: list[int], datatype: str) -> None:
    raw = head(binary(4, datatype, shape))
    item = {"name": "x", "datatype": datatype, "shape": shape}
    contents = {"bytes_contents": [b"a"]} if datatype == "BYTES" else {"fp32_contents": [1]}
    began_s = time.perf_counter()
    attempts: tuple[Callable[[], InferRequest], ...] = (
        lambda: read(head(tensor(["1"] if datatype == "BYTES" else [1], datatype, shape))),
        lambda: read(raw + b"\0" * 4, len(raw)),
        lambda: read_grpc(message(item, raw_input_contents=[b"\0" * 4])),
        lambda: read_grpc(message(typed(datatype, shape, **contents))),
    )
    for attempt in attempts:
        with pytest.raises(InvalidRequest) as caught:
            attempt()
        assert len(str(caught.value)) < 400
    assert time.perf_counter() - began_s < SOON_S


@pytest.mark.parametrize(
    "body",
    [
        b'{"id":"\\ud800","inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":[NaN]}]}',
        b'{"inputs":[{"name":"\\ud800","datatype":"FP32","shape":[1],"data":[NaN]}]}',
        b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":[NaN]}],"outputs":[{"name":"\\udfff"}]}',
        b'{"parameters":{"\\ud800":1},"inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":[NaN]}]}',
        b'{"parameters":{"a":"\\ud800"},"inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":[NaN]}]}',
        b'{"inputs":[{"name":"x","datatype":"BYTES","shape":[1],"data":["NaN\\ud800"]}]}',
        b'{"id":"\xed\xa0\x80","inputs":[{"name":"x","datatype":"FP32","shape":[1],"data":[NaN]}]}',
    ],
)
async def test_half_a_surrogate_pair_is_the_clients_fault(rest_address: str, body: bytes) -> None:
    assert (await send(rest_address, INFER, body)).status == 400


def test_a_whole_surrogate_pair_is_text() -> None:
    body = (
        b'{"id":"\\ud83d\\ude00","inputs":[{"name":"x","datatype":"BYTES","shape":[1],"data":["NaN\\ud83d\\ude00"]}]}'
    )
    request = read(body)
    assert (request.id, request.inputs[0].array.tolist()) == ("\U0001f600", ["NaN\U0001f600".encode()])


def test_listed_elements_count_over_all_inputs() -> None:
    texts = b"\0\0\0\0" * 60
    both = head(binary(240, "BYTES", [60]), binary(240, "BYTES", [60], "y"))
    with pytest.raises(RequestTooLarge, match="lists more than 100 elements up to input 'y'"):
        read(both + 2 * texts, len(both), max_listed_elements=100)
    assert len(read(both + 2 * texts, len(both), max_listed_elements=120).inputs) == 2
    items = [{"name": name, "datatype": "BYTES", "shape": [60]} for name in "xy"]
    listed = [item | {"contents": {"bytes_contents": [b""] * 60}} for item in items]
    for request_ in (message(*items, raw_input_contents=[texts] * 2), message(*listed)):
        with pytest.raises(RequestTooLarge, match="lists more than 100 elements up to input 'y'"):
            read_grpc(request_, max_listed_elements=100)
        assert len(read_grpc(request_, max_listed_elements=120).inputs) == 2


def nested(element: bytes, count: int, depth: int) -> bytes:
    data = b",".join([b"[" * depth + element + b"]" * depth] * count)
    datatype = b"BYTES" if element.startswith(b'"') else b"FP32"
    return b'{"inputs":[{"name":"x","datatype":"%s","shape":[%d],"data":[%s]}]}' % (datatype, count, data)


@pytest.mark.parametrize("element", [b"NaN", b'"a"'])
def test_lists_count_as_values(element: bytes) -> None:
    with pytest.raises(RequestTooLarge, match="more than 1000 lists"):
        read(nested(element, 100, 15), max_listed_elements=1000)
    # a list for each row is not too many
    assert read(nested(element, 990, 1), max_listed_elements=1000).inputs[0].array.shape == (990,)


def test_each_list_is_gone_through_once() -> None:
    count = 200_000
    flat = b",".join([b'"a"'] * (count - 1))
    body = b'{"inputs":[{"name":"x","datatype":"BYTES","shape":[%d],"data":[%s,%s"a"%s]}]}' % (
        count,
        flat,
        b"[" * 31,
        b"]" * 31,
    )
    began_s = time.perf_counter()
    assert read(body).inputs[0].array.shape == (count,)
    assert time.perf_counter() - began_s < SOON_S


@pytest.mark.parametrize(
    ("data", "flat"),
    [
        ([[["a"], ["b"]], [["c"], ["d"]]], ["a", "b", "c", "d"]),
        (["a", [["b"], "c"], [], "d"], ["a", "b", "c", "d"]),
        ([[], []], []),
        ([["a", ["b"]], [[["c"]]]], ["a", "b", "c"]),
    ],
)
def test_nested_data_keeps_its_order(data: list[Any], flat: list[str]) -> None:
    array = read(head(tensor(data, "BYTES", [len(flat)]))).inputs[0].array
    assert array.tolist() == [text.encode() for text in flat]


@pytest.mark.parametrize("beside", [[], ["b"]])
def test_depth_of_nesting(beside: list[str]) -> None:
    def deep(levels: int) -> list[Any]:
        data: list[Any] = ["a"]
        for _ in range(levels - 2):
            data = [data]
        return [data, *beside]

    count = 1 + len(beside)
    assert read(head(tensor(deep(32), "BYTES", [count]))).inputs[0].array.size == count
    with pytest.raises(InvalidRequest, match="nested more than 32 levels"):
        read(head(tensor(deep(33), "BYTES", [count])))


async def test_long_ids_are_refused(rest_address: str, rpc_address: str) -> None:
    for text in ("a" * (MAX_ID_BYTES + 1), "é" * (MAX_ID_BYTES // 2 + 1)):
        reply = await send(rest_address, INFER, head(tensor([1]), id=text))
        assert (reply.status, "id of the request is longer" in reply.error) == (400, True)
        code, sentence = await refused(rpc_address, message(typed("FP32", [1], fp32_contents=[1]), id=text))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "id of the request is longer" in sentence
    longest = "é" * (MAX_ID_BYTES // 2)
    assert (await send(rest_address, INFER, head(tensor([1]), id=longest))).status == 200


async def test_the_index_takes_a_short_body(rest_address: str) -> None:
    path = "/v2/repository/index"
    assert (await send(rest_address, path, b"{}" + b" " * 1000)).status == 200
    assert (await send(rest_address, path, b" " * (1 << 17))).status == 413


def test_work_is_counted_before_it_is_read() -> None:
    began_s = time.perf_counter()
    with pytest.raises(InvalidRequest, match="'work' must be"):
        read_options({"work": "1," * 5_000_000}, 2)
    assert time.perf_counter() - began_s < SOON_S
    assert read_options({"work": "1,0.5"}, 2).work_per_row == 0.75


def test_numbers_beyond_any_datatype_beside_nan() -> None:
    for number in (b"1" * 400, b"-" + b"1" * 4000, b"1" * 5000):
        body = b'{"inputs":[{"name":"x","datatype":"FP64","shape":[2],"data":[NaN,%s]}]}' % number
        with pytest.raises(InvalidRequest):
            read(body)
    array = read(b'{"inputs":[{"name":"x","datatype":"FP64","shape":[2],"data":[NaN,1]}]}').inputs[0].array
    assert np.isnan(array[0])
