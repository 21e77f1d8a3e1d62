"""The demo's way to a plan: rows, records, profile, plan, by the commands that anybody would use."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import platform
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal

import numpy as np

from cascadeserve.demo.family import EXAMPLE, FAMILY, MODELS, REPOSITORY
from cascadeserve.demo.kept import digest_file, digest_of, is_current, keep
from cascadeserve.errors import CascadeServeError, UsageError
from cascadeserve.local_stack import LocalStack, cascadeserve_command
from cascadeserve.process import spawn, stop
from cascadeserve.triton_config import model_digest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cascadeserve.demo.steps import Steps

Split = Literal["search", "calibration", "replay"]
NUM_ROWS: dict[Split, int] = {"search": 12_000, "calibration": 20_000, "replay": 25_000}
# the largest batch of the models: the fewest calls
_RECORD_BATCH = 64
_STOP_AFTER_S = 10.0


def draw_rows(state: Path, split: Split, seed: int = 0) -> Path:
    """Rows file of a split, drawn from the family's own generator."""
    path = state / f"rows-{split}-{seed}.npz"
    count = NUM_ROWS[split]
    made_from = digest_of(generator=digest_file(EXAMPLE / "data.py"), split=split, rows=count, numpy=np.__version__)
    if not is_current(path, made_from):
        if str(Path.cwd()) not in sys.path:
            sys.path.insert(0, str(Path.cwd()))
        drawn = importlib.import_module("examples.digits.data").rows(split, count, seed)
        np.savez(path, **{"input:image": drawn.inputs, "label": drawn.labels})
        keep(path, made_from)
    return path


class OfflineTriton:
    """Runs `record` and `profile` against a Triton with the whole family, which starts when it is first needed."""

    def __init__(
        self, state: Path, steps: Steps, servers: contextlib.AsyncExitStack, *, repository: Path = REPOSITORY,
        models: Sequence[str] = MODELS,
    ) -> None:  # fmt: skip
        """`servers` stops it in the end; `models` of the repository, from cheap to dear, are recorded and profiled."""
        self._steps = steps
        self._servers = servers
        self._repository = repository
        self._models = models
        self._stack = LocalStack(state / "offline", repository=repository, models=models)
        self._is_running = False
        self._served = digest_of(
            models={model: model_digest(repository / model) for model in models},
            triton=importlib.metadata.version("nvidia-pytriton"),
            machine=_machine(),
        )

    async def record(self, split: Literal["search", "calibration"], rows: Path, output: Path) -> None:
        """Records of all models on these rows."""
        options = [f"--split={split}", f"--family={FAMILY}", f"--batch={_RECORD_BATCH}"]
        await self._make(f"record {split}", rows, output, ["record", *options])

    async def profile(self, rows: Path, output: Path, *, quick: bool = True) -> None:
        """Profile of all models."""
        await self._make("profile", rows, output, ["profile", *["--quick"] * quick, "--front"])

    async def _make(self, step: str, rows: Path, output: Path, arguments: list[str]) -> None:
        made_from = digest_of(models=self._served, rows=digest_file(rows), arguments=arguments)
        with self._steps.timed(step) as say:
            if is_current(output, made_from):
                say(f"{output} is there already")
                return
            if not self._is_running:
                await self._servers.enter_async_context(self._stack.running())
                self._is_running = True
            await run_command(
                *arguments,
                *(f"--model={model}" for model in self._models),
                f"--cluster={self._stack.cluster}",
                f"--repository={self._repository}",
                f"--rows={rows}",
                f"--output={output}",
            )
            keep(output, made_from)


async def run_command(*arguments: str, log: IO[bytes] | None = None) -> None:
    """Run one of our commands, its output to `log` or ours.

    Raises:
        UsageError: it refuses what it was asked for.
        CascadeServeError: it fails otherwise.

    """
    process = await spawn(cascadeserve_command(*arguments), log=log)
    try:
        status = await process.wait()
    finally:
        await stop(process, kill_after_s=_STOP_AFTER_S)
    if status != 0:
        kind = UsageError if status == UsageError.exit_code else CascadeServeError
        where = "what it printed" if log is None else log.name
        raise kind(f"`cascadeserve {arguments[0]}` ended with status {status}; {where} says why")


def _machine() -> str:
    """What a profile holds for: the processor; it is not kept on another one."""
    cpu = ""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line for line in lines if line.startswith("model name")), "")
    return f"{platform.machine()} {cpu}"
