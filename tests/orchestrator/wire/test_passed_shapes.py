"""Shapes of requests that are passed on."""

from __future__ import annotations

import time

import pytest

from cascadeserve.errors import InvalidRequest, RequestTooLarge
from orchestrator.wire.exchange import Call
from orchestrator.wire.passed_shapes import check_http

ENDS_IT = b'{"inputs":[{"name":"x","datatype":"FP32","shape":[1048576,1048576],"data":[1]}]}'
LENGTH = len(ENDS_IT)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"no JSON",
        b'{"inputs":[{"shape":[1,3,224,224],"data":[0]}]}',
        b'{"inputs":[{"name":"no shape"},{"shape":[]},{"shape":"text"},{"shape":[2,1.5]}]}',
        b'{"inputs":[{"shape":[2],"datatype":"BYTES","data":["{\\"shape\\":[1048576,1048576]}", "\\u00e9"]}]}',
    ],
)
def test_what_a_server_can_refuse_by_itself_is_passed_on(body: bytes) -> None:
    check_http(Call(body=body))


# each ended a tritonserver 2.51
@pytest.mark.parametrize(
    ("body", "header_length"),
    [
        (ENDS_IT, None),
        (ENDS_IT + b"raw", str(LENGTH)),
        (ENDS_IT, f"+{LENGTH}"),
        (ENDS_IT, f"{LENGTH}x"),
        (b"\xef\xbb\xbf" + ENDS_IT, None),
        (ENDS_IT.replace(b"[1]", b"[NaN]"), None),
        (ENDS_IT.replace(b":[1048", b" : \n[ 1048"), None),
        (ENDS_IT[:-1] + b',"inputs":[]}', None),
        (ENDS_IT.replace(b',"data"', b',"shape":[1],"data"'), None),
        (ENDS_IT[:-2] + b",null]}", None),
        (ENDS_IT[:-1] + b',"id":"\xff"}', None),
        (ENDS_IT.replace(b'"shape"', b'"s\\u0068ape"'), None),
    ],
)
def test_what_may_end_a_server_is_not_passed_on(body: bytes, header_length: str | None) -> None:
    with pytest.raises(InvalidRequest, match=r"more elements|escapes"):
        check_http(Call(body=body, header_length=header_length))


def test_hostile_requests_are_not_read() -> None:
    begun_s = time.process_time()
    with pytest.raises(InvalidRequest, match="too many dimensions"):
        check_http(Call(body=b'{"inputs":[{"shape":[' + b"1," * (10 << 20) + b"1]}]}"))
    with pytest.raises(RequestTooLarge, match="too many shapes"):
        check_http(Call(body=b'{"inputs":[' + b'{"shape":[]},' * (1 << 20) + b"{}]}"))
    check_http(Call(body=b'{"inputs":[' + b"{}," * (10 << 20) + b"{}]}"))
    assert time.process_time() - begun_s < 1.0
