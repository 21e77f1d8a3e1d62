from __future__ import annotations

import math
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from click.testing import CliRunner

from cascadeserve.artefacts import read_json
from cascadeserve.errors import CascadeServeError, InvalidArtefact, UsageError
from cascadeserve.replay.cli import replay
from cascadeserve.replay.settings import choose_timeout, parse_cores, parse_range, parse_steps
from cascadeserve.report import ServingReport

if TYPE_CHECKING:
    from pathlib import Path

    from click.testing import Result


def call(url: str, rows: Path, *arguments: str) -> Result:
    # In a thread of its own, since pytest-asyncio keeps an event loop in this one.
    with ThreadPoolExecutor(1) as pool:
        command = ["--url", url, "--model", "digits", "--rows", str(rows), *arguments]
        return pool.submit(CliRunner().invoke, replay, command).result()


def test_a_run_writes_report_and_records(http_thread: tuple[Any, str], rows_path: Path, tmp_path: Path) -> None:
    _, url = http_thread
    files = ("--report", str(tmp_path / "out" / "report.json"), "--records", str(tmp_path / "out" / "records.npz"))
    load = ("--rate", "400", "--duration", "0.5", "--rows-per-request", "1-3", "--slo", "0.5", "--seed", "4")
    result = call(url, rows_path, *load, *files)
    assert result.exit_code == 0, result.output
    assert "lost / duplicated" in result.output
    report = read_json(tmp_path / "out" / "report.json", ServingReport)
    assert report.source == "replay"
    assert report.duration_s == 0.5
    # 400 rows per second in requests of 2 rows on average
    assert report.ledger.sent == pytest.approx(100, abs=35)
    assert report.offered_rate_per_s == pytest.approx(400, rel=0.35)
    assert report.ledger.answered_correct + report.ledger.answered_wrong == report.ledger.sent
    with np.load(tmp_path / "out" / "records.npz") as records:
        assert np.array_equal(records["label"], records["row_index"])
        assert len(records["scheduled_s"]) == report.ledger.sent
        assert records["outcome_names"][records["outcome"][0]] == "answered"
        assert records["gear_names"].tolist() == ["g0"]
        assert records["plan_names"].tolist() == ["p0"]


def test_the_seed_fixes_the_load(http_thread: tuple[Any, str], rows_path: Path, tmp_path: Path) -> None:
    kept = []
    for name in ("a", "b"):
        path = tmp_path / f"{name}.npz"
        load = ("--steps", "0.2x100,0.1x300", "--shuffle", "--seed", "9", "--records", str(path))
        assert call(http_thread[1], rows_path, *load).exit_code == 0
        with np.load(path) as records:
            kept.append((records["scheduled_s"], records["row_index"]))
    assert np.array_equal(kept[0][0], kept[1][0])
    assert np.array_equal(kept[0][1], kept[1][1])


@pytest.mark.parametrize("load", [("--process", "gamma"), ("--process", "bursty"), ()])
def test_other_processes_and_traces(
    http_thread: tuple[Any, str], rows_path: Path, tmp_path: Path, load: tuple[str, ...]
) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("time\n1\n2\n3\n5\n")
    arguments = (*load, "--rate", "200", "--duration", "0.3") if load else ("--trace", str(trace), "--duration", "0.3")
    assert call(http_thread[1], rows_path, *arguments).exit_code == 0


def test_duplicates_make_exit_code_1_after_the_report(
    http_thread: tuple[Any, str], rows_path: Path, tmp_path: Path
) -> None:
    script, url = http_thread
    script.behaviour = "wrong_id"
    path = tmp_path / "report.json"
    result = call(url, rows_path, "--rate", "100", "--duration", "0.2", "--report", str(path))
    assert result.exit_code == 1
    assert result.exception is None or isinstance(result.exception, SystemExit)
    ledger = read_json(path, ServingReport).ledger
    assert ledger.duplicated == ledger.lost == ledger.sent > 0


def test_refusals_alone_are_no_failure_of_the_command(http_thread: tuple[Any, str], rows_path: Path) -> None:
    script, url = http_thread
    script.behaviour = "refuse"
    assert call(url, rows_path, "--rate", "100", "--duration", "0.2").exit_code == 0


def test_ctrl_c_leaves_a_partial_report(http_thread: tuple[Any, str], rows_path: Path, tmp_path: Path) -> None:
    script, url = http_thread
    path = tmp_path / "report.json"
    code = "from cascadeserve.replay.cli import replay; replay()"
    load = ("--rate", "100", "--duration", "30", "--report", str(path))
    command = [sys.executable, "-c", code, "--url", url, "--model", "digits", "--rows", str(rows_path), *load]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        while len(script.ids) < 20:
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
    report = read_json(path, ServingReport)
    assert not report.complete
    assert report.ledger.answered_correct + report.ledger.answered_wrong == report.ledger.sent >= 20


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ((), UsageError, "load is not given"),
        (("--rate", "5"), UsageError, "load is not given"),
        (("--rate", "-5", "--duration", "1"), UsageError, "rate_per_s is -5"),
        (("--steps", "1x5", "--rate", "5"), UsageError, "--steps holds"),
        (("--steps", "1y5"), UsageError, "`1y5` is not of the form"),
        (("--trace", "t.csv", "--process", "gamma"), UsageError, "--trace cannot"),
        (("--trace", "nowhere.csv"), InvalidArtefact, "nowhere"),
        (("--rate", "5", "--duration", "1", "--rows-per-request", "3-1"), UsageError, "rows per request"),
        (("--rate", "5", "--duration", "1", "--cores", "4095"), UsageError, "may not run"),
        (("--rate", "5", "--duration", "1", "--slo", "0"), UsageError, "--slo"),
        (("--rate", "5", "--duration", "2"), UsageError, "start the server"),
    ],
)
def test_what_cannot_work_is_said(
    rows_path: Path, arguments: tuple[str, ...], kind: type[CascadeServeError], message: str
) -> None:
    result = call("http://127.0.0.1:1", rows_path, *arguments)
    assert isinstance(result.exception, kind), result.output
    assert message in str(result.exception)


def test_addresses_are_checked(rows_path: Path) -> None:
    for url in ("127.0.0.1:8000", "grpc://h:1/x", "ftp://h:1"):
        result = call(url, rows_path, "--rate", "5", "--duration", "1")
        assert isinstance(result.exception, UsageError)


def test_small_parsers() -> None:
    assert parse_steps("5x100, 0.5x40.5") == ((5.0, 100.0), (0.5, 40.5))
    assert parse_range("4") == (4, 4)
    assert parse_range("1-8") == (1, 8)
    assert parse_cores("0,2-3") == {0, 2, 3}
    assert choose_timeout(None, None) == 5.0
    assert choose_timeout(None, 0.1) == pytest.approx(0.4)
    assert choose_timeout(2.0, 0.1) == 2.0
    with pytest.raises(UsageError, match="--timeout is inf"):
        choose_timeout(math.inf, None)
