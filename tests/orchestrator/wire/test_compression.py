from __future__ import annotations

import asyncio
import gzip
import time
import zlib

import numpy as np
import pytest

from cascadeserve.errors import InvalidRequest, NotSupported, Overloaded, RequestError, RequestTooLarge
from orchestrator.wire.compression import MIN_BYTES, Unfolder, chosen_encoding, compressed
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


def bare(body: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(body) + packer.flush()


async def unfolded(body: bytes, encoding: str, limit_bytes: int) -> bytes:
    return (await Unfolder().unfold(body, encoding, limit_bytes))[0]


@pytest.mark.parametrize("body", [b"", b"a", LONG, LONG * 1000])
async def test_requests_unfold(body: bytes) -> None:
    limit = 1 << 20
    assert await unfolded(gzip.compress(body), "gzip", limit) == body
    assert await unfolded(gzip.compress(body) + gzip.compress(b"more"), "gzip", limit) == body + b"more"
    assert await unfolded(zlib.compress(body), "deflate", limit) == body
    assert await unfolded(bare(body), "deflate", limit) == body
    assert await unfolded(body, "identity", limit) == body


@pytest.mark.parametrize("size", [(1 << 16) - 1, 1 << 16, (1 << 17) + 30, 300_000])
async def test_members_that_end_anywhere_unfold(size: int) -> None:
    """Unfolding goes in portions, of what comes and of what it becomes."""
    noise = np.random.default_rng(size).bytes(size)
    for body in (noise, bytes(size)):
        members = [gzip.compress(body), gzip.compress(noise[:1000]), gzip.compress(b""), gzip.compress(body, 0)]
        assert await unfolded(b"".join(members), "gzip", 1 << 20) == body + noise[:1000] + body
        assert await unfolded(zlib.compress(body, 0), "deflate", 1 << 20) == body
        with pytest.raises(InvalidRequest, match="cut short"):
            await unfolded(b"".join(members)[:-1], "gzip", 1 << 20)


@pytest.mark.parametrize("size", [100, 1 << 20])
async def test_no_further_than_the_limit(size: int) -> None:
    body = b"a" * size
    assert await unfolded(gzip.compress(body), "gzip", size) == body
    for packed in (gzip.compress(body), gzip.compress(body[1:]) + gzip.compress(b"a" * 10)):
        with pytest.raises(RequestTooLarge, match="as it unfolds"):
            await unfolded(packed, "gzip", size - 1)


async def test_not_of_any_number_of_parts() -> None:
    with pytest.raises(InvalidRequest, match="pieces of gzip in a row"):
        await unfolded(gzip.compress(b"") * 1000, "gzip", 1 << 20)


# eight blocks with Huffman codes of their own, each of which says how long its codes are and then ends
EMPTY_BLOCKS = bytes.fromhex(
    "04c081000000000090ff6b100007020000000040feaf41001c080000000000f9bf060170200000000000e4ff1a"
    "04c081000000000090ff6b100007020000000040feaf41001c080000000000f9bf060170200000000000e4ff1a"
)


@pytest.mark.parametrize("size", [1 << 14, 1 << 17, 1 << 22])
async def test_blocks_that_hold_nothing_are_not_read_for_long(size: int) -> None:
    body = EMPTY_BLOCKS * (size // len(EMPTY_BLOCKS)) + b"\x03\0"
    begun_s = time.thread_time()
    if size < 1 << 20:
        assert await unfolded(body, "deflate", 1 << 20) == b""
    else:
        with pytest.raises(InvalidRequest, match="many times longer to unfold"):
            await unfolded(body, "deflate", 1 << 20)
    # the rest of it in the other thread
    assert time.thread_time() - begun_s < 0.1


async def test_what_would_wait_for_too_long_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("orchestrator.wire.turns._LEAST_S", -1.0)
    unfolder, packed = Unfolder(), gzip.compress(bytes(1 << 20))
    results = await asyncio.gather(
        *(unfolder.unfold(packed, "gzip", 1 << 20) for _ in range(3)), return_exceptions=True
    )
    (first, first_s), (second, second_s) = results[:2]
    assert first == second == bytes(1 << 20)
    assert 0 <= first_s < second_s
    assert isinstance(results[2], Overloaded)
    assert await unfolder.unfold(gzip.compress(b"short"), "gzip", 100) == (b"short", 0.0)


@pytest.mark.parametrize("cut", range(1, 25))
async def test_what_is_cut_short_is_refused(cut: int) -> None:
    with pytest.raises(InvalidRequest, match="cut short"):
        await unfolded(gzip.compress(LONG, mtime=0)[:-cut], "gzip", 1 << 20)


@pytest.mark.parametrize(
    ("body", "encoding", "error"),
    [(b"nonsense", "gzip", InvalidRequest), (b"nonsense", "deflate", InvalidRequest), (b"", "br", NotSupported)],
)
async def test_what_is_none_is_refused(body: bytes, encoding: str, error: type[RequestError]) -> None:
    with pytest.raises(error):
        await unfolded(body, encoding, 1 << 20)
