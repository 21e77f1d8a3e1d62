"""One of two real Tritons fails or hangs in every batch and answers every health check with "ready"."""

from __future__ import annotations

import time
import urllib.request
from typing import TYPE_CHECKING

import pytest

from tests.e2e.conftest import tiny_stack
from tests.e2e.load import start_replay, tiny_rows
from tests.fakes.servers import running, server_pid
from tests.fakes.tiny import mark_model

if TYPE_CHECKING:
    from pathlib import Path

    from tests.fakes.servers import Stack

pytestmark = [pytest.mark.triton, pytest.mark.loaded, pytest.mark.timeout(120)]

MARKED = "        if (x[:, 2] == 1.0).any():\n"


def stack_to_break(folder: Path, fault: str) -> Stack:
    """Two Tritons whose small model does `fault` while there is a file named like its server's process."""
    stack = tiny_stack(folder, ("a", "b"))
    mark_model(stack.repository, "small")
    model = stack.repository / "small" / "1" / "model.py"
    flagged = f"        while Path({str(folder)!r}, f'broken-{{os.getppid()}}').exists():\n            {fault}\n"
    text = model.read_text()
    assert MARKED in text
    model.write_text(f"import time\n{text.replace(MARKED, flagged + MARKED)}")
    return stack


def is_failing(stack: Stack) -> bool:
    """Whether the orchestrator says that the small model fails at endpoint a."""
    with urllib.request.urlopen(f"{stack.url}/metrics", timeout=5) as response:
        return 'cascadeserve_model_failing{endpoint="a",model="small"} 1.0' in response.read().decode()


def comes_to(stack: Stack, *, failing: bool) -> bool:
    """Whether it says so within some seconds."""
    give_up_s = time.monotonic() + 6
    while is_failing(stack) is not failing and time.monotonic() < give_up_s:
        time.sleep(0.1)
    return is_failing(stack) is failing


@pytest.mark.parametrize(
    ("fault", "said", "least"),
    [
        ("raise ValueError('broken')", "none was answered, and others answer their rows", 1.0),
        # what is in the batches that hang may be too late elsewhere, and for two seconds they take half of the slots
        ("time.sleep(0.02)", "small:1 hangs", 0.5),
    ],
    ids=["errors", "hangs"],
)
def test_it_is_taken_out_and_comes_back(tmp_path: Path, fault: str, said: str, least: float) -> None:
    stack = stack_to_break(tmp_path, fault)
    with running(stack):
        flag = tmp_path / f"broken-{server_pid(stack.tritons['a'])}"
        load = start_replay(tmp_path, stack.url, tiny_rows(tmp_path), "--rate=30", "--duration=12", "--slo=0.5")
        time.sleep(3)
        flag.touch()
        assert comes_to(stack, failing=True)
        flag.unlink()
        assert comes_to(stack, failing=False)
        report = load.result()
        ledger = report["ledger"]
        # rows that are cut short have the answer of the first stage
        assert ledger["lost"] == ledger["failed"] == 0, report
        assert ledger["answered_correct"] >= least * ledger["sent"], report
    assert stack.orchestrator is not None
    assert said in stack.orchestrator.text()
    assert "small:1 is in use again" in stack.orchestrator.text()
