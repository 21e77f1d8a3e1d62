"""What one client may take: elements, time, connections. Beyond it is refused or cut off, and others are answered."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import resource
from contextlib import AsyncExitStack, asynccontextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import grpc
import pytest

from cascadeserve.errors import RequestTooLarge
from orchestrator.wire.bodies import Bodies
from orchestrator.wire.codec_http import decode_request
from orchestrator.wire.limits import Limits, allow_connections
from orchestrator.wire.rest import RestServer
from orchestrator.wire.rpc import build_rpc_server
from orchestrator.wire.slow_clients import SlowClients
from tests.orchestrator.wire.bodies import INFER, head, tensor
from tests.orchestrator.wire.conftest import MAX_BYTES
from tests.orchestrator.wire.stock_clients import send, serve_http
from tests.orchestrator.wire.test_plain_http import BODY, LIVE, connect, post
from tests.orchestrator.wire.test_rpc import message, refused, typed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.orchestrator.wire.echo_plane import EchoPlane

TIMEOUT_S = 0.4
# requests of which something is missing, on both of the ways that connections take
UNFINISHED = {
    "nothing of a head": b"G",
    "half a head": LIVE[:-4],
    "half a body": post(BODY)[:-1],
    "half an odd head": b"PUT /v2 HTTP/1.1\r\nHost: a\r\n",
    "half an odd body": post(BODY, "X_y: goes to aiohttp")[:-1],
    "half a chunked body": f"POST {INFER} HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nab".encode(),
}


@asynccontextmanager
async def serving(plane: EchoPlane, **limits: Any) -> AsyncIterator[str]:
    async with serve_http(RestServer(plane, max_body_bytes=MAX_BYTES, limits=Limits(**limits))) as address:
        yield address


@pytest.mark.parametrize("beginning", UNFINISHED.values(), ids=UNFINISHED.keys())
async def test_a_request_that_does_not_arrive_is_not_waited_for(plane: EchoPlane, beginning: bytes) -> None:
    async with serving(plane, client_timeout_s=TIMEOUT_S) as address, connect(address) as client:
        client.send(beginning)
        async with asyncio.timeout(10 * TIMEOUT_S):
            # closed at once, or after an answer that says why
            with contextlib.suppress(ConnectionResetError):
                rest = await client.reader.read()
                assert rest == b"" or rest.split()[1] == b"408"
        assert (await send(address, "/v2/health/live", method="GET")).status == 200
    assert plane.requests == []


async def test_drop_by_drop_is_no_way_to_stay(plane: EchoPlane) -> None:
    async with serving(plane, client_timeout_s=TIMEOUT_S) as address, connect(address) as client:
        async with asyncio.timeout(20 * TIMEOUT_S):
            for byte in LIVE[:-1]:
                client.send(bytes([byte]))
                await asyncio.sleep(TIMEOUT_S / 5)
                if client.reader.at_eof() or client.reader.exception():
                    break
        assert client.reader.at_eof() or client.reader.exception()


async def test_an_answer_that_is_not_read_is_not_kept(plane: EchoPlane) -> None:
    values = [0] * 60_000
    async with serving(plane, client_timeout_s=TIMEOUT_S) as address, connect(address) as client:
        client.reader._transport.pause_reading()  # type: ignore[attr-defined]
        for _ in range(100):
            client.send(post(head(tensor(values))))
        async with asyncio.timeout(20 * TIMEOUT_S):
            while not client.writer.transport.is_closing():
                await asyncio.sleep(TIMEOUT_S / 10)
                with contextlib.suppress(ConnectionError):
                    client.send(b" ")
    assert len(plane.requests) < 100


async def test_slow_answers_of_ours_are_not_the_clients_fault(plane: EchoPlane) -> None:
    plane.delay_s = 4 * TIMEOUT_S
    async with serving(plane, client_timeout_s=TIMEOUT_S) as address:
        for extra in ((), ("X_y: goes to aiohttp",)):
            async with connect(address) as client:
                client.send(post(BODY, *extra))
                assert (await client.reply())[0] == 200


async def test_idle_connections_make_room(plane: EchoPlane) -> None:
    async with serving(plane, max_connections=20) as address, AsyncExitStack() as stack:
        used = await stack.enter_async_context(connect(address))
        used.send(LIVE)
        assert (await used.reply())[0] == 200
        idle = [await stack.enter_async_context(connect(address)) for _ in range(60)]
        # those that never asked for anything go first
        used.send(LIVE)
        assert (await used.reply())[0] == 200
        idle[-1].send(LIVE)
        assert (await idle[-1].reply())[0] == 200


@pytest.mark.parametrize(
    "beginning",
    [b"", b"G", b"H", post(BODY)[:-1], post(BODY, "X_y: goes to aiohttp")[:-1], UNFINISHED["half a chunked body"]],
    ids=["silent", "plain", "odd", "plain upload", "odd upload", "chunked upload"],
)
async def test_whatever_a_client_keeps_open_makes_room(plane: EchoPlane, beginning: bytes) -> None:
    async with serving(plane, max_connections=10) as address, AsyncExitStack() as stack:
        for _ in range(15):
            hostile = await stack.enter_async_context(connect(address))
            hostile.send(beginning)
        await asyncio.sleep(0.05)
        for _ in range(3):
            async with connect(address) as honest:
                honest.send(LIVE)
                assert (await honest.reply())[0] == 200


@pytest.mark.parametrize("extra", [(), ("X_y: goes to aiohttp",)], ids=["plain", "odd"])
@pytest.mark.parametrize("beginning", [b"", b"H"], ids=["silent", "odd"])
async def test_a_first_upload_stays_while_others_owe_nothing(
    plane: EchoPlane, extra: tuple[str, ...], beginning: bytes
) -> None:
    async with serving(plane, max_connections=10) as address, AsyncExitStack() as stack:
        upload = await stack.enter_async_context(connect(address))
        upload.send(post(BODY, *extra)[:-1])
        await asyncio.sleep(0.05)
        for _ in range(30):
            hostile = await stack.enter_async_context(connect(address))
            hostile.send(beginning)
            await asyncio.sleep(0.002)
        upload.send(BODY[-1:])
        assert (await upload.reply())[0] == 200


async def test_where_all_are_busy_one_more_is_told_so(plane: EchoPlane) -> None:
    plane.delay_s = 0.5
    async with serving(plane, max_connections=3) as address, AsyncExitStack() as stack:
        busy = [await stack.enter_async_context(connect(address)) for _ in range(3)]
        for client in busy:
            client.send(post(BODY))
        await plane.started.wait()
        await asyncio.sleep(0.1)
        one_more = await stack.enter_async_context(connect(address))
        status, headers, body = await one_more.reply()
        assert (status, headers["Connection"]) == (503, "close")
        assert b"too many connections" in body
        for client in busy:
            assert (await client.reply())[0] == 200


async def test_unfinished_requests_together_take_so_much(plane: EchoPlane) -> None:
    body = head(tensor([1])) + b" " * 100_000
    async with serving(plane, max_received_bytes=250_000) as address, AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(connect(address)) for _ in range(4)]
        for client in clients:
            client.send(post(body)[:-1])
        async with asyncio.timeout(10):
            while sum(client.reader.at_eof() or client.reader.exception() is not None for client in clients) < 2:  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        left = [client for client in clients if not client.reader.at_eof() and client.reader.exception() is None]
        for client in left:
            client.send(b" ")
            assert (await client.reply())[0] == 200


async def test_unfinished_odd_requests_together_take_so_much(plane: EchoPlane) -> None:
    body = head(tensor([1])) + b" " * 100_000
    async with serving(plane, max_received_bytes=250_000) as address, AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(connect(address)) for _ in range(4)]
        for client in clients:
            client.send(post(body, "X_y: goes to aiohttp")[:-1])
            await asyncio.sleep(0.05)
        for client in clients:
            client.send(b" ")
        # the limit of one body is larger than that of all: it counts then
        assert sorted([(await client.reply())[0] for client in clients]) == [200, 200, 503, 503]


async def test_of_odd_requests_the_largest_goes(plane: EchoPlane) -> None:
    async with serving(plane, max_received_bytes=MAX_BYTES) as address, AsyncExitStack() as stack:
        large, small = [await stack.enter_async_context(connect(address)) for _ in range(2)]
        large.send(post(b" " * MAX_BYTES, "X_y: goes to aiohttp")[:-1])
        await asyncio.sleep(0.05)
        small.send(post(BODY, "X_y: goes to aiohttp"))
        assert (await small.reply())[0] == 200
        status, headers, body = await large.reply()
        assert (status, headers["Retry-After"]) == (503, "1")
        assert b"too much is being received" in body


@pytest.mark.parametrize("line", [f"Content-Length: {MAX_BYTES}", "Transfer-Encoding: chunked"])
async def test_what_is_announced_takes_nothing(plane: EchoPlane, line: str) -> None:
    announced = f"POST {INFER} HTTP/1.1\r\nHost: a\r\nContent-Encoding: gzip\r\n{line}\r\n\r\n".encode()
    async with serving(plane, max_received_bytes=1000) as address, AsyncExitStack() as stack:
        for _ in range(5):
            (await stack.enter_async_context(connect(address))).send(announced)
        await asyncio.sleep(0.05)
        assert (await send(address, INFER, gzip.compress(BODY), headers={"Content-Encoding": "gzip"})).status == 200


async def test_what_cannot_be_parsed_is_not_logged(rest_address: str, caplog: pytest.LogCaptureFixture) -> None:
    for bad in (b"GET /v2 HTTP/9.9\r\n\r\n", b"GET /v2 HTTP/1.1\r\nbad\0: x\r\n\r\n", b"GET / " + b"a" * 10_000):
        async with connect(rest_address) as client:
            client.send(bad)
            assert (await client.reader.read()).split()[1] == b"400"
    assert caplog.records == []


async def test_listed_elements_over_http(plane: EchoPlane) -> None:
    async with serving(plane, max_listed_elements=100) as address:
        assert (await send(address, INFER, head(tensor([1] * 90)))).status == 200
        reply = await send(address, INFER, head(tensor([1] * 101)))
        assert (reply.status, "more than 100 values" in reply.error) == (413, True)
        text = b"\0\0\0\0" * 101
        part = head({"name": "x", "datatype": "BYTES", "shape": [101], "parameters": {"binary_data_size": len(text)}})
        reply = await send(address, INFER, part + text, headers={"Inference-Header-Content-Length": str(len(part))})
        assert (reply.status, "lists more than 100" in reply.error) == (413, True)


def test_json_that_is_mostly_white_space() -> None:
    body = head(tensor([1]))
    half = b'{"text":"' + b"a" * (1 << 21) + b'",' + b" \t\r\n" * (1 << 19) + body[1:]
    for taken in (body + b" " * ((1 << 20) - 100), half):
        assert decode_request(taken, None, model_name="m").inputs
    for blank in (body + b" " * (1 << 21), body + b"\t\r\n " * (1 << 19)):
        with pytest.raises(RequestTooLarge, match="mostly white space"):
            decode_request(blank, None, model_name="m")


@pytest.mark.parametrize("indent", [1, 4])
def test_printed_json_of_short_values_is_let_through(indent: int) -> None:
    values = {"name": "x", "datatype": "INT64", "shape": [1 << 9, 1 << 10], "data": [[0] * (1 << 10)] * (1 << 9)}
    body = json.dumps({"inputs": [values]}, indent=indent).encode()
    assert body.count(b" ") + body.count(b"\n") > max(1 << 20, len(body) // 2)
    assert decode_request(body, None, model_name="m").inputs


async def test_listed_elements_over_grpc(plane: EchoPlane) -> None:
    server = build_rpc_server(plane, max_message_bytes=MAX_BYTES, limits=Limits(max_listed_elements=100))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        for tensor_ in (
            message(typed("BOOL", [101], bool_contents=[True] * 101)),
            message({"name": "x", "datatype": "BYTES", "shape": [101]}, raw_input_contents=[b"\0\0\0\0" * 101]),
        ):
            code, sentence = await refused(f"127.0.0.1:{port}", tensor_)
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "lists more than 100 elements" in sentence
    finally:
        await server.stop(None)


@pytest.mark.parametrize("count", [200, 20_000])
async def test_a_flood_of_headers_is_refused(rest_address: str, count: int) -> None:
    flood = b"".join(b"X-%d: %s\r\n" % (i, b"a" * 60) for i in range(count))
    async with connect(rest_address) as client:
        client.send(LIVE[:-2] + flood + b"\r\n")
        with contextlib.suppress(ConnectionResetError):
            assert (await client.reader.read()).split()[1] == b"400"


def test_slow_clients_are_those_who_owe_the_same_thing_for_too_long() -> None:
    slow: SlowClients[str] = SlowClients(10.0)
    assert slow.overdue([("a", 1), ("b", 1)], 0.0) == []
    # b went on to its next request
    assert slow.overdue([("a", 1), ("b", 2)], 9.0) == []
    assert slow.overdue([("a", 1), ("b", 2)], 10.0) == ["a"]
    # a paid meanwhile
    assert slow.overdue([("b", 2)], 15.0) == []
    assert slow.overdue([("a", 1), ("b", 2)], 19.0) == ["b"]


def test_connections_fit_into_the_files_that_may_be_open() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        allowed = allow_connections(Limits(max_connections=100))
        assert allowed == 100
        assert allow_connections(Limits(max_connections=10**9)) < 10**9
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_a_body_that_is_late_and_the_largest_takes_no_other_with_it() -> None:
    bodies = Bodies(1000, Limits(max_received_bytes=1000), lambda _model, _version: None)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(0) as over:
            await asyncio.sleep(1)
    # its time is over, and its own turn has not come
    late: Any = SimpleNamespace(num_bytes=900, is_refused=False, timeout=over)
    bodies.arriving[cast("Any", 0)] = late
    bodies._held_bytes = 900
    parts = iter((bytes(300), b""))

    async def readany() -> bytes:
        return next(parts)

    content = SimpleNamespace(readany=readany)
    upload: Any = SimpleNamespace(protocol=object(), content_length=None, headers={}, content=content, match_info={})
    assert await bodies.read(upload) == (bytes(300), 0.0)
    assert late.is_refused
