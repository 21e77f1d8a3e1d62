"""Batches over HTTP, against a server that does what a test tells it to."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest

from cascadeserve.gear_plan import TensorSpec
from orchestrator.backend import CallRejected, EndpointDown, ModelVersion
from orchestrator.triton_http import BatchSender

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from orchestrator.backend import BatchAnswer

SPECS = (TensorSpec(name="x", datatype="FP32", shape=(2,)),)
ROWS = np.array([[1, 2], [3, 4], [5, 6]], np.float32)
LABEL = np.array([7, 8, 9], np.int64)
CERTAINTY = np.array([0.25, 0.5, 0.75], np.float32)
SCORES = np.arange(6, dtype=np.float32).reshape(3, 2)


def response(status: int, body: bytes, *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status} Whatever", *headers, f"Content-Length: {len(body)}", "", ""]
    return "\r\n".join(lines).encode() + body


def answer(**outputs: np.ndarray[Any, Any]) -> bytes:
    declared = [
        {"name": name, "datatype": "?", "shape": array.shape, "parameters": {"binary_data_size": array.nbytes}}
        for name, array in outputs.items()
    ]
    text = msgspec.json.encode({"model_name": "m", "model_version": "1", "outputs": declared})
    body = text + b"".join(array.tobytes() for array in outputs.values())
    return response(200, body, f"Inference-Header-Content-Length: {len(text)}")


GOOD = answer(label=LABEL, certainty=CERTAINTY)


@dataclass
class Request:
    """One request as it arrived."""

    path: str
    document: dict[str, Any]
    tensors: bytes
    connection: asyncio.StreamWriter


@dataclass
class Server:
    """Reads requests and writes `answers` in turn, the last one again and again; None: nothing."""

    answers: list[bytes | None]
    closes: bool = False
    requests: list[Request] = field(default_factory=list)
    connections: list[asyncio.StreamWriter] = field(default_factory=list)
    ended: int = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections.append(writer)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().rstrip().split("\r\n")
                headers = dict(line.lower().split(": ") for line in lines)
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                length = int(headers.get("inference-header-content-length", 0))
                document = msgspec.json.decode(body[:length]) if length else {}
                self.requests.append(Request(first.split()[1], document, body[length:], writer))
                said = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
                if said is not None:
                    writer.write(said)
                if self.closes:
                    break
        self.ended += 1
        writer.close()


@contextlib.asynccontextmanager
async def serving(
    *answers: bytes | None, closes: bool = False, host: str = "127.0.0.1"
) -> AsyncIterator[tuple[BatchSender, Server]]:
    server = Server(list(answers), closes)
    listening = await asyncio.start_server(server.serve, host, 0, limit=1 << 20)
    port = listening.sockets[0].getsockname()[1]
    sender = BatchSender(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    try:
        yield sender, server
    finally:
        await sender.close()
        listening.close()
        for connection in server.connections:
            connection.close()
        await asyncio.sleep(0.01)


async def infer(sender: BatchSender, rows: Any = ROWS, *, want_scores: bool = False, **options: Any) -> BatchAnswer:
    specs = options.pop("specs", SPECS)
    options.setdefault("timeout_s", 5.0)
    inputs = rows if isinstance(rows, list) else [rows]
    return await sender.infer(
        ModelVersion(options.pop("model", "m"), 1), specs, inputs, want_scores=want_scores, **options
    )


async def test_a_batch_is_one_request_with_binary_tensors() -> None:
    async with serving(GOOD) as (sender, server):
        got = await infer(sender)
    assert got.label.tolist() == LABEL.tolist()
    assert got.certainty.tolist() == CERTAINTY.tolist()
    assert got.scores is None
    assert got.label.flags.aligned
    (request,) = server.requests
    assert request.path == "/v2/models/m/versions/1/infer"
    assert request.document == {
        "inputs": [{"name": "x", "datatype": "FP32", "shape": [3, 2], "parameters": {"binary_data_size": 24}}],
        "outputs": [
            {"name": "label", "parameters": {"binary_data": True}},
            {"name": "certainty", "parameters": {"binary_data": True}},
        ],
    }
    assert request.tensors == ROWS.tobytes()


async def test_outputs_may_come_in_any_order_and_beside_others() -> None:
    said = answer(other=np.ones(5, np.uint8), scores=SCORES, certainty=CERTAINTY, label=LABEL)
    async with serving(said) as (sender, server):
        got = await infer(sender, want_scores=True)
    assert got.label.tolist() == LABEL.tolist()
    assert got.scores is not None
    assert got.scores.tolist() == SCORES.tolist()
    assert [output["name"] for output in server.requests[0].document["outputs"]] == ["label", "certainty", "scores"]


@pytest.mark.parametrize(
    ("datatype", "array", "raw"),
    [
        ("BYTES", np.array([[b"ab"], [b""], [b"c"]], object), b"\2\0\0\0ab\0\0\0\0\1\0\0\0c"),
        ("BF16", np.array([[1], [2], [3]], np.uint16), b"\1\0\2\0\3\0"),
        ("BOOL", np.array([[True], [False], [True]]), b"\1\0\1"),
        ("FP16", np.zeros((3, 1), np.float16), bytes(6)),
        ("INT64", np.arange(6, dtype=np.int64).reshape(3, 2)[:, :1], np.array([0, 2, 4]).tobytes()),
        ("FP32", np.zeros((3, 0), np.float32), b""),
    ],
)
async def test_tensors_travel_as_raw_bytes(datatype: str, array: np.ndarray[Any, Any], raw: bytes) -> None:
    specs = (TensorSpec(name='100%d "x"', datatype=datatype, shape=array.shape[1:]), *SPECS)
    async with serving(GOOD) as (sender, server):
        for _ in range(2):
            await infer(sender, [array, ROWS], specs=specs, model="a %s/b")
    for request in server.requests:
        assert request.path == "/v2/models/a%20%25s%2Fb/versions/1/infer"
        assert request.document["inputs"][0] == {
            "name": '100%d "x"',
            "datatype": datatype,
            "shape": list(array.shape),
            "parameters": {"binary_data_size": len(raw)},
        }
        assert request.tensors == raw + ROWS.tobytes()


async def test_connections_are_kept_and_there_are_no_more_than_batches_under_way() -> None:
    async with serving(GOOD) as (sender, server):
        for _ in range(10):
            await asyncio.gather(infer(sender), infer(sender))
    assert len(server.requests) == 20
    assert len(server.connections) == 2


async def test_a_connection_closed_while_idle_fails_no_batch() -> None:
    async with serving(GOOD) as (sender, server):
        for _ in range(3):
            await infer(sender)
            server.connections[-1].close()
            await asyncio.sleep(0.02)
    assert len(server.connections) == 3
    assert len(server.requests) == 3


@pytest.mark.parametrize("said", [None, GOOD[:10], GOOD[:-1]])
async def test_an_answer_that_breaks_off_is_an_endpoint_down_and_the_batch_is_sent_once(said: bytes | None) -> None:
    async with serving(said, closes=True) as (sender, server):
        with pytest.raises(EndpointDown, match="inference of 'm:1' at 127"):
            await infer(sender)
    assert len(server.requests) == 1


@pytest.mark.parametrize("said", [None, GOOD[:-1]])
async def test_no_answer_in_time_is_an_endpoint_down_and_closes_the_connection(said: bytes | None) -> None:
    async with serving(said) as (sender, server):
        with pytest.raises(EndpointDown, match=r"no answer within 0\.05 s"):
            await infer(sender, timeout_s=0.05)
        await asyncio.sleep(0.02)
        assert server.ended == 1


async def test_a_cancelled_batch_closes_its_connection() -> None:
    async with serving(None, GOOD) as (sender, server):
        task = asyncio.create_task(infer(sender))
        while not server.requests:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.sleep(0.02)
        assert server.ended == 1
        await infer(sender)
    assert len(server.connections) == 2


@pytest.mark.parametrize(
    ("said", "kind", "text"),
    [
        (response(503, b'{"error":"Server is stopping"}'), EndpointDown, "503: Server is stopping"),
        (response(400, b'{"error":"unexpected shape"}'), CallRejected, "400: unexpected shape"),
        (response(404, b'{"error":"unknown model"}'), CallRejected, "404: unknown model"),
        (response(500, b'{"error":"it broke"}'), CallRejected, "500: it broke"),
        (response(413, b"\xff<html>"), CallRejected, "413: .<html>"),
        (b"SSH-2.0-x\r\n\r\n", CallRejected, "no HTTP response"),
    ],
)
async def test_refusals_carry_the_server_s_sentence(said: bytes, kind: type[Exception], text: str) -> None:
    async with serving(said) as (sender, _):
        with pytest.raises(kind, match=text):
            await infer(sender)


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (response(200, b"{}"), "Inference-Header-Content-Length is None"),
        (response(200, b"{}", "Inference-Header-Content-Length: 3"), "is b'3' and the body has 2 bytes"),
        (response(200, b"{}", "Inference-Header-Content-Length: 2"), "outputs"),
        (GOOD.replace(b'"label"', b'"la\xff\xff\xff"'), "utf-8"),
        (GOOD.replace(b'size":24', b'size":-2'), "binary_data_size"),
        (GOOD.replace(b'size":24', b'size":23'), "its outputs take"),
        (GOOD.replace(b'"label"', b'"lapel"'), "no output 'label'"),
        (answer(label=LABEL[:2], certainty=CERTAINTY), "2 labels and 3 certainties for 3 rows"),
        (answer(label=LABEL, certainty=CERTAINTY.astype(np.float64)), "6 certainties"),
        (answer(label=LABEL, certainty=CERTAINTY, scores=SCORES.ravel()[:5]), "cannot reshape"),
    ],
)
async def test_an_answer_of_no_use_is_a_rejected_call(said: bytes, text: str) -> None:
    async with serving(said) as (sender, _):
        with pytest.raises(CallRejected, match=text):
            await infer(sender, want_scores=b"scores" in said)


async def test_a_chunked_answer_is_read() -> None:
    head, _, body = GOOD.partition(b"\r\n\r\n")
    head = head.partition(b"\r\nContent-Length")[0] + b"\r\nTransfer-Encoding: chunked"
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:50], body[50:]))
    async with serving(head + b"\r\n\r\n" + chunks + b"0\r\n\r\n") as (sender, _):
        assert (await infer(sender)).label.tolist() == LABEL.tolist()


async def test_an_answer_that_ends_its_connection_is_that_connection_s_last() -> None:
    async with serving(GOOD.replace(b"\r\n", b"\r\nConnection: close\r\n", 1)) as (sender, server):
        await infer(sender)
        await infer(sender)
    assert len(server.connections) == 2


async def test_large_batches_and_answers() -> None:
    rows = np.ones((64, 1 << 18), np.float32)  # 64 MiB
    said = answer(label=np.arange(64), certainty=np.ones(64, np.float32), scores=np.ones((64, 1 << 16), np.float32))
    async with serving(said) as (sender, server):
        got = await infer(sender, rows, want_scores=True)
    assert got.scores is not None
    assert got.scores.shape == (64, 1 << 16)
    assert len(server.requests[0].tensors) == rows.nbytes


async def test_nobody_listens() -> None:
    sender = BatchSender("127.0.0.1:1")
    with pytest.raises(EndpointDown, match=r"cannot connect to 127\.0\.0\.1:1: .*refused|Connect call failed"):
        await infer(sender)
    with pytest.raises(EndpointDown):
        await sender.check(timeout_s=1)


def _has_ipv6() -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as probe:
        probe.bind(("::1", 0))
        return True
    return False


@pytest.mark.skipif(not _has_ipv6(), reason="this machine has no ::1")
async def test_ipv6() -> None:
    async with serving(GOOD, host="::1") as (sender, _):
        assert (await infer(sender)).label.tolist() == LABEL.tolist()


async def test_a_server_that_resets_new_connections_fails_the_check_and_serves_the_old_ones() -> None:
    async with serving(GOOD) as (sender, server):
        await infer(sender)
        await sender.check(timeout_s=1)
        assert len(server.connections) == 2  # a new one, whatever is there
        server.answers = [None]
        with pytest.raises(EndpointDown, match="no answer"):
            await sender.check(timeout_s=0.05)
        server.answers = [GOOD]
        await infer(sender)
        assert server.requests[-1].connection is server.connections[0]
        sender.retire()
        await infer(sender)
        assert server.requests[-1].connection is server.connections[-1]
