"""One of two real Tritons answers every batch with an error and every health check with "ready"."""

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

pytestmark = [pytest.mark.triton, pytest.mark.loaded, pytest.mark.timeout(120)]


def is_failing(url: str) -> bool:
    """Whether the orchestrator says that the small model fails at endpoint a."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=5) as response:
        return 'cascadeserve_model_failing{endpoint="a",model="small"} 1.0' in response.read().decode()


def test_a_triton_that_answers_errors_only_is_taken_out_and_comes_back(tmp_path: Path) -> None:
    stack = tiny_stack(tmp_path, ("a", "b"))
    mark_model(stack.repository, "small")
    model = stack.repository / "small" / "1" / "model.py"
    # a file by the name of the server's process breaks the model of that server alone
    marked = "if (x[:, 2] == 1.0).any()"
    flagged = f"Path({str(tmp_path)!r}, f'broken-{{os.getppid()}}').exists()"
    model.write_text(model.read_text().replace(marked, f"{marked} or {flagged}"))
    assert flagged in model.read_text()
    with running(stack):
        flag = tmp_path / f"broken-{server_pid(stack.tritons['a'])}"
        load = start_replay(tmp_path, stack.url, tiny_rows(tmp_path), "--rate=60", "--duration=10", "--slo=0.5")
        time.sleep(3)
        flag.touch()
        time.sleep(2)
        assert is_failing(stack.url)
        flag.unlink()
        time.sleep(1.5)
        assert not is_failing(stack.url)
        ledger = load.result()["ledger"]
        assert ledger["answered_correct"] == ledger["sent"], ledger
    assert stack.orchestrator is not None
    assert "none was answered, and others answer their rows" in stack.orchestrator.text()
    assert "small:1 answers again" in stack.orchestrator.text()
