"""Mutated requests: `python -m benchmarks.fuzz_wire`.

Good requests are damaged at random (the same ones in every run) and given to the codec in this process, then sent over
sockets, HTTP and gRPC, to an orchestrator with a real Triton behind it. Whatever comes, there must be an answer or a
closed connection, no answer may be a 5xx but 501, 503 or 504, and neither process may grow.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import json
import random
import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import grpc
import grpc.aio
from google.protobuf.message import DecodeError
from rich.console import Console
from tritonclient.grpc import service_pb2

from cascadeserve.artefacts import write_json
from cascadeserve.errors import RequestError
from cascadeserve.local_stack import LocalStack
from orchestrator.wire.codec_grpc import decode_infer_request, encode_infer_response
from orchestrator.wire.codec_http import decode_raw_request, decode_request, encode_response, parse_header_length
from orchestrator.wire.status import status_of
from orchestrator.wire.tensors import InferResponse, ModelMetadata, TensorMetadata

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

_STATE = Path(".cascadeserve/fuzz_wire").resolve()
_MAY_BE = {501, 503, 504}
_GRPC_MAY_NOT_BE = {grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN}
# a process that has answered so many has all that it keeps
_WARM_UP_FRAC = 0.2
_AT_A_TIME = 100
# A damaged request may be the beginning of a longer one: so long its answer is waited for before the end is sent.
_ANSWER_S = 0.25
_HANG_S = 20.0
_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3}) ")
_SAMPLES = 5

_METADATA = ModelMetadata("m", ("1",), "", (TensorMetadata("x", "FP32", (-1, 2)),), ())
_TOKENS = (
    b"null", b"true", b"-1", b"0", b"1e999", b"NaN", b"-Infinity", b"9" * 30, b"18446744073709551616", b"[[[[", b"]",
    b"{", b"}", b'"', b",", b"\\ud800", b"\xff\xfe", b"\0", b"\r\n", b"\r\n\r\n", b":", b'"data":', b'"shape":[1,2]',
    b"BYTES", b"FP16", b"chunked", b"4294967296", b"a" * 300,
    # little that may be dear
    b"[" * 64 + b"]" * 64, b"9223372036854775807," * 300, b"{}," * 2000, b"NaN," * 2000, b'"\\ud800",', b" " * 5000,
)  # fmt: skip


def damaged(good: bytes, chance: random.Random) -> bytes:
    """Change a request in one to four places."""
    body = good
    for _ in range(chance.randint(1, 4)):
        start = chance.randint(0, len(body))
        end = min(len(body), start + chance.choice((0, 1, 1, 2, 4, 16)))
        kind = chance.randrange(5)
        if kind == 0:
            body = body[:start] + chance.randbytes(end - start) + body[end:]
        elif kind == 1:
            body = body[:start] + body[end:]
        elif kind == 2:  # noqa: PLR2004 - one of five ways
            body = body[:start] + chance.choice(_TOKENS) + body[end:]
        elif kind == 3:  # noqa: PLR2004
            body = body[:end] + body[start:end] * chance.randint(1, 3) + body[end:]
        else:
            body = body[:start] if chance.random() < 0.2 else body[:start] + body[end:] + body[start:end]  # noqa: PLR2004
    return body


def _http_seeds() -> list[tuple[bytes, int | None]]:
    """Bodies and the lengths of their JSON."""
    listed = [
        {"name": "a", "datatype": "FP32", "shape": [1, 2], "data": [1.5, -2]},
        {"name": "b", "datatype": "BYTES", "shape": [2], "data": ["x", "\u00fc"]},
        {"name": "c", "datatype": "INT8", "shape": [2, 1], "data": [[1], [2]]},
        {"name": "d", "datatype": "BOOL", "shape": [1], "data": [True]},
        {"name": "e", "datatype": "UINT64", "shape": [1], "data": [2**64 - 1]},
    ]
    sizes = {"FP32": 8, "BYTES": 11, "FP16": 2, "BOOL": 1}
    shapes = {"FP32": [1, 2], "BYTES": [2], "FP16": [1], "BOOL": [1]}
    raw = [
        {"name": kind, "datatype": kind, "shape": shapes[kind], "parameters": {"binary_data_size": size}}
        for kind, size in sizes.items()
    ]
    options = {
        "id": "1",
        "parameters": {"binary_data_output": True, "timeout": 5},
        "outputs": [{"name": "a", "parameters": {"binary_data": False}}],
    }
    text = json.dumps({"inputs": listed, **options}).encode()
    head = json.dumps({"inputs": raw, **options}).encode()
    buffers = b"abcdefgh" + b"\x02\0\0\0hi\x01\0\0\0j" + b"\0\x3c" + b"\x01"
    return [(text, None), (head + buffers, len(head)), (b"abcdefgh", 0)]


def _grpc_seeds() -> list[bytes]:
    tensors = [
        {"name": "a", "datatype": "FP32", "shape": [1, 2], "contents": {"fp32_contents": [1, 2]}},
        {"name": "b", "datatype": "BYTES", "shape": [1], "contents": {"bytes_contents": [b"x"]}},
        {"name": "c", "datatype": "UINT8", "shape": [1], "contents": {"uint_contents": [3]}},
    ]
    named: dict[str, Any] = {"model_name": "digits", "id": "1", "outputs": [{"name": "label"}]}
    named["parameters"] = {"timeout": {"int64_param": 5_000_000}, "text": {"string_param": "a"}}
    raw = {"name": "image", "datatype": "FP32", "shape": [1, 1, 32, 32]}
    messages = (
        service_pb2.ModelInferRequest(inputs=tensors, **named),
        service_pb2.ModelInferRequest(inputs=[raw], raw_input_contents=[bytes(4096)], **named),
        service_pb2.ModelInferRequest(inputs=[raw | {"shape": [1, 1, 1, 1]}], raw_input_contents=[b"abcd"], **named),
    )
    return [message.SerializeToString() for message in messages]


def _decode_http(body: bytes, header_length: int | None) -> None:
    length = parse_header_length(None if header_length is None else str(header_length), len(body))
    request = decode_raw_request(body, _METADATA) if length == 0 else decode_request(body, length, model_name="m")
    encode_response(request, InferResponse("m", "1", request.inputs))


def _decode_grpc(body: bytes) -> None:
    request = decode_infer_request(service_pb2.ModelInferRequest.FromString(body), None)
    encode_infer_response(request, InferResponse("m", "1", request.inputs))


def fuzz_codec(count: int) -> dict[str, Any]:
    """Give the codec `count` damaged bodies and messages."""
    chance = random.Random(8)  # noqa: S311 - to be repeated
    seeds: list[tuple[Callable[..., None], bytes, Any]] = [
        (_decode_http, body, length) for body, length in _http_seeds()
    ]
    seeds += [(_decode_grpc, body, None) for body in _grpc_seeds()]
    outcomes: Counter[str] = Counter()
    failures: list[str] = []
    warm_bytes = 0
    for number in range(count):
        if number == int(count * _WARM_UP_FRAC):
            warm_bytes = _memory_bytes()
        decode, good, length = seeds[number % len(seeds)]
        body = damaged(good, chance)
        rest = () if decode is _decode_grpc else (chance.choice((length, length, None, len(body), 0)),)
        try:
            decode(body, *rest)
            outcomes["read"] += 1
        except (RequestError, DecodeError) as error:
            status = 400 if isinstance(error, DecodeError) else status_of(error).http
            outcomes[str(status)] += 1
            if _is_wrong(status):
                failures.append(f"{status} {error}: {body!r} {rest}")
        except Exception as error:  # noqa: BLE001 - what this looks for
            failures.append(f"{error!r}: {body!r} {rest}")
    return {
        "inputs": count,
        "outcomes": dict(outcomes),
        "num_failures": len(failures),
        "failures": failures[:_SAMPLES],
        "grown_bytes": _memory_bytes() - warm_bytes,
    }


def _is_wrong(status: int) -> bool:
    return status >= 500 and status not in _MAY_BE  # noqa: PLR2004


def _memory_bytes(pid: int | str = "self") -> int:
    """Memory of a process that is not in files."""
    text = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    found = re.search(r"RssAnon:\s+(\d+) kB", text)
    return 0 if found is None else int(found[1]) * 1024


def _requests() -> list[bytes]:
    """Whole HTTP requests."""
    image = {"name": "image", "datatype": "FP32", "shape": [1, 1, 32, 32]}
    text = json.dumps({"inputs": [image | {"data": [0.5] * 1024}], "outputs": [{"name": "label"}]}).encode()
    head = json.dumps({"inputs": [image | {"parameters": {"binary_data_size": 4096}}], "id": "7"}).encode()

    def post(body: bytes, *lines: str, path: str = "/v2/models/digits/infer") -> bytes:
        return "\r\n".join([f"POST {path} HTTP/1.1", "Host: a", *lines, "", ""]).encode() + body

    def sized(body: bytes, *lines: str, path: str = "/v2/models/digits/infer") -> bytes:
        return post(body, f"Content-Length: {len(body)}", *lines, path=path)

    chunks = b"%x\r\n%s\r\n0\r\n\r\n" % (len(text), text)
    return [
        sized(text),
        sized(head + bytes(4096), f"Inference-Header-Content-Length: {len(head)}"),
        sized(gzip.compress(text), "Content-Encoding: gzip", "Accept-Encoding: gzip, deflate;q=0.5"),
        post(chunks, "Transfer-Encoding: chunked"),
        sized(b'{"ready":true}', path="/v2/repository/index"),
        b"GET /v2/models/digits/stats HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /v2/models/digits/versions/1/config HTTP/1.1\r\nHost: a\r\nConnection: keep-alive\r\n\r\n",
    ]


async def _send_http(address: tuple[str, int], request: bytes) -> str:
    """Send one request, then the end; returns the worst status, or how it ended without one."""
    reader, writer = await asyncio.open_connection(*address)
    got = b""
    try:
        writer.write(request)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_ANSWER_S):
                got = await reader.read(1 << 16)
        if got or not reader.at_eof():
            writer.write_eof()
        async with asyncio.timeout(_HANG_S):
            while piece := await reader.read(1 << 16):
                got += piece
    except TimeoutError:
        return "hang"
    except OSError:
        pass  # closed on us: that is allowed
    finally:
        writer.close()
    statuses = [int(found) for found in _STATUS.findall(got)]
    return str(max(statuses)) if statuses else "closed"


async def _send_grpc(call: Any, message: bytes) -> str:  # noqa: ANN401 - untyped
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    try:
        await call(message, timeout=_HANG_S)
    except grpc.aio.AioRpcError as error:
        # the server's deadlines are shorter
        return str(error.code().name) if loop.time() - began_s < _HANG_S else "hang"
    return "OK"


async def _all(send: Callable[[bytes], Awaitable[str]], bodies: list[bytes]) -> tuple[Counter[str], dict[str, bytes]]:
    """Send all, so many at a time; returns the outcomes and an example of each."""
    outcomes: Counter[str] = Counter()
    examples: dict[str, bytes] = {}
    waiting = iter(bodies)

    async def work() -> None:
        for body in waiting:
            outcome = await send(body)
            outcomes[outcome] += 1
            examples.setdefault(outcome, body)

    await asyncio.gather(*(work() for _ in range(_AT_A_TIME)))
    return outcomes, examples


def _orchestrator_pid(port: int) -> int:
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"--http-port={port}".encode() in (entry / "cmdline").read_bytes().split(b"\0") and b"serve" in (
                entry / "cmdline"
            ).read_bytes().split(b"\0"):
                return int(entry.name)
    raise RuntimeError("the orchestrator is not among the processes")


async def fuzz_sockets(count: int) -> dict[str, Any]:
    """Send `count` damaged requests, four fifths over HTTP and the others over gRPC."""
    chance = random.Random(9)  # noqa: S311
    requests, messages = _requests(), _grpc_seeds()
    stack = LocalStack(_STATE, plan=Path("examples/digits/gear_plan.json"), repository=Path("model_repository"))
    host, _, port = stack.url.removeprefix("http://").partition(":")
    failures: list[str] = []
    outcomes: dict[str, dict[str, int]] = {"http": {}, "grpc": {}}
    warm_bytes = 0
    async with stack.running(), grpc.aio.insecure_channel(stack.grpc_address) as channel:
        pid = _orchestrator_pid(int(port))
        call = channel.unary_unary("/inference.GRPCInferenceService/ModelInfer")
        for share in (_WARM_UP_FRAC, 1 - _WARM_UP_FRAC):
            number = round(count * share)
            http = [damaged(chance.choice(requests), chance) for _ in range(number * 4 // 5)]
            rpc = [damaged(chance.choice(messages), chance) for _ in range(number - len(http))]
            for kind, send, bodies in (
                ("http", lambda body: _send_http((host, int(port)), body), http),
                ("grpc", lambda body: _send_grpc(call, body), rpc),
            ):
                seen, examples = await _all(send, bodies)
                outcomes[kind] = dict(Counter(outcomes[kind]) + seen)
                bad = [
                    each
                    for each in seen
                    if each == "hang"
                    or (each.isdigit() and _is_wrong(int(each)))
                    or each in {code.name for code in _GRPC_MAY_NOT_BE}
                ]
                failures += [f"{kind} {each} x {seen[each]}: {examples[each]!r}" for each in bad]
            await asyncio.sleep(1.0)
            if share == _WARM_UP_FRAC:
                warm_bytes = _memory_bytes(pid)
        alive = await _send_http((host, int(port)), _requests()[0]) == "200"
        grown = _memory_bytes(pid) - warm_bytes
    return {
        "inputs": count,
        "outcomes": outcomes,
        "num_failures": len(failures) + (not alive),
        "failures": failures[:_SAMPLES],
        "alive": alive,
        "grown_bytes": grown,
    }


@click.command()
@click.option("--codec", "num_codec", type=click.IntRange(min=1), default=1_000_000, show_default=True)
@click.option("--sockets", "num_sockets", type=click.IntRange(min=1), default=50_000, show_default=True)
@click.option(
    "--result", type=click.Path(path_type=Path), default="benchmarks/results/local/fuzz_wire.json", show_default=True
)
def main(num_codec: int, num_sockets: int, result: Path) -> None:
    """Do both, write the result, print it."""
    measured = {"codec": fuzz_codec(num_codec), "sockets": asyncio.run(fuzz_sockets(num_sockets))}
    write_json(result, measured)
    Console().print(measured)


if __name__ == "__main__":
    main()
