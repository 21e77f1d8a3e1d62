"""Two real Tritons behind one orchestrator: batches run where they were sent, counts change under load."""

from __future__ import annotations

import json
import re
import urllib.request
from typing import TYPE_CHECKING

import pytest

from tests.e2e.conftest import tiny_stack
from tests.e2e.load import start_replay, tiny_rows
from tests.fakes.servers import Stack, running
from tests.fakes.tiny import plan_document

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.triton, pytest.mark.loaded, pytest.mark.timeout(180)]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    document = plan_document(("a", "b"))
    family = document["families"]["family"]
    family["gears"][1]["max_rate_per_s"] = 250.0
    # at calm, the small model runs on a alone and the large one on b alone
    family["gears"][0]["load"] = {"small": {"a": 1.0, "b": 0.0}, "large": {"a": 0.0, "b": 1.0}}
    document["switching"] = {"gear_dwell_s": 0.5, "layout_up_after_s": 0.3, "layout_down_after_s": 1.0}
    with running(tiny_stack(tmp_path_factory.mktemp("two"), ("a", "b"), document)) as stack:
        yield stack


def stats(stack: Stack, endpoint: str, model: str) -> tuple[int, int]:
    """(rows, executions) that Triton itself counted."""
    with urllib.request.urlopen(f"{stack.triton_url(endpoint)}/v2/models/{model}/stats", timeout=5) as response:
        entry = json.load(response)["model_stats"][0]
    return entry["inference_count"], entry["execution_count"]


def metrics(stack: Stack) -> dict[tuple[str, str], float]:
    """Rows sent per endpoint and model, as the orchestrator counted them."""
    with urllib.request.urlopen(f"{stack.url}/metrics", timeout=5) as response:
        text = response.read().decode()
    found = re.findall(r'cascadeserve_batch_rows_sum\{endpoint="(\w+)",model="(\w+)"\} ([\d.]+)', text)
    return {(endpoint, model): float(rows) for endpoint, model, rows in found}


KEYS = [(endpoint, model) for endpoint in ("a", "b") for model in ("small", "large")]


def test_triton_counts_the_batches_where_the_orchestrator_sent_them(stack: Stack, tmp_path: Path) -> None:
    ran_before = {key: stats(stack, *key)[0] for key in KEYS}
    sent_before = metrics(stack)
    rows = tiny_rows(tmp_path, escalated=0.3, count=200)
    report = start_replay(tmp_path, stack.url, rows, "--rate=40", "--duration=5", "--slo=0.5", "--timeout=10").result()
    assert report["ledger"]["answered_correct"] == report["ledger"]["sent"]
    ran = {key: stats(stack, *key)[0] - count for key, count in ran_before.items()}
    sent_after = metrics(stack)
    assert ran == {key: sent_after.get(key, 0) - sent_before.get(key, 0) for key in KEYS}
    assert ran["a", "small"] + ran["b", "small"] == report["ledger"]["sent"]
    assert ran["a", "large"] + ran["b", "large"] == report["stages"][1]["rows"]
    # most of it in the gear whose weights send the small model to a and the large one to b; a machine that stalls
    # makes what arrives together look like a surge, and the next gear has no weights
    assert ran["a", "small"] > ran["b", "small"]
    if {span["gear"] for span in report["gears"]} == {"calm"}:
        assert ran["b", "small"] == ran["a", "large"] == 0


def test_instance_groups_change_both_ways_under_load_and_no_request_fails(stack: Stack, tmp_path: Path) -> None:
    rows = tiny_rows(tmp_path)
    load = start_replay(tmp_path, stack.url, rows, "--steps=3x50,8x350,10x50", "--slo=0.5", "--timeout=10")
    report = load.result()
    ledger = report["ledger"]
    assert ledger["answered_correct"] == ledger["sent"] > 3000
    assert ledger["refused"] == ledger["failed"] == ledger["lost"] == ledger["duplicated"] == 0
    assert stack.orchestrator is not None
    log = stack.orchestrator.text()
    for endpoint in ("a", "b"):
        assert f"endpoint {endpoint}: large:1 1 -> 2 instances" in log
        assert f"endpoint {endpoint}: large:1 2 -> 1 instances" in log
    assert {"wide", "busy", "calm"} & {span["gear"] for span in report["gears"]} == {"wide", "busy", "calm"}
    text = (stack.state / "model_repository" / "large" / "configs" / "a.pbtxt").read_text()
    assert "count: 1" in text


def test_requests_are_spread_over_both_endpoints_when_the_gear_names_no_weights(stack: Stack, tmp_path: Path) -> None:
    before = [stats(stack, endpoint, "small")[0] for endpoint in ("a", "b")]
    rows = tiny_rows(tmp_path)
    report = start_replay(tmp_path, stack.url, rows, "--rate=200", "--duration=4", "--slo=0.5", "--timeout=10").result()
    assert report["ledger"]["lost"] == 0
    shares = [stats(stack, endpoint, "small")[0] - count for endpoint, count in zip(("a", "b"), before, strict=True)]
    assert min(shares) > 0.1 * sum(shares)
