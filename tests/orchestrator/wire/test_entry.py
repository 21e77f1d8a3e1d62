"""Requests refused at the door: on all ways in, before their bodies are read, and the connection goes on."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import grpc
import grpc.aio
import pytest
from tritonclient.grpc import service_pb2

from cascadeserve.errors import Overloaded
from orchestrator.wire.codec_grpc import model_of
from orchestrator.wire.limits import PEEK_BYTES
from tests.orchestrator.wire.bodies import HEADER, INFER, binary, head, with_buffer
from tests.orchestrator.wire.test_plain_http import LIVE, connect, post
from tests.orchestrator.wire.test_rpc import connect as connect_grpc
from tests.orchestrator.wire.test_rpc import message, typed

if TYPE_CHECKING:
    from tests.orchestrator.wire.echo_plane import EchoPlane

METHOD = "/inference.GRPCInferenceService/ModelInfer"


@pytest.fixture
def full(plane: EchoPlane) -> EchoPlane:
    plane.refusal = Overloaded("too much is waiting", retry_after_s=1.2)
    return plane


@pytest.mark.parametrize("path", [INFER, "/v2/models/%65cho/infer"], ids=["plain", "aiohttp"])
async def test_http_answers_with_retry_after(rest_address: str, full: EchoPlane, path: str) -> None:
    async with connect(rest_address) as client:
        client.send(post(path=path))
        status, headers, body = await client.reply()
    assert (status, headers["Retry-After"]) == (503, "2")
    assert body == b'{"error":"too much is waiting"}'
    assert full.asked == [("echo", "")]
    assert full.requests == []


async def test_the_answer_comes_before_the_body_does(rest_address: str, full: EchoPlane) -> None:
    body, json_bytes = with_buffer(binary(400, "INT32", [100]), bytes(400))
    request = post(body, f"{HEADER}: {json_bytes}", path="/v2/models/echo/versions/2/infer")
    async with connect(rest_address) as client:
        # its JSON has to be there, for it may say that the request is important
        client.send(request[:-401])
        await asyncio.sleep(0.05)
        assert full.asked == []
        client.send(request[-401:-400])
        assert (await client.reply())[0] == 503
        assert full.asked == [("echo", "2")]
        full.refusal = None
        # what comes now is the body nobody wants, and then another request
        client.send(request[-400:] + LIVE)
        assert (await client.reply())[0] == 200
        for piece in (post()[:10], post()[10:-5], post()[-5:]):
            client.send(piece)
            await asyncio.sleep(0.01)
        assert (await client.reply())[0] == 200
    assert len(full.requests) == 1
    assert len(full.asked) == 2, "asked again when the rest of the body came"


async def test_of_much_json_only_the_beginning_is_waited_for(rest_address: str, full: EchoPlane) -> None:
    request = post(b" " * 100_000)
    async with connect(rest_address) as client:
        client.send(request[:-90_000])
        assert (await client.reply())[0] == 503
    assert full.beginnings == [b" " * PEEK_BYTES]


async def test_what_may_be_important_is_read_before_it_is_refused(
    rest_address: str, rpc_address: str, full: EchoPlane
) -> None:
    important, json_bytes = {"priority": 1}, len(head(binary(4), parameters={"priority": 1}))
    body = head(binary(4), parameters=important) + bytes(4)
    async with connect(rest_address) as client:
        for piece in (request := post(body, f"{HEADER}: {json_bytes}"))[:-30], request[-30:]:
            client.send(piece)
            await asyncio.sleep(0.01)
        assert (await client.reply())[0] == 200
        client.send(post())
        assert (await client.reply())[0] == 503
        full.refusal = None
        client.send(post())
        assert (await client.reply())[0] == 200
        full.refusal = Overloaded("too much is waiting", retry_after_s=1.2)
    async with connect_grpc(rpc_address) as stub:
        request = message(typed("INT32", [1], int_contents=[1]), parameters={"priority": {"int64_param": 1}})
        await stub.ModelInfer(request)
        (answer,) = [answer async for answer in stub.ModelStreamInfer(iter([request]))]
    assert not answer.error_message
    assert [request.admitted for request in full.requests] == [False, True, False, False]


async def test_a_body_is_thrown_away_in_any_pieces(rest_address: str, full: EchoPlane) -> None:
    data = post(b" " * 1000) * 3 + LIVE
    async with connect(rest_address) as client:
        for start in range(0, len(data), 77):
            client.send(data[start : start + 77])
            await asyncio.sleep(0)
        for status in (503, 503, 503, 200):
            assert (await client.reply())[0] == status
    assert len(full.asked) == 3


async def test_thousands_of_pipelined_requests_are_refused_in_order(rest_address: str, full: EchoPlane) -> None:
    async with connect(rest_address) as client:
        client.send(post() * 3000 + LIVE)
        for _ in range(3000):
            assert (await client.reply())[0] == 503
        assert (await client.reply())[0] == 200
    assert len(full.asked) == 3000


async def test_refusals_do_not_pile_up_for_a_client_that_does_not_read(rest_address: str, full: EchoPlane) -> None:
    full.refusal = Overloaded("x" * 500, retry_after_s=1.0)
    # more than the sockets' buffers hold
    count = 12_000
    async with connect(rest_address) as client:
        client.send(post(b"") * count)
        while (asked := len(full.asked)) < count:
            await asyncio.sleep(0.3)
            if len(full.asked) == asked > 0:
                break
        assert len(full.asked) < count
        for _ in range(count):
            assert (await client.reply())[0] == 503


async def test_grpc_answers_with_push_back_whatever_the_bytes(rpc_address: str, full: EchoPlane) -> None:
    name = service_pb2.ModelInferRequest(model_name="echo", model_version="2").SerializeToString()
    async with grpc.aio.insecure_channel(rpc_address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary(METHOD)(name + b"\xff" * 1000)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert caught.value.details() == "too much is waiting"
    assert ("grpc-retry-pushback-ms", "1200") in list(caught.value.trailing_metadata() or ())
    assert full.asked == [("echo", "2")]


async def test_grpc_says_what_is_no_request(rpc_address: str, plane: EchoPlane) -> None:
    async with grpc.aio.insecure_channel(rpc_address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary(METHOD)(b"\xff" * 10)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert plane.requests == []


@pytest.mark.parametrize(
    ("message", "found"),
    [
        (b"", ("", "")),
        (b"\x0a", ("", "")),
        (service_pb2.ModelInferRequest(model_name="a").SerializeToString(), ("a", "")),
        (service_pb2.ModelInferRequest(model_name="a", model_version="3", id="x").SerializeToString(), ("a", "3")),
        (service_pb2.ModelInferRequest(model_name="a", id="x").SerializeToString(), ("a", "")),
        (service_pb2.ModelInferRequest(model_name="n" * 127).SerializeToString(), ("n" * 127, "")),
        # not looked for: such a request is let in, and refused when it has been read if there is no such model
        (service_pb2.ModelInferRequest(model_name="n" * 128).SerializeToString(), ("", "")),
        (b"\x0a\x02\xff\xfe", ("\ufffd\ufffd", "")),
    ],
)
def test_the_model_is_found_without_reading_the_message(message: bytes, found: tuple[str, str]) -> None:
    assert model_of(message) == found
