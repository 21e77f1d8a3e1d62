"""What is sent over the socket comes out of it as it was, however it is cut up on its way."""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from orchestrator.front_door import ServeSettings
from orchestrator.fronts.frames import (
    Answer,
    Cancel,
    Counted,
    Failed,
    FromDispatcher,
    FromFront,
    Infer,
    Link,
    Listening,
    Metrics,
    Refused,
    ShowMetrics,
    ShowStatistics,
    Welcome,
)
from orchestrator.wire.datatypes import DTYPES, bytes_array
from orchestrator.wire.descriptions import Duration, ModelStatistics
from orchestrator.wire.limits import Limits
from orchestrator.wire.tensors import InferRequest, InferResponse, RequestedOutput, Tensor
from orchestrator.wire.tls import TlsFiles

if TYPE_CHECKING:
    from collections.abc import Iterator

numbers = st.integers(0, 2**63 - 1)
parameters = st.dictionaries(
    st.text(max_size=8),
    st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | st.text(max_size=8),
    max_size=3,
)
shapes = array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    datatype = draw(st.sampled_from(sorted(DTYPES)))
    shape = draw(shapes)
    if datatype == "BYTES":
        count = math.prod(shape)
        elements = draw(st.lists(st.binary(max_size=9), min_size=count, max_size=count))
        return Tensor("b", datatype, bytes_array(elements).reshape(shape))
    array = draw(arrays(DTYPES[datatype], shape))
    # as a slice of something else, too
    return Tensor("a", datatype, array[..., ::2] if shape and draw(st.booleans()) else array)


requests = st.builds(
    InferRequest,
    model_name=st.text(max_size=8),
    inputs=st.lists(tensors(), max_size=3),
    id=st.text(max_size=8),
    parameters=parameters,
    outputs=st.lists(st.builds(RequestedOutput, st.text(max_size=8), st.booleans(), st.integers(0, 9)), max_size=2),
    binary_outputs=st.booleans(),
    client_timeout_s=st.none() | st.floats(allow_nan=False),
    admitted=st.booleans(),
    waited_s=st.floats(0.0, 1e9),
)
responses = st.builds(
    InferResponse, st.text(max_size=8), st.just("1"), st.lists(tensors(), max_size=3), parameters=parameters
)
durations = st.builds(Duration, numbers, numbers)
statistics = st.builds(
    ModelStatistics,
    st.text(max_size=8),
    st.just("1"),
    numbers,
    success=durations,
    batches=st.dictionaries(st.integers(1, 64), durations, max_size=3),
)
from_front = st.one_of(
    st.builds(Infer, numbers, requests),
    st.builds(Cancel, numbers),
    st.builds(ShowMetrics, numbers),
    st.builds(ShowStatistics, numbers, st.text(max_size=8), st.just("1")),
    st.builds(Refused, st.text(max_size=8), st.just("InvalidRequest"), numbers, st.floats(0.0, 1e9)),
    st.builds(Listening),
)
from_dispatcher = st.one_of(
    st.builds(Answer, numbers, responses),
    st.builds(Failed, numbers, st.just("Unavailable"), st.text(), st.just({"retry_after_s": 2.5})),
    st.builds(Metrics, numbers, st.binary(max_size=99), st.just("text/plain")),
    st.builds(Counted, numbers, st.lists(statistics, max_size=2)),
)


class Wire(asyncio.Transport):
    """Keeps what is written."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""

    def is_closing(self) -> bool:
        return False

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        pass

    def write(self, data: Any) -> None:
        self.written += data


def plain(message: Any) -> Any:
    """The message with its arrays as (dtype, shape, elements), which can be compared, NaN too."""
    return msgspec.to_builtins(
        message,
        enc_hook=lambda array: [array.dtype.str, array.shape, list(map(repr, array.ravel().tolist()))],
    )


def sent(messages: list[Any], kind: Any, sizes: Iterator[int]) -> list[Any]:
    """Send messages from one link to another, in pieces of these sizes."""

    async def run() -> list[Any]:
        received: list[Any] = []
        wire = Wire()
        sender, receiver = Link(kind, received.append, list), Link(kind, received.append, list)
        sender.connection_made(wire)
        receiver.connection_made(Wire())
        for message in messages:
            sender.send(message)
        await asyncio.sleep(0)
        start = 0
        while start < len(wire.written):
            end = start + next(sizes)
            receiver.data_received(wire.written[start:end])
            start = end
        return received

    return asyncio.run(run())


@given(st.lists(from_front, max_size=4), st.integers(1, 200))
def test_what_a_front_says(messages: list[Any], size: int) -> None:
    assert plain(sent(messages, FromFront, iter(lambda: size, 0))) == plain(messages)


@given(st.lists(from_dispatcher, max_size=4), st.integers(1, 200))
def test_what_the_dispatcher_says(messages: list[Any], size: int) -> None:
    assert plain(sent(messages, FromDispatcher, iter(lambda: size, 0))) == plain(messages)


def test_what_a_front_is_to_allow() -> None:
    files = TlsFiles(Path("cert.pem"), Path("key.pem"))
    settings = ServeSettings("::1", 1, 2, 3, 0.5, 2.0, max_rows=7, limits=Limits(max_connections=5), tls=files)
    assert sent([Welcome(settings)], FromDispatcher, iter(lambda: 16, 0)) == [Welcome(settings)]


def test_a_large_tensor_between_small_messages() -> None:
    array = np.random.default_rng(0).random((600, 1000))
    request = InferRequest("m", [Tensor("x", "FP64", array)])
    first, second, third = sent([Cancel(1), Infer(2, request), Cancel(3)], FromFront, iter(lambda: 1 << 16, 0))
    assert (first, second.number, third) == (Cancel(1), 2, Cancel(3))
    np.testing.assert_array_equal(second.request.inputs[0].array, array)


def test_what_is_no_message_is_an_error_that_ends_the_connection() -> None:
    async def run() -> None:
        link = Link(FromFront, print, list)
        link.connection_made(Wire())
        with pytest.raises(msgspec.ValidationError):  # asyncio closes the transport on it
            link.data_received(b"\x01\0\0\0\xc0")

    asyncio.run(run())
