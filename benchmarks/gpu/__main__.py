"""`python -m benchmarks.gpu`; `run.sh` calls it with the right interpreter."""

from __future__ import annotations

import argparse
import asyncio
import shutil
import signal
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.gpu.bench import Benchmark
from benchmarks.gpu.show import tabulate
from cascadeserve.artefacts import write_json
from cascadeserve.errors import CascadeServeError

if TYPE_CHECKING:
    from benchmarks.gpu.result import GpuResult

_RESULTS = Path(__file__).resolve().parents[1] / "results"


def main() -> int:
    """Run the benchmark; 0 done, 1 failed, 2 called in a wrong way, 130 interrupted."""
    parser = argparse.ArgumentParser(prog="benchmarks/gpu/run.sh", description="Cascade against largest model.")
    parser.add_argument("--device", choices=["gpu", "cpu"], default="gpu")
    parser.add_argument("--quick", action="store_true", help="tiny models and short windows, to try the script")
    parser.add_argument("--name", help="name of the result [default: that of the GPU]")
    parser.add_argument("--output", type=Path, help="result file [default: benchmarks/results/gpu/<name>.json]")
    parser.add_argument("--state", type=Path, help="empty folder for models and logs, kept [default: a temporary one]")
    options = parser.parse_args()
    if options.device == "cpu" and not options.quick:
        parser.error("the full family is far too large for a CPU; add --quick")
    if options.state is not None and options.state.is_dir() and any(options.state.iterdir()):
        parser.error(f"--state {options.state} is not empty")

    state = options.state or Path(tempfile.mkdtemp(prefix="cascadeserve-gpu-"))
    state.mkdir(parents=True, exist_ok=True)
    step = "starting"
    try:
        bench = Benchmark(options.device, state.resolve(), quick=options.quick, name=options.name)
        try:
            result = asyncio.run(_interruptible(bench))
        finally:
            step = bench.step
    except CascadeServeError as error:
        return _failed(f"failed while {step}: {error}", state, 1)
    except (KeyboardInterrupt, asyncio.CancelledError):
        return _failed(f"interrupted while {step}", state, 130)
    output = options.output or _default_output(result)
    write_json(output, result)
    print(f"\n{tabulate(result)}\nwritten to {output}")
    if options.state is None:
        shutil.rmtree(state, ignore_errors=True)
    return _verdict(result)


async def _interruptible(bench: Benchmark) -> GpuResult:
    """SIGTERM ends the run as Ctrl-C does: in order, with every process stopped."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await bench.run()


def _default_output(result: GpuResult) -> Path:
    if result.quick:
        return _RESULTS / "local" / f"gpu-{result.name}.json"
    return _RESULTS / "gpu" / f"{result.name}.json"


def _verdict(result: GpuResult) -> int:
    """A run whose own rules were broken fails, with its result written all the same."""
    problems = [
        f"{name}: {ledger.lost} requests lost, {ledger.duplicated} answered twice"
        for name, ledger in result.ledgers.items()
        if ledger.lost or ledger.duplicated
    ]
    if result.ratio.confirmed is None and not result.quick:
        problems += [
            f"{name}: the confirmation was {'void' if system.confirmation.void else system.confirmation.verdict}"
            for name, system in result.systems.items()
            if system.confirmation.void or not system.confirmation.sustained
        ]
    for problem in problems:
        print(f"Error: {problem}", file=sys.stderr)
    return 1 if problems else 0


def _failed(message: str, state: Path, status: int) -> int:
    # The weights are of no use to anybody who looks for the reason.
    for name in ("repository", "model_repository"):
        shutil.rmtree(state / name, ignore_errors=True)
    with suppress(OSError):  # not empty: there are logs
        state.rmdir()
    print(f"Error: {message}{f' (logs are kept in {state})' if state.is_dir() else ''}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
