"""NaN and Infinity in JSON, and nested data: read as the standard library reads them, at the cost of other numbers."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from cascadeserve.errors import InvalidRequest, RequestTooLarge
from orchestrator.wire.codec_http import decode_request
from orchestrator.wire.json_data import flattened
from tests.orchestrator.wire.bodies import head, tensor

if TYPE_CHECKING:
    from orchestrator.wire.tensors import InferRequest

NUMBERS = ("NaN", "Infinity", "-Infinity", "0", "-0", "1", "2", "-2", "0.5", "1e300", "[0E-01]", "5e-324")
BROKEN = (
    "1NaN",
    "NaN1",
    "-NaN",
    "0eNaN",
    "0.NaN",
    "0.02eInfinity",
    "NaNNaN",
    "NaN Infinity",
    "nan",
    "+Infinity",
    "0.NaN1",
)


def read(data: str, datatype: str = "FP64", count: int = 1, beside: str = "") -> InferRequest:
    body = f'{{"inputs":[{{"name":"x","datatype":"{datatype}","shape":[{count}],"data":{data}}}]{beside}}}'
    return decode_request(body.encode(), None, model_name="m")


def nested(chance: random.Random, elements: list[str]) -> str:
    """Lists in lists around some elements, in their order."""
    if len(elements) < 2 or chance.random() < 0.2:
        return "[" + ", ".join(elements) + "]"
    at = chance.randrange(len(elements))
    return f"[{nested(chance, elements[:at])},{nested(chance, elements[at:])} ]"


@pytest.mark.parametrize("seed", range(50))
def test_numbers_are_those_of_the_standard_library(seed: int) -> None:
    chance = random.Random(seed)
    data = nested(chance, chance.choices(NUMBERS, k=chance.randrange(1, 20)))
    wanted = np.array(flattened("x", json.loads(data)))
    # escapes and other inputs' texts take other ways
    for text in ("a", "NaN", "\\u00e9", "[0E-01]", "\\\\", '\\"NaN\\\\\\"', '\\\\\\\\", "a": "\\"NaN'):
        array = read(data, count=wanted.size, beside=f',"id":"{text}"').inputs[0].array
        np.testing.assert_array_equal(array, wanted)
        assert (np.signbit(array) == np.signbit(wanted)).all()


@pytest.mark.parametrize("word", BROKEN)
@pytest.mark.parametrize("text", ["a", "\\u00e9"])
def test_words_within_numbers_are_refused(word: str, text: str) -> None:
    for data in (f"[{word}]", f"[NaN,{word}]"):
        with pytest.raises(InvalidRequest):
            read(data, count=data.count(",") + 1, beside=f',"id":"{text}"')


@pytest.mark.parametrize(
    ("beside", "datatype"), [(',"id":NaN', "FP32"), (',"outputs":[{"name":NaN}]', "FP32"), ("", "INT32"), ("", "BOOL")]
)
def test_nothing_but_floats_may_be_not_finite(beside: str, datatype: str) -> None:
    with pytest.raises(InvalidRequest):
        read("[NaN]", datatype, beside=beside)


def test_unknown_keys_may_be_anything() -> None:
    assert np.isnan(read("[NaN]", beside=',"unknown":[NaN,{"a":-Infinity}]').inputs[0].array)


@pytest.mark.parametrize("texts", [["a", "NaN"], ["[", "a]"], ['"', "\\"], ["é", "\n"], [",", "][,"], ["", ""]])
def test_nested_texts_stay_as_they_are(texts: list[str]) -> None:
    for data in ([[texts[0]], [texts[1]]], [texts[0], [], [[texts[1]]]], [[texts]]):
        array = decode_request(head(tensor(data, "BYTES", [2])), None, model_name="m").inputs[0].array
        assert array.tolist() == [text.encode() for text in texts]


@pytest.mark.parametrize(
    ("data", "datatype"),
    [
        ("[" + "[true]," * 3 + "[false]]", "BOOL"),
        ("[[18446744073709551615],[[0]],1, [2] ]", "UINT64"),
        ("[[-1,2],[3,\n4]]", "INT8"),
    ],
)
def test_nested_numbers(data: str, datatype: str) -> None:
    wanted: Any = flattened("x", json.loads(data))
    assert read(data, datatype, len(wanted)).inputs[0].array.tolist() == wanted


@pytest.mark.parametrize("data", ["1", '{"a":1}', '[{"a":[1]}]', "[1,null]", "[[1],null]", "[1.5]", '["1"]', "[]"])
def test_what_is_no_list_of_numbers_is_refused(data: str) -> None:
    with pytest.raises(InvalidRequest):
        read(data, "INT32")


def test_what_takes_long_is_refused() -> None:
    many, some = 140_000, 100_000
    escaped = '["\\\\"]'
    with pytest.raises(RequestTooLarge, match="more than 131072 lists"):
        read(f"[{','.join([escaped] * many)}]", "BYTES", many)
    assert read(f"[{','.join([escaped] * some)}]", "BYTES", some).inputs[0].array.size == some
    with pytest.raises(RequestTooLarge, match="longer than 33554432 bytes"):
        read("[NaN]", beside=f',"unknown":"{"a" * (1 << 25)}"')
    # with what looks like a mark in a text beside, each is one object of Python's
    mark = ',"id":"[0E-0"'
    for data in (f"[NaN{',1' * many}]", f"[NaN,1.{'3' * (4 << 20)}]"):
        with pytest.raises(RequestTooLarge, match="NaN or Infinity beside"):
            read(data, count=data.count(",") + 1, beside=mark)
    with pytest.raises(InvalidRequest, match="311 digits"):
        read(f"[NaN,{'9' * 311}]", count=2, beside=mark)
    for count, beside in ((some, mark), (many, ',"id":"\\u00e9"'), (many, ',"id":"é"')):
        assert read(f"[NaN{',1' * count}]", count=count + 1, beside=beside).inputs[0].array.size == count + 1


def test_words_in_texts_with_escapes_stay_as_they_are() -> None:
    for text in ('"NaN"', '\\"NaN\\', "\\\\", "NaN\u00e9\\", "\U0001f600Infinity\n"):
        request = read("[NaN]", beside=f',"id":{json.dumps(text)}')
        assert request.id == text
    with pytest.raises(InvalidRequest):
        decode_request(b'{"inputs":[],"x":NaN,"id":"\\\\\xff"}', None, model_name="m")
