"""Load for end-to-end tests: `cascadeserve replay` as its own process, and its report."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path


@dataclass
class Replay:
    """A running load generator."""

    process: subprocess.Popen[bytes]
    report: Path
    records: Path
    log: Path

    def result(self, *, timeout_s: float = 120.0) -> dict[str, Any]:
        """Its report, when it has ended; the exit status is part of the report's truth and checked by the caller."""
        self.process.wait(timeout_s)
        assert self.report.exists(), self.log.read_text()
        document: dict[str, Any] = json.loads(self.report.read_text())
        return document

    def unanswered_before(self, time_s: float) -> list[str]:
        """What requests were told that were sent before a time of the machine's monotonic clock and not answered."""
        with np.load(self.records) as records:
            missed = (records["start_s"] + records["sent_s"] < time_s) & (records["error"] >= 0)
            return [str(records["error_texts"][error]) for error in records["error"][missed]]


def tiny_rows(folder: Path, *, escalated: float = 0.3, count: int = 1000) -> Path:
    """Rows of the tiny family whose right answer is what the cascade must say."""
    generator = np.random.default_rng(0)
    certainty = np.where(generator.random(count) < escalated, 0.1, 0.9).astype(np.float32)
    first = np.arange(count) % 100
    x = np.stack([first.astype(np.float32), certainty, np.zeros(count, np.float32)], axis=1)
    path = folder / "rows.npz"
    np.savez(path, **{"input:x": x, "label": np.where(certainty < 0.5, first + 100, first).astype(np.int64)})
    return path


def start_replay(folder: Path, url: str, rows: Path, *options: str, model: str = "family") -> Replay:
    """Start the generator on core 1 if there is one."""
    report, records, log = folder / "report.json", folder / "records.npz", folder / "replay.log"
    arguments = ["replay", f"--url={url}", f"--model={model}", f"--rows={rows}", f"--report={report}"]
    arguments += [f"--records={records}", *options]
    with log.open("wb") as file:
        process = subprocess.Popen([sys.executable, "-m", "cascadeserve", *arguments], stdout=file, stderr=file)
    return Replay(process, report, records, log)
