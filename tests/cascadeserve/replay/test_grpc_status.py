"""Which errors of a call the server made, and which the library."""

from __future__ import annotations

import grpc
import grpc.aio
import pytest
from grpc import StatusCode

from cascadeserve.replay.client import Outcome
from cascadeserve.replay.grpc_sender import _judge_error


@pytest.mark.parametrize(
    ("code", "details", "debug", "outcome"),
    [
        (StatusCode.UNAVAILABLE, "draining", "", Outcome.REFUSED),
        (StatusCode.UNAVAILABLE, "Cancelling all calls", "", Outcome.REFUSED),
        (StatusCode.UNAVAILABLE, "Socket closed", "UNKNOWN:Error received from peer", Outcome.REFUSED),
        (StatusCode.DEADLINE_EXCEEDED, "the deadline passed", "", Outcome.REFUSED),
        (StatusCode.UNKNOWN, "Unexpected <class 'ValueError'>: x", "", Outcome.FAILED),
        (StatusCode.NOT_FOUND, "no such model", "", Outcome.FAILED),
        (StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded", "", Outcome.LOST),
        (StatusCode.DEADLINE_EXCEEDED, "Stream removed (Deadline Exceeded)", "", Outcome.LOST),
        (StatusCode.UNAVAILABLE, "Socket closed", "", Outcome.LOST),
        (StatusCode.UNAVAILABLE, "Stream removed (recvmsg:Connection reset by peer (104))", "", Outcome.LOST),
        (StatusCode.UNAVAILABLE, "Stream removed (GOAWAY received; Error code: 0; Debug Text: )", "", Outcome.LOST),
        (StatusCode.INTERNAL, "Received RST_STREAM with error code 2", "", Outcome.LOST),
        (StatusCode.CANCELLED, "CANCELLED", "", Outcome.REFUSED),
        (StatusCode.CANCELLED, "Stream removed (RST_STREAM (Received RST_STREAM with error code 8))", "", Outcome.LOST),
        (
            StatusCode.UNAVAILABLE,
            "failed to connect to all addresses; last error: UNKNOWN: ipv4:127.0.0.1:1: Connection refused",
            "",
            Outcome.REFUSED,
        ),
        (
            StatusCode.UNAVAILABLE,
            "failed to connect to all addresses; last error: UNAVAILABLE: recvmsg:Connection reset by peer (104)",
            "",
            Outcome.LOST,
        ),
    ],
)
def test_judge_error(code: StatusCode, details: str, debug: str, outcome: Outcome) -> None:
    empty = grpc.aio.Metadata()
    error = grpc.aio.AioRpcError(code, empty, empty, details=details, debug_error_string=debug)
    assert _judge_error(error, 1.0).outcome is outcome
