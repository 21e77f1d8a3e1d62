"""What the orchestrator spends its time on over HTTP, by py-spy: `python -m benchmarks.time_shares`.

The servers and the load of benchmarks/gateway_cost.py, at 32 connections. A sample counts for the part that its
innermost frame of ours or of the event loop belongs to: the write of a socket holds what the kernel does to deliver it
on the same machine, and what is interrupted there is counted there, too. Samples of threads that wait are left out.
py-spy is `pip install py-spy`, wrk `apt-get install wrk`.
"""

from __future__ import annotations

import asyncio
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console
from rich.table import Table

from benchmarks.gateway_cost import Requests, Server, drawn_requests, other_cores, run_load, running_servers
from cascadeserve.artefacts import write_json
from cascadeserve.errors import CascadeServeError
from planner.host import describe_host

if TYPE_CHECKING:
    from collections.abc import Iterable

_STATE = Path(".cascadeserve/gateway_cost").resolve()
_CONNECTIONS = 32
_RATE_PER_S = 200
# Until all have been asked often enough for what is kept per form of request to be there.
_WARM_UP_S = 2.0

# by file and function; the first that holds
_PARTS = (
    ("socket writes", r"\b(write|writelines|sendall|send|_write_ready|_write_send) \(asyncio/selector_events"),
    ("socket reads", r"\b(_read_ready\S*|recv\S*) \(asyncio/selector_events"),
    ("batches to Triton and back", r"\(orchestrator/(triton|triton_http|backend)\.py|\(cascadeserve/http_connection"),
    ("JSON and tensors", r"\(orchestrator/wire/(codec_\w+|json_data|datatypes|tensors|turns|classification)\.py"),
    ("checks of the data plane", r"\(orchestrator/(dataplane|request_options|entry|wire/(limits|request_checks))\.py"),
    ("HTTP: heads, bodies, answers", r"\(orchestrator/wire/|\(aiohttp/|\(multidict/"),
    ("metrics", r"\(orchestrator/(metrics|statistics)\.py|\(prometheus_client/"),
    ("demand and gears", r"\(orchestrator/gear_loop\.py|\(cascadeserve/policy/(demand|gear_switch|shares)\.py"),
    ("health and layouts", r"\(orchestrator/(health|reconcile|reconciler|foreign_load|probe_rows|silent_models)\.py"),
    ("dispatcher: queues, slots, batches, deadlines, answers by certainty", r"\(orchestrator/|\(cascadeserve/"),
    ("event loop: tasks, callbacks, timers", r"\((asyncio/|selectors\.py|<frozen heapq|heapq)"),
)
_OTHER = "other"
# innermost frames of threads that wait
_WAITS = re.compile(r"select \(selectors|(Thread\.)?run \(threading")
_RULES = [(part, re.compile(rule)) for part, rule in _PARTS]
# the frames that are there in every sample
_BELOW_ALL = re.compile(
    r"BaseEventLoop\.(run_forever|run_until_complete|_run_once) |Handle\._run |(Runner\.)?run \(asyncio/"
)


def part_of(stack: str) -> str:
    """The part that a sample belongs to; `stack` is its frames in py-spy's raw format, outermost first."""
    frames = stack.split(";")
    for frame in reversed(frames):
        if not _BELOW_ALL.match(frame):
            for part, rule in _RULES:
                if rule.search(frame):
                    return part
    return _PARTS[-1][0] if any(_BELOW_ALL.match(frame) for frame in frames) else _OTHER


def shares(lines: Iterable[str]) -> dict[str, float]:
    """Share of the samples by part, largest first; the lines are those of py-spy's raw format."""
    counts: Counter[str] = Counter()
    for line in lines:
        stack, _, count = line.rpartition(" ")
        if not _WAITS.search(stack.rpartition(";")[2]):
            counts[part_of(stack)] += int(count)
    total = max(counts.total(), 1)
    return {part: count / total for part, count in counts.most_common()}


async def _sampled(server: Server, requests: Requests, seconds: int) -> dict[str, float]:
    spy = shutil.which("py-spy")
    if spy is None:
        raise CascadeServeError("this needs py-spy; pip install py-spy")
    cores = other_cores()
    await run_load("http", server, _CONNECTIONS, _WARM_UP_S, requests, cores)
    samples = _STATE / "samples.txt"
    load = asyncio.create_task(run_load("http", server, _CONNECTIONS, seconds + 2.0, requests, cores), name="load")
    await asyncio.sleep(1.0)
    process = await asyncio.create_subprocess_exec(
        spy, "record", "--pid", str(server.pid), "--rate", str(_RATE_PER_S), "--duration", str(seconds),
        "--format", "raw", "--output", str(samples), stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    _, err = await process.communicate()
    await load
    if process.returncode:
        raise CascadeServeError(f"py-spy ended with status {process.returncode}: {err.decode().strip()[-200:]}")
    return shares(samples.read_text().splitlines())


async def _measure(seconds: int) -> dict[str, Any]:
    requests, labels = drawn_requests()
    async with running_servers(requests, labels) as (servers, _):
        found = await _sampled(servers["http"]["orchestrator"], requests, seconds)
    return {"connections": _CONNECTIONS, "seconds": seconds, "host": describe_host(), "shares": found}


@click.command()
@click.option("--seconds", type=click.IntRange(min=1), default=20, show_default=True)
@click.option(
    "--result", type=click.Path(path_type=Path), default="benchmarks/results/local/time_shares.json", show_default=True
)
def main(seconds: int, result: Path) -> None:
    """Measure, write the result, print it."""
    measured = asyncio.run(_measure(seconds))
    write_json(result, measured)
    table = Table("part", "share")
    for part, share in measured["shares"].items():
        table.add_row(part, f"{share:.1%}")
    Console().print(table)


if __name__ == "__main__":
    main()
