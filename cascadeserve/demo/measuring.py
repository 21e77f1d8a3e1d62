"""Runs of the load generator against a system; the finished ones of an interrupted demo are not run again."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING, Any

import msgspec
import numpy as np

from cascadeserve.artefacts import read_json, write_json
from cascadeserve.demo.judging import judge
from cascadeserve.report import ServingReport

if TYPE_CHECKING:
    import contextlib
    from collections.abc import Callable, Generator
    from pathlib import Path

    from numpy.typing import NDArray

    from cascadeserve.demo.judging import Probe
    from cascadeserve.demo.rate_search import Ask, Found, Verdict
    from cascadeserve.local_stack import LocalStack

Arrays = dict[str, "NDArray[Any]"]

# Nobody gives up on a request in the demo: one that is late counts by its latency, and only what never comes is lost.
_PATIENCE_S = 5.0
_PROBE_S = 5.0
_CONFIRMATION_S = 20.0
# A confirmed rate rests on so many rows; Poisson arrivals vary by less than the rest.
_CONFIRMED_ROWS = 5_000
_SPARE_ROWS = 300
# The first batches after a start are slow: caches, and an event loop that has never run its code.
_WARM_UP = ("--rate=100", "--duration=2")


class RunFolder:
    """Where runs are kept: those of a demo that was interrupted, as long as they are `about` the same thing."""

    def __init__(self, folder: Path, about: str) -> None:
        """`about` is a digest of all that the runs depend on; runs about something else are dropped."""
        self._folder = folder
        note = folder / "about"
        if folder.exists() and not (note.exists() and note.read_text() == about):
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        note.write_text(about)

    def path(self, name: str) -> Path:
        """Path of a run without suffix."""
        return self._folder / name

    def find(self, name: str, options: list[str]) -> tuple[ServingReport, Arrays] | None:
        """Read a finished run that was asked for in the same way; None if there is none."""
        path = self.path(name)
        note = path.with_suffix(".options")
        if not note.exists() or msgspec.json.decode(note.read_bytes()) != options:
            return None
        with np.load(path.with_suffix(".npz")) as arrays:
            return read_json(path.with_suffix(".json"), ServingReport), {key: arrays[key] for key in arrays.files}

    def finish(self, name: str, options: list[str]) -> None:
        """Note that a run is complete."""
        write_json(self.path(name).with_suffix(".options"), options)

    def clear(self) -> None:
        """Drop all runs: the demo is over, the next one measures anew."""
        shutil.rmtree(self._folder)


@dataclass(frozen=True)
class Run:
    """One judged run and its records."""

    probe: Probe
    records: Arrays


class System:
    """One way to serve the family, and the load generator's view of it.

    It starts with the first run that is not kept already, and is stopped by `servers`.
    """

    def __init__(
        self, name: str, stack: LocalStack, model: str, rows: Path, slo_s: float, runs: RunFolder,
        servers: contextlib.AsyncExitStack, log: IO[bytes],
    ) -> None:  # fmt: skip
        self.name = name
        self.slo_s = slo_s
        self._stack = stack
        self._model = model
        self._rows = rows
        self._runs = runs
        self._log = log
        self._servers = servers
        self._is_running = False
        self._count = 0

    async def load(self, *options: str) -> tuple[ServingReport, Arrays]:
        """Put a load on the system; the next call shows it other rows in another order."""
        self._count += 1
        name = f"{self.name}-{self._count:03d}"
        asked = [
            *options, f"--slo={self.slo_s}", f"--timeout={_PATIENCE_S}", "--shuffle", f"--seed={self._count}",
        ]  # fmt: skip
        kept = self._runs.find(name, asked)
        if kept is not None:
            return kept
        if not self._is_running:
            await self._servers.enter_async_context(self._stack.running())
            self._is_running = True
            await self._replay(f"{self.name}-warm-up", [*_WARM_UP])
        found = await self._replay(name, asked)
        self._runs.finish(name, asked)
        return found

    async def search(
        self, search: Generator[Ask, Verdict, Found], say: Callable[[str], None]
    ) -> tuple[Found, list[Run]]:
        """Run what a search asks for; returns what it found and all runs, in order."""
        runs: list[Run] = []
        try:
            ask = next(search)
            while True:
                run = await self._run(ask)
                runs.append(run)
                say(f"  {describe(run.probe)}")
                ask = search.send(run.probe.verdict)
        except StopIteration as end:
            found: Found = end.value
            return found, runs

    async def _run(self, ask: Ask) -> Run:
        duration_s = _PROBE_S
        if ask.kind == "confirmation":
            duration_s = max(_CONFIRMATION_S, (_CONFIRMED_ROWS + _SPARE_ROWS) / ask.rate_per_s)
        report, records = await self.load(f"--rate={ask.rate_per_s:.2f}", f"--duration={duration_s:.2f}")
        probe = judge(report, records, kind=ask.kind, rate_per_s=ask.rate_per_s, slo_s=self.slo_s)
        return Run(probe, records)

    async def _replay(self, name: str, options: list[str]) -> tuple[ServingReport, Arrays]:
        return await self._stack.replay(
            self._runs.path(name), self._stack.url, self._model, self._rows, *options, log=self._log
        )


def describe(probe: Probe) -> str:
    """One line about a run."""
    late = "-" if probe.p95_s is None else f"{probe.p95_s * 1e3:6.1f} ms"
    verdict = probe.verdict if not probe.reason else f"{probe.verdict}: {probe.reason}"
    return f"{probe.kind:12s} {probe.rate_per_s:7.0f} rows/s  p95 {late}  {verdict}"
