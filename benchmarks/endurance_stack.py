"""Two Tritons, an orchestrator and a load, each a process that can be killed: what `benchmarks.endurance` acts on."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import click
import msgspec
import numpy as np

from cascadeserve.artefacts import read_json, write_json
from cascadeserve.cluster import read_cluster
from cascadeserve.local_stack import cascadeserve_command, free_ports, wait_ready
from cascadeserve.local_triton.server import LocalTriton
from cascadeserve.local_triton.working_copy import prepare_working_copy
from cascadeserve.process import spawn, stop
from cascadeserve.replay.client import Outcome
from cascadeserve.report import ServingReport
from examples.digits.data import rows

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

FAMILY = "digits"
ENDPOINTS = ("a", "b")
REPOSITORY = Path("model_repository")
_READY_TIMEOUT_S = 60.0
_STUB = b"triton_python_backend_stub"


def two_layouts_plan() -> dict[str, Any]:
    """The committed plan of examples/two_layouts, as plain data."""
    plan: dict[str, Any] = msgspec.json.decode(Path("examples/two_layouts/gear_plan.json").read_bytes())
    return plan


def standing_plan(name: str, instances: dict[str, dict[str, int]]) -> dict[str, Any]:
    """One layout of the same models in the gears of layout-2, which never escalates beyond the second of them."""
    plan = two_layouts_plan()
    gears = [gear for gear in plan["families"][FAMILY]["gears"] if gear["layout"] == "layout-2"]
    plan["families"][FAMILY]["gears"] = [gear | {"layout": "only"} for gear in gears]
    for gear in plan["families"][FAMILY]["gears"]:
        gear.pop("load", None)
    return plan | {"name": name, "layouts": [{"name": "only", "instances": instances}], "transitions": []}


def shifting_plan() -> dict[str, Any]:
    """Two layouts of these models; 60 rows/s call for the second, which is four steps away, none for the first."""
    layouts = [{name: {"digits_mlp": count, "digits_cnn": count} for name in ENDPOINTS} for count in (1, 2)]
    plan = standing_plan("shifting", layouts[0])
    family = plan["families"][FAMILY]
    last = family["gears"][-1]
    family["gears"] = [
        last | {"name": "low", "layout": "one", "min_rate_per_s": 0.0, "max_rate_per_s": 20.0, "degraded": False},
        last | {"name": "over", "layout": "one", "min_rate_per_s": 20.0, "max_rate_per_s": None, "degraded": True},
        last | {"name": "high", "layout": "two", "min_rate_per_s": 0.0, "max_rate_per_s": 1000.0, "degraded": False},
    ]
    plan["layouts"] = [{"name": name, "instances": each} for name, each in zip(("one", "two"), layouts, strict=True)]
    steps = [(endpoint, model) for endpoint in ENDPOINTS for model in ("digits_mlp", "digits_cnn")]
    plan["transitions"] = [
        {
            "from_layout": one,
            "to_layout": other,
            "gears": {FAMILY: gear},
            "steps": [{"endpoint": a, "model": model, "present": present, "wanted": 3 - present} for a, model in steps],
            "duration_s": 4.0,
        }
        for one, other, gear, present in (("one", "two", "over", 1), ("two", "one", "high", 2))
    ]
    plan["switching"] = {"gear_dwell_s": 0.5, "layout_up_after_s": 0.3, "layout_down_after_s": 1.0}
    return plan


class EnduranceStack:
    """A cluster of two endpoints on this machine, one core each if there are two."""

    def __init__(self, state: Path, plan: dict[str, Any]) -> None:
        """Writes plan, rows and cluster under `state`; nothing is started yet."""
        state.mkdir(parents=True, exist_ok=True)
        self.state = state
        self.plan = state / "plan.json"
        write_json(self.plan, plan)
        self.rows = state / "rows.npz"
        drawn = rows("replay", 4_000)
        np.savez(self.rows, **{"input:image": drawn.inputs, "label": drawn.labels})
        ports = free_ports(3 * len(ENDPOINTS) + 2)
        self.http_port, self.grpc_port = ports[-2:]
        self.url = f"http://127.0.0.1:{self.http_port}"
        cores = sorted(os.sched_getaffinity(0))
        lines = ["schema_version = 1"]
        for index, name in enumerate(ENDPOINTS):
            http, grpc, metrics = ports[3 * index : 3 * index + 3]
            lines += [
                "[[endpoints]]",
                f'name = "{name}"',
                f'http = "127.0.0.1:{http}"\ngrpc = "127.0.0.1:{grpc}"\nmetrics = "127.0.0.1:{metrics}"',
                f'device = {{ kind = "cpu", cores = [{cores[index % len(cores)]}] }}',
            ]
        self.cluster_path = state / "cluster.toml"
        self.cluster_path.write_text("\n".join(lines) + "\n")
        self.log = state / "orchestrator.log"
        self.log.unlink(missing_ok=True)
        self.repository = prepare_working_copy(REPOSITORY, read_cluster(self.cluster_path), state)
        self._server_log = (state / "tritons.log").open("wb")
        layout = plan["layouts"][0]["instances"]
        self.tritons = {
            endpoint.name: LocalTriton(
                endpoint,
                repository=self.repository,
                models=sorted(layout[endpoint.name]),
                state=state,
                log=self._server_log,
            )
            for endpoint in read_cluster(self.cluster_path).endpoints
        }
        self.orchestrator: asyncio.subprocess.Process | None = None

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Start everything, and stop it in the end."""
        try:
            await asyncio.gather(*(triton.start() for triton in self.tritons.values()))
            await self.start_orchestrator()
            yield
        finally:
            if self.orchestrator is not None:
                await stop(self.orchestrator, kill_after_s=30.0)
            for triton in self.tritons.values():
                with contextlib.suppress(ProcessLookupError, RuntimeError):
                    os.kill(triton.pid, signal.SIGCONT)
            await asyncio.gather(*(triton.stop() for triton in self.tritons.values()))
            self._server_log.close()

    async def start_orchestrator(self) -> float:
        """Start it and wait until it is ready; returns how long that took, in seconds."""
        command = cascadeserve_command(
            "serve",
            f"--plan={self.plan}",
            f"--cluster={self.cluster_path}",
            f"--repository={self.repository}",
            f"--http-port={self.http_port}",
            f"--grpc-port={self.grpc_port}",
        )
        began_s = asyncio.get_running_loop().time()
        with self.log.open("ab") as log:
            self.orchestrator = await spawn(command, log=log)
        await wait_ready(self.url, self.orchestrator, timeout_s=_READY_TIMEOUT_S, log=self.log)
        return asyncio.get_running_loop().time() - began_s

    def signal_orchestrator(self, number: signal.Signals) -> None:
        """Send a signal."""
        assert self.orchestrator is not None
        self.orchestrator.send_signal(number)

    @contextlib.asynccontextmanager
    async def under_load(self, name: str, *options: str, duration_s: float = 3600.0) -> AsyncIterator[Load]:
        """Load that lasts as long as the body, at most `duration_s`."""
        load = Load(self.state / f"{name}.json", self.state / f"{name}.npz")
        load.report_path.unlink(missing_ok=True)
        command = cascadeserve_command(
            "replay", f"--url={self.url}", f"--model={FAMILY}", f"--rows={self.rows}", f"--records={load.records_path}",
            f"--report={load.report_path}", *options,
        )  # fmt: skip
        if not any(option.startswith("--steps") for option in options):
            command.append(f"--duration={duration_s}")
        with (self.state / "replay.log").open("ab") as log:
            process = await spawn(command, log=log)
            load.process = process
            try:
                yield load
                if process.returncode is None:
                    process.send_signal(signal.SIGINT)
                await asyncio.wait_for(process.wait(), 60.0)
            finally:
                await stop(process, kill_after_s=5.0)

    async def metrics(self) -> str:
        """What the orchestrator shows; empty if it does not answer."""
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=2.0)) as session:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with session.get(f"{self.url}/metrics") as response:
                    return await response.text()
        return ""

    async def changes(self, outcome: str = "ok") -> int:
        """Instance-group changes so far."""
        return int(sum(_values(await self.metrics(), rf'cascadeserve_instance_changes_total{{.*outcome="{outcome}"}}')))

    async def is_up(self, endpoint: str) -> bool:
        """Whether the orchestrator sends to an endpoint."""
        return _values(await self.metrics(), rf'cascadeserve_endpoint_up{{endpoint="{endpoint}"}}') == [1.0]

    async def instances(self) -> dict[str, dict[str, int]]:
        """Instances that stand, by endpoint and model, as the orchestrator read them."""
        found: dict[str, dict[str, int]] = {name: {} for name in ENDPOINTS}
        pattern = r'^cascadeserve_instances\{endpoint="(\w+)",model="(\w+)",version="\d+"\} ([\d.]+)$'
        for endpoint, model, count in re.findall(pattern, await self.metrics(), re.MULTILINE):
            if float(count):
                found[endpoint][model] = int(float(count))
        return found

    def stubs(self, endpoint: str, model: str = "") -> list[int]:
        """Process ids of the Python processes of a server's models, or of one of them."""
        group = self.tritons[endpoint].pid
        found = []
        for entry in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                command = (entry / "cmdline").read_bytes()
                if _STUB in command and model.encode() in command and os.getpgid(int(entry.name)) == group:
                    found.append(int(entry.name))
        return sorted(found)


# what a request is told that found nobody to connect to: of it nothing was sent
_NOT_CONNECTED = "connection refused"


class Load:
    """A load, and what became of it once it has ended."""

    def __init__(self, report: Path, records: Path) -> None:
        self.report_path, self.records_path = report, records
        self.process: asyncio.subprocess.Process | None = None

    async def ended(self) -> None:
        """Wait until all of it is sent and answered."""
        assert self.process is not None
        await self.process.wait()

    def figures(self, *, timeout_s: float) -> dict[str, Any]:
        """Ledger, latencies, and by how many seconds the latest refusal missed its deadline (negative: none did)."""
        report = read_json(self.report_path, ServingReport)
        with np.load(self.records_path) as records:
            took_s = records["done_s"] - records["sent_s"]
            refused_s = took_s[records["outcome"] == Outcome.REFUSED]
        return {
            "ledger": msgspec.to_builtins(report.ledger),
            "p50_s": report.p50_s,
            "p99_s": report.p99_s,
            "latest_refusal_s": float(refused_s.max() - timeout_s) if len(refused_s) else -timeout_s,
            "generator_lag_p99_s": report.generator_lag_p99_s,
            "stolen_frac": report.stolen_frac,
            "errors": report.errors,
        }

    def unanswered(self, stopped_s: float) -> dict[str, dict[str, int]]:
        """Requests without an answer, by what they were told, in three kinds.

        `sent_before`: sent before `stopped_s` of the machine's monotonic clock, when the orchestrator was told to stop.
        `sent_after`: sent after that. `not_sent`: nobody took the connection.
        """
        kinds: dict[str, dict[str, int]] = {"sent_before": {}, "sent_after": {}, "not_sent": {}}
        with np.load(self.records_path) as records:
            texts = [str(text) for text in records["error_texts"]]
            before = records["start_s"] + records["sent_s"] < stopped_s
            missed = np.flatnonzero((records["outcome"] != Outcome.ANSWERED) & (records["outcome"] != Outcome.UNSENT))
            for index in missed:
                text = texts[records["error"][index]]
                sent = "sent_before" if before[index] else "sent_after"
                told = kinds["not_sent" if text == _NOT_CONNECTED else sent]
                told[text] = told.get(text, 0) + 1
        return kinds


async def until(what: Callable[[], Any], *, within_s: float, saying: str) -> float:
    """Wait for an awaitable condition; returns how long that took, in seconds."""
    loop = asyncio.get_running_loop()
    began_s = loop.time()
    while not await what():
        if loop.time() - began_s > within_s:
            raise click.ClickException(f"{saying} did not come within {within_s:g} s")
        await asyncio.sleep(0.05)
    return loop.time() - began_s


def _values(text: str, pattern: str) -> list[float]:
    return [float(value) for value in re.findall(rf"^{pattern} ([\d.e+-]+)$", text, re.MULTILINE)]
