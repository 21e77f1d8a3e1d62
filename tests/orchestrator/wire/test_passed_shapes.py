"""Shapes of requests that are passed on."""

from __future__ import annotations

import time

import pytest

from cascadeserve.errors import InvalidRequest, RequestTooLarge
from orchestrator.wire.exchange import Call
from orchestrator.wire.passed_shapes import check_http


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"no JSON",
        b'{"inputs":[{"shape":[1,3,224,224],"data":[0]}]}',
        b'{"inputs":[{"name":"no shape"},{"shape":[]},{"shape":"text"},{"shape":[2,1.5]}]}',
    ],
)
def test_what_a_server_can_refuse_by_itself_is_passed_on(body: bytes) -> None:
    check_http(Call(body=body))


@pytest.mark.parametrize("behind", [None, b"raw"])
def test_more_elements_than_a_request_can_hold(behind: bytes | None) -> None:
    head = b'{"inputs":[{"shape":[1]},{"shape":[4294967296,-2,1024]}]}'
    with pytest.raises(InvalidRequest, match="more elements"):
        check_http(Call(body=head) if behind is None else Call(body=head + behind, header_length=str(len(head))))


def test_hostile_requests_are_not_read() -> None:
    begun_s = time.process_time()
    with pytest.raises(InvalidRequest, match="too many dimensions"):
        check_http(Call(body=b'{"inputs":[{"shape":[' + b"1," * (10 << 20) + b"1]}]}"))
    with pytest.raises(RequestTooLarge, match="objects"):
        check_http(Call(body=b'{"inputs":[' + b"{}," * (10 << 20) + b"{}]}"))
    assert time.process_time() - begun_s < 1.0
