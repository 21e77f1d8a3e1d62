"""Run the tests as `make test` does, write what became of every file: `python -m benchmarks.suite --result FILE`."""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from pathlib import Path

import click
import pytest

from cascadeserve.artefacts import write_json

# as in the Makefile: where tests start a Triton, and where they put load on one
TRITON_TESTS = (
    "tests/benchmarks/test_gpu_script.py",
    "tests/conformance",
    "tests/contract",
    "tests/e2e",
    "tests/export/test_verify.py",
)
LOADED_TESTS = ("tests/e2e",)
_SESSIONS = (
    ("-m", "not triton", "--numprocesses", "2"),
    ("-m", "triton and not loaded", "--numprocesses", "2", "--dist", "loadfile", *TRITON_TESTS),
    # what puts load on a Triton has the machine to itself
    ("-m", "loaded", *LOADED_TESTS),
)
_FINE = (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED)


class _PerFile:
    """Counts outcomes per test file."""

    def __init__(self) -> None:
        self.counts: defaultdict[str, dict[str, int]] = defaultdict(lambda: {"passed": 0, "failed": 0, "skipped": 0})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.counts[report.nodeid.partition("::")[0]][report.outcome] += 1

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.counts[report.nodeid.partition("::")[0]]["failed"] += 1


@click.command(context_settings={"ignore_unknown_options": True})
@click.option("--result", type=click.Path(path_type=Path), required=True)
@click.argument("arguments", nargs=-1)
def main(result: Path, arguments: tuple[str, ...]) -> None:
    """Write {file: {passed, failed, skipped, all_passed}}; a file without a passed test has not all passed."""
    # what the first Python has compiled the others take
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    sys.dont_write_bytecode = False
    plugin = _PerFile()
    found = [pytest.main([*session, *arguments], plugins=[plugin]) for session in _SESSIONS]
    status = next((each for each in found if each not in _FINE), min(found))
    files = {
        name: counts | {"all_passed": counts["passed"] > 0 and not counts["failed"] and not counts["skipped"]}
        for name, counts in plugin.counts.items()
    }
    write_json(result, {"exit_status": int(status), "files": files})


if __name__ == "__main__":
    main()
