from __future__ import annotations

import gzip
import zlib

import pytest

from orchestrator.wire.compression import MIN_BYTES, chosen_encoding, compressed
from orchestrator.wire.exchange import Answer

LONG = b"a" * MIN_BYTES


@pytest.mark.parametrize(
    ("header", "encoding"),
    [
        ("gzip", "gzip"),
        ("deflate", "deflate"),
        ("gzip, deflate", "gzip"),
        ("deflate, gzip", "deflate"),
        ("GZIP;q=0.1,deflate;q=0.5", "deflate"),
        ("gzip;q=0, deflate; q=0.5", "deflate"),
        ("gzip;q=0", None),
        ("gzip;q=x", None),
        ("gzip;q=nan", None),
        ("br, identity", None),
        ("*", None),
        ("", None),
    ],
)
def test_what_is_chosen(header: str, encoding: str | None) -> None:
    assert chosen_encoding(header) == encoding


@pytest.mark.parametrize("body", [LONG, LONG * 100])
async def test_both_ways_unfold_to_the_body(body: bytes) -> None:
    packed = await compressed(Answer(body=body), "gzip")
    assert gzip.decompress(packed.body) == body
    assert packed.headers["Content-Encoding"] == "gzip"
    packed = await compressed(Answer(body=body), "deflate")
    assert zlib.decompress(packed.body) == body


async def test_short_bodies_stay_as_they_are() -> None:
    answer = await compressed(Answer(body=LONG[1:]), "gzip")
    assert answer.body == LONG[1:]
    assert "Content-Encoding" not in answer.headers
