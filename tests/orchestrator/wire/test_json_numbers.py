"""Numbers of large JSON: read in pieces, and refused where they would take long."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest

from cascadeserve.errors import InvalidRequest, RequestTooLarge
from orchestrator.wire import json_numbers
from orchestrator.wire.json_data import flattened
from orchestrator.wire.json_numbers import read_numbers
from tests.orchestrator.wire.test_not_finite import read

# integers that do not fit into 64 bits are read another way
NUMBERS = ("0", "-1", "2.5", "1e300", "5e-324", "0.1", "100000000000000000000", "-123456789.123456789", "[[ 7 ]]")
WORDS = ("NaN", "Infinity", "-Infinity")
OTHER = ("[]", "true", "null", '"1"', '"1,[2],3"', '{"a":1,"b":[2]}', '"\\","')


def nested(chance: random.Random, elements: list[str]) -> str:
    """Lists in lists around some elements, in their order, none of them empty."""
    if len(elements) < 2 or chance.random() < 0.2:
        return "[" + ", ".join(elements) + "]"
    at = chance.randrange(1, len(elements))
    return f"[{nested(chance, elements[:at])},{nested(chance, elements[at:])} ]"


@pytest.fixture
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_numbers, "_PIECE_BYTES", 5)


@pytest.mark.usefixtures("_small_pieces")
@pytest.mark.parametrize("seed", range(30))
def test_pieces_are_the_whole(seed: int) -> None:
    chance = random.Random(seed)
    data = nested(chance, chance.choices(NUMBERS, k=chance.randrange(1, 20)))
    numbers = read_numbers(data.encode())
    assert numbers is not None
    assert numbers.tolist() == [float(each) for each in flattened("x", json.loads(data))]
    # one that is no number
    data = nested(chance, chance.sample([*chance.choices(NUMBERS, k=9), chance.choice(OTHER)], 10))
    assert read_numbers(data.encode()) is None
    data = nested(chance, chance.choices([*NUMBERS, *WORDS], k=chance.randrange(1, 20)))
    numbers = read_numbers(data.encode())
    assert numbers is not None
    np.testing.assert_array_equal(numbers, np.array(flattened("x", json.loads(data)), float))


@pytest.mark.usefixtures("_small_pieces")
def test_empty_lists_are_nothing() -> None:
    assert read("[[1],[],[2,[]]]", count=2).inputs[0].array.tolist() == [1, 2]


@pytest.mark.usefixtures("_small_pieces")
def test_numbers_that_take_long_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_numbers, "_GRACE_S", -1.0)
    for data in ("[1,2,3,4,5]", "[NaN,2,3,4,5]"):
        with pytest.raises(RequestTooLarge, match="17 digits"):
            read(data, count=5)


@pytest.mark.parametrize("datatype", ["FP32", "FP64", "INT8", "BOOL"])
def test_data_that_is_longer_than_its_numbers_is_refused(datatype: str) -> None:
    # however many a shape claims
    for data in (f"[{'1' * (1 << 20)}{'0' * 64}]", f"[{'1,' * 40_000}{'1' * (3 << 20)}]"):
        with pytest.raises(RequestTooLarge, match="longer than 32 bytes a number"):
            read(data, datatype, 10**9 if "," in data else 1)


def test_white_space_is_free() -> None:
    line, count = "\n" + " " * 30 + "0.123456789012345678", 60_000
    assert read(f"[{','.join([line] * count)}]", count=count).inputs[0].array.size == count


def test_what_is_not_plain_numbers_may_be_so_long() -> None:
    number = "0.12345678901234567890"
    for num_lists, error in ((100_000, InvalidRequest), (250_000, RequestTooLarge)):
        with pytest.raises(error):
            read(f"[{','.join([number] * num_lists)},true]", count=num_lists + 1)
