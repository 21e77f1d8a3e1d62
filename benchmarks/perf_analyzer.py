"""NVIDIA's perf_analyzer against the orchestrator: `python -m benchmarks.perf_analyzer`.

Its binary is part of one old wheel of tritonclient, which is fetched once from the package index and kept beside the
results; nothing of it is installed. Two libraries that it wants come from the nvidia-pytriton wheel. It asks for
metadata, configuration and statistics, sends random images at a fixed concurrency, and prints what it saw and what the
server's statistics say of the same time.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.util
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import aiohttp
import click
import msgspec
from rich.console import Console

from cascadeserve.artefacts import write_json
from cascadeserve.errors import CascadeServeError
from cascadeserve.local_stack import LocalStack

_VERSION = "2.51.0"
_WHEEL = f"tritonclient-{_VERSION}-py3-none-manylinux1_x86_64.whl"
_SHA256 = "c485bb0123bdf310f90bc8b03d3489b28df2ffed55b30c7eee0b795b48113d52"
_MEMBER = f"tritonclient-{_VERSION}.data/data/bin/perf_analyzer"
_CACHE = Path(".cascadeserve/perf_analyzer").resolve()
_STATE = Path(".cascadeserve/perf_analyzer_stack").resolve()
_MODEL = "digits"
_CONCURRENCIES = (1, 2, 4, 8, 16, 32, 64)
_WINDOW_MS = 1000
# It stops by itself when three windows agree; on a busy machine it may stop without.
_MAX_WINDOWS = 3
_ANY_SPREAD = 999
# A request may wait as long as it likes, on a slow machine too: this is no test of speed.
_SLO_S = 10.0

# what it prints of each concurrency: the client's count and mean, then the server's
_REPORT = {
    "requests": r"Request count: (\d+)",
    "client_us": r"Client:.*?Avg latency: (\d+) usec",
    "rows": r"Inference count: (\d+)",
    "batches": r"Execution count: (\d+)",
    "answered": r"Successful request count: (\d+)",
    "server_us": r"Avg request latency: (\d+) usec",
    "queue_us": r"Avg request latency:.*? queue (\d+) usec",
    "compute_us": r"Avg request latency:.*? compute infer (\d+) usec",
}


def fetch() -> Path:
    """Fetch the binary unless it is there, and return its path."""
    binary = _CACHE / "perf_analyzer"
    if binary.exists():
        return binary
    _CACHE.mkdir(parents=True, exist_ok=True)
    options = ["--no-deps", "--only-binary=:all:", "--platform=manylinux1_x86_64", f"--dest={_CACHE}", "--quiet"]
    subprocess.run([sys.executable, "-m", "pip", "download", *options, f"tritonclient=={_VERSION}"], check=True)
    wheel = _CACHE / _WHEEL
    if hashlib.sha256(wheel.read_bytes()).hexdigest() != _SHA256:
        raise CascadeServeError(f"{wheel} is not the file that was expected; remove it and try again")
    found = importlib.util.find_spec("pytriton")
    if found is None or found.origin is None:
        raise CascadeServeError("perf_analyzer needs libraries of nvidia-pytriton; install the extra [local]")
    libraries = Path(found.origin).parents[1] / "nvidia_pytriton.libs"
    for name, pattern in (("libb64.so.0d", "libb64-*.so.0d"), ("libcudart.so.12", "libcudart-*.so.12*")):
        link = _CACHE / name
        link.unlink(missing_ok=True)
        link.symlink_to(next(libraries.glob(pattern)))
    unpacked = _CACHE / "unpacked"
    with zipfile.ZipFile(wheel) as archive:
        unpacked.write_bytes(archive.read(_MEMBER))
    unpacked.chmod(0o755)
    unpacked.rename(binary)
    return binary


async def _run(binary: Path, transport: str, address: str, concurrency: int) -> dict[str, Any]:
    """Run it at one concurrency; `problems` says what is not as it should be."""
    command = [
        str(binary), "-m", _MODEL, "-u", address, "-i", transport, "--async",
        f"--concurrency-range={concurrency}", "-p", str(_WINDOW_MS), "-r", str(_MAX_WINDOWS), "-s", str(_ANY_SPREAD),
    ]  # fmt: skip
    process = await asyncio.create_subprocess_exec(
        *command,
        env=os.environ | {"LD_LIBRARY_PATH": str(_CACHE)},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    printed = (await process.communicate())[0].decode(errors="replace")
    seen: dict[str, Any] = {"concurrency": concurrency, "exit_status": process.returncode}
    for key, pattern in _REPORT.items():
        match = re.search(pattern, printed, re.DOTALL)
        seen[key] = None if match is None else int(match[1])
    seen["problems"] = _problems(seen) if process.returncode == 0 else [printed.strip()[-500:]]
    return seen


def _problems(seen: dict[str, Any]) -> list[str]:
    missing = [key for key in _REPORT if seen[key] is None]
    if missing:
        return [f"it did not print {', '.join(missing)}"]
    concurrency = seen["concurrency"]
    wrong = {
        # the windows of both sides do not begin and end at the same moment
        "client and server count other requests": abs(seen["requests"] - seen["answered"]) > 2 * concurrency,
        "a request of one row is not one row": seen["rows"] != seen["answered"],
        "no batch was sent": seen["batches"] < 1,
        "the parts take longer than the whole": seen["queue_us"] + seen["compute_us"] > seen["server_us"] + 1,
        "the server takes longer than the client waits": seen["server_us"] > seen["client_us"] * 1.1,
        "nothing took any time": not (seen["compute_us"] and seen["server_us"]),
    }
    return [what for what, is_so in wrong.items() if is_so]


async def _statistics(url: str) -> dict[str, Any]:
    async with aiohttp.ClientSession() as session, session.get(f"{url}/v2/models/{_MODEL}/stats") as response:
        (stats,) = (await response.json())["model_stats"]
        return dict(stats)


def _plan() -> Path:
    """Write the plan of the example with an objective that any machine keeps."""
    plan = msgspec.json.decode(Path("examples/digits/gear_plan.json").read_bytes())
    plan["families"][_MODEL]["slo_s"] = _SLO_S
    write_json(_STATE / "plan.json", plan)
    return _STATE / "plan.json"


async def _measure(concurrencies: tuple[int, ...]) -> dict[str, Any]:
    binary = await asyncio.to_thread(fetch)
    stack = LocalStack(_STATE, plan=_plan(), repository=Path("model_repository"))
    measured: dict[str, Any] = {}
    async with stack.running():
        for transport, address in (("http", stack.url.removeprefix("http://")), ("grpc", stack.grpc_address)):
            before = await _statistics(stack.url)
            runs = [await _run(binary, transport, address, concurrency) for concurrency in concurrencies]
            after = await _statistics(stack.url)
            failed = after["inference_stats"]["fail"]["count"] - before["inference_stats"]["fail"]["count"]
            batches = sum(entry["compute_infer"]["count"] for entry in after["batch_stats"])
            measured[transport] = {
                "runs": runs,
                "failed": failed,
                "all_consistent": not failed
                and batches == after["execution_count"]
                and not any(run["problems"] for run in runs),
            }
    return measured


@click.command()
@click.option(
    "--result", type=click.Path(path_type=Path), default="benchmarks/results/local/perf_analyzer.json",
    show_default=True,
)  # fmt: skip
@click.option("--concurrency", "concurrencies", type=click.IntRange(min=1), multiple=True, default=_CONCURRENCIES)
def main(result: Path, concurrencies: tuple[int, ...]) -> None:
    """Run it over both transports, write the result, print it."""
    measured = asyncio.run(_measure(concurrencies))
    write_json(result, measured)
    Console().print(measured)


if __name__ == "__main__":
    main()
