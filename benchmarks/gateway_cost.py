"""CPU time of the orchestrator per request, against servers that do nothing: `python -m benchmarks.gateway_cost`.

One gear of the digits plan, a cascade of two models of which about 20 % of the rows see the second. wrk (HTTP) and
`grpc_load` (gRPC) keep 1, 8, 32 and 64 connections busy with single-row binary requests; in turn with the orchestrator
they do so with an aiohttp and a grpc.aio handler that read the same request and give an answer of the same bytes.
Quoted is the CPU time of the server process, all threads and both modes, per answered request, and its ratio to that
of the empty handler: medians over interleaved runs. Triton is pinned to core 0, everything else to the other cores.
wrk is `apt-get install wrk`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import click
import grpc.aio
import msgspec
import numpy as np
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console
from rich.table import Table
from tritonclient.grpc import service_pb2, service_pb2_grpc

from cascadeserve.artefacts import write_json
from cascadeserve.errors import CascadeServeError
from cascadeserve.local_stack import TRITON_CORE, LocalStack, cascadeserve_command, free_ports, wait_ready
from cascadeserve.process import spawn, stop
from examples.digits.data import rows

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

_STATE = Path(".cascadeserve/gateway_cost").resolve()
_HERE = Path(__file__).parent
_PATH = "/v2/models/digits/infer"
# gives about 20 % escalation; measured and reported
_THRESHOLD = 0.73
_NUM_ROWS = 1_000
_AT_A_TIME = 8
_TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")
_START_S = 30.0
_OK = 200
PROTOCOLS = ("http", "grpc")
SERVERS = ("orchestrator", "empty")


def _plan() -> dict[str, Any]:
    """The digits plan cut down to one gear for all rates: the small convolutional net, then the residual one."""
    plan = msgspec.json.decode(Path("examples/digits/gear_plan.json").read_bytes())
    family = plan["families"]["digits"]
    models = ("digits_cnn", "digits_resnet")
    gear = next(gear for gear in family["gears"] if gear["name"] == "calm-careful")
    stages = [{"model": models[0], "threshold": _THRESHOLD}, {"model": models[1]}]
    family |= {
        "models": {model: family["models"][model] for model in models},
        "ladder": [{"name": "careful", "stages": stages, "reach": [1.0, 0.2]}],
        "gears": [gear | {"name": "only", "layout": "one", "min_rate_per_s": 0.0, "max_rate_per_s": 10_000.0}],
    }
    plan["layouts"] = [{"name": "one", "instances": {"triton0": dict.fromkeys(models, 1)}}]
    return plan


@dataclass(frozen=True)
class Requests:
    """The same rows for both protocols, as files for the generators."""

    http: Path
    http_bytes: int
    http_json_bytes: int
    grpc: Path

    def headers(self) -> dict[str, str]:
        """Those of the HTTP requests."""
        return {
            "Content-Type": "application/octet-stream",
            "Inference-Header-Content-Length": str(self.http_json_bytes),
        }


def write_requests(state: Path, images: Any) -> Requests:  # noqa: ANN401 - an array
    """Write a request of each image, float32 [rows, height, width], under `state`."""
    shape = [1, *images.shape[1:]]
    size = images[0].nbytes
    head = msgspec.json.encode(
        {
            "inputs": [
                {"name": "image", "shape": shape, "datatype": "FP32", "parameters": {"binary_data_size": size}},
            ],
            "outputs": [{"name": "label", "parameters": {"binary_data": True}}],
        }
    )
    message = service_pb2.ModelInferRequest(
        model_name="digits",
        inputs=[service_pb2.ModelInferRequest.InferInputTensor(name="image", datatype="FP32", shape=shape)],
        outputs=[service_pb2.ModelInferRequest.InferRequestedOutputTensor(name="label")],
        raw_input_contents=[b""],
    )
    messages = []
    for image in images:
        message.raw_input_contents[0] = image.tobytes()
        messages.append(np.frombuffer(message.SerializeToString(), np.uint8))
    http, grpc_file = state / "bodies.bin", state / "messages.npy"
    http.write_bytes(b"".join(head + image.tobytes() for image in images))
    np.save(grpc_file, np.stack(messages))
    return Requests(http, len(head) + size, len(head), grpc_file)


@dataclass(frozen=True)
class Server:
    """One server process and where it listens."""

    pid: int
    ports: dict[str, int]

    def cpu_s(self) -> float:
        """CPU time of all its threads so far, those that have ended too."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) * _TICK_S


async def counts(port: int) -> tuple[float, float, dict[str, float]]:
    """Requests answered, requests refused or failed, rows by stage, as the orchestrator has counted them."""
    async with aiohttp.ClientSession() as session, session.get(f"http://127.0.0.1:{port}/metrics") as response:
        text = await response.text()
    outcomes: dict[str, float] = {}
    stages: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "cascadeserve_requests_total":
                outcomes[sample.labels["outcome"]] = sample.value
            elif sample.name == "cascadeserve_rows_answered_total":
                stages[sample.labels["stage"]] = sample.value
    # the generator hangs up in the middle of its last requests
    failed = sum(outcomes.values()) - outcomes.get("ok", 0.0) - outcomes.get("Cancelled", 0.0)
    return outcomes.get("ok", 0.0), failed, stages


async def run_load(
    protocol: str,
    server: Server,
    connections: int,
    seconds: float,
    requests: Requests,
    cores: Sequence[int],
    *,
    threads: int = 1,
) -> dict[str, float]:
    """Run the generator, wrk with so many threads; what it counted."""
    port = server.ports[protocol]
    if protocol == "http":
        wrk = shutil.which("wrk")
        if wrk is None:
            raise CascadeServeError("this needs wrk; apt-get install wrk")
        whole = max(1, round(seconds))
        command = [
            wrk, f"--threads={threads}", f"--connections={connections}", f"--duration={whole}s",
            f"--script={_HERE / 'wrk_infer.lua'}", f"http://127.0.0.1:{port}",
            "--", _PATH, str(requests.http), str(requests.http_bytes), str(requests.http_json_bytes),
        ]  # fmt: skip
    else:
        options = [f"--port={port}", f"--connections={connections}", f"--seconds={seconds}"]
        command = [sys.executable, "-m", "benchmarks.grpc_load", *options, f"--messages={requests.grpc}"]
    process = await asyncio.create_subprocess_exec(
        "/usr/bin/taskset", "--cpu-list", ",".join(map(str, cores)), *command, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    if process.returncode:
        raise CascadeServeError(f"the load generator ended with status {process.returncode}")
    return msgspec.json.decode(out.splitlines()[-1], type=dict[str, float])


async def _run(
    protocol: str, server: Server, connections: int, seconds: float, requests: Requests, cores: Sequence[int]
) -> dict[str, float]:
    """One run: the generator's counts, and CPU seconds of the server per answered request."""
    before_s = server.cpu_s()
    counted = await run_load(protocol, server, connections, seconds, requests, cores)
    return counted | {"cpu_s": (server.cpu_s() - before_s) / max(counted["answers"], 1.0)}


async def _answers(server: Server, requests: Requests, labels: Any) -> tuple[bytes, dict[str, str], bytes, float]:  # noqa: ANN401
    """Body and headers of an HTTP answer, a gRPC answer, and the share of right answers to all rows over HTTP."""
    bodies = requests.http.read_bytes()
    url = f"http://127.0.0.1:{server.ports['http']}{_PATH}"
    at_a_time = asyncio.Semaphore(_AT_A_TIME)
    async with aiohttp.ClientSession() as session:

        async def ask(row: int) -> tuple[bytes, dict[str, str]]:
            body = bodies[row * requests.http_bytes : (row + 1) * requests.http_bytes]
            async with at_a_time, session.post(url, data=body, headers=requests.headers()) as response:
                answer = await response.read()
                if response.status != _OK:
                    raise CascadeServeError(f"row {row} is answered with {response.status}: {answer[:200]!r}")
                return answer, {name: response.headers[name] for name in requests.headers()}

        given = await asyncio.gather(*map(ask, range(len(labels))))
    right = sum(
        int.from_bytes(answer[-8:], "little") == label for (answer, _), label in zip(given, labels, strict=True)
    )
    message = service_pb2.ModelInferRequest.FromString(np.load(requests.grpc)[0].tobytes())
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.ports['grpc']}") as channel:
        told = await service_pb2_grpc.GRPCInferenceServiceStub(channel).ModelInfer(message)
    return *given[0], told.SerializeToString(), float(right) / len(labels)


@contextlib.asynccontextmanager
async def running_servers(requests: Requests, labels: Any) -> AsyncIterator[tuple[dict[str, dict[str, Server]], float]]:  # noqa: ANN401
    """Triton, the orchestrator and the empty handlers, by protocol and name; and the share of right answers."""
    stack = LocalStack(_STATE, repository=Path("model_repository"), models=("digits_cnn", "digits_resnet"))
    plan = _STATE / "plan.json"
    write_json(plan, _plan())
    cores = other_cores()
    http, grpc_port, empty_http, empty_grpc = free_ports(4)
    serve = cascadeserve_command(
        "serve", f"--plan={plan}", f"--cluster={stack.cluster}", f"--http-port={http}", f"--grpc-port={grpc_port}"
    )
    processes: list[asyncio.subprocess.Process] = []

    async def start(command: list[str]) -> asyncio.subprocess.Process:
        processes.append(await spawn(command, cores=cores, log=log))
        return processes[-1]

    async with contextlib.AsyncExitStack() as exit_stack:
        log = exit_stack.enter_context((_STATE / "servers.log").open("wb"))
        await exit_stack.enter_async_context(stack.running())
        try:
            process = await start(serve)
            await wait_ready(f"http://127.0.0.1:{http}", process, timeout_s=_START_S, log=_STATE / "servers.log")
            orchestrator = Server(process.pid, {"http": http, "grpc": grpc_port})
            answer, headers, message, accuracy = await _answers(orchestrator, requests, labels)
            (_STATE / "http.bin").write_bytes(answer)
            (_STATE / "grpc.bin").write_bytes(message)
            empty = [sys.executable, "-m", "benchmarks.empty_server"]
            for_http = await start([*empty, "http", f"--port={empty_http}", f"--answer={_STATE / 'http.bin'}",
                                    f"--headers={json.dumps(headers)}"])  # fmt: skip
            for_grpc = await start([*empty, "grpc", f"--port={empty_grpc}", f"--answer={_STATE / 'grpc.bin'}"])
            for port in (empty_http, empty_grpc):
                await _wait_listening(port)
            yield (
                {
                    "http": {"orchestrator": orchestrator, "empty": Server(for_http.pid, {"http": empty_http})},
                    "grpc": {"orchestrator": orchestrator, "empty": Server(for_grpc.pid, {"grpc": empty_grpc})},
                },
                accuracy,
            )
        finally:
            for process in reversed(processes):
                await stop(process, kill_after_s=10.0)


async def _wait_listening(port: int) -> None:
    async with asyncio.timeout(_START_S):
        while True:
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection("127.0.0.1", port)
                writer.close()
                return
            await asyncio.sleep(0.1)


def other_cores() -> list[int]:
    """Those that are not Triton's."""
    return sorted(os.sched_getaffinity(0) - {TRITON_CORE}) or [TRITON_CORE]


def drawn_requests() -> tuple[Requests, Any]:
    """Requests of rows of the digits family, and the rows' labels, int64 [rows]."""
    _STATE.mkdir(parents=True, exist_ok=True)
    drawn = rows("replay", _NUM_ROWS)
    return write_requests(_STATE, drawn.inputs), drawn.labels


async def _measure(connections: Sequence[int], runs: int, seconds: float, protocols: Sequence[str]) -> dict[str, Any]:
    requests, labels = drawn_requests()
    cores = other_cores()
    measured: dict[str, Any] = {}
    async with running_servers(requests, labels) as (servers, accuracy):
        for protocol in protocols:
            measured[protocol] = {}
            for server in servers[protocol].values():
                await _run(protocol, server, max(connections), 1.0, requests, cores)
            for number in connections:
                before = await counts(servers["http"]["orchestrator"].ports["http"])
                pairs = [
                    {name: await _run(protocol, servers[protocol][name], number, seconds, requests, cores)
                     for name in SERVERS}
                    for _ in range(runs)
                ]  # fmt: skip
                after = await counts(servers["http"]["orchestrator"].ports["http"])
                measured[protocol][str(number)] = _summary(pairs, before, after)
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
        "runs": runs,
        "seconds": seconds,
        "right_answers": accuracy,
        "all_answered": all(at["failed"] == 0 for by in measured.values() for at in by.values()),
    } | measured


def _summary(
    pairs: list[dict[str, dict[str, float]]],
    before: tuple[float, float, dict[str, float]],
    after: tuple[float, float, dict[str, float]],
) -> dict[str, Any]:
    """Medians of interleaved runs, the ratio of them by pair, and what the orchestrator says that it did."""
    stages = {stage: rows - before[2].get(stage, 0.0) for stage, rows in after[2].items()}
    ratios = [pair["orchestrator"]["cpu_s"] / pair["empty"]["cpu_s"] for pair in pairs]
    generator_errors = sum(run["errors"] for pair in pairs for run in pair.values())
    # what the generator took for an answer and the orchestrator did not
    unexplained = max(0.0, sum(pair["orchestrator"]["answers"] for pair in pairs) - (after[0] - before[0]))
    return {
        "cpu_ratio": float(np.median(ratios)),
        "cpu_ratio_range": [min(ratios), max(ratios)],
        "escalated": 1.0 - stages.get("0", 0.0) / max(sum(stages.values()), 1.0),
        "failed": generator_errors + unexplained + after[1] - before[1],
    } | {
        name: {
            "cpu_s": float(np.median([pair[name]["cpu_s"] for pair in pairs])),
            "answers_per_s": float(np.median([pair[name]["answers"] / pair[name]["seconds"] for pair in pairs])),
            "p50_s": float(np.median([pair[name]["p50_s"] for pair in pairs])),
            "p99_s": float(np.median([pair[name]["p99_s"] for pair in pairs])),
        }
        for name in SERVERS
    }


def _table(measured: dict[str, Any], protocols: Sequence[str]) -> Table:
    table = Table("", "conns", "esc", "CPU us", "empty", "ratio", "range", "rows/s", "p50 ms", "failed")  # fmt: skip
    for protocol in protocols:
        for connections, at in measured[protocol].items():
            ours = at["orchestrator"]
            low, high = at["cpu_ratio_range"]
            table.add_row(
                protocol, connections, f"{at['escalated']:.1%}", f"{ours['cpu_s'] * 1e6:.0f}",
                f"{at['empty']['cpu_s'] * 1e6:.0f}", f"{at['cpu_ratio']:.2f}", f"{low:.2f}..{high:.2f}",
                f"{ours['answers_per_s']:.0f}", f"{ours['p50_s'] * 1e3:.2f}", f"{at['failed']:.0f}",
            )  # fmt: skip
    return table


@click.command()
@click.option("--runs", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--seconds", type=click.FloatRange(min=1.0), default=3.0, show_default=True, help="Of each run.")
@click.option("--connections", type=int, multiple=True, default=(1, 8, 32, 64), show_default=True)
@click.option("--protocol", "protocols", type=click.Choice(PROTOCOLS), multiple=True, default=PROTOCOLS)
@click.option(
    "--result", type=click.Path(path_type=Path), default="benchmarks/results/local/gateway_cost.json", show_default=True
)
def main(runs: int, seconds: float, connections: tuple[int, ...], protocols: tuple[str, ...], result: Path) -> None:
    """Measure, write the result, print it."""
    measured = asyncio.run(_measure(connections, runs, seconds, protocols))
    write_json(result, measured)
    Console().print(_table(measured, protocols))


if __name__ == "__main__":
    main()
