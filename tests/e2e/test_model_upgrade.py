"""A new version of a model and the plan made for it go live under load, on a real Triton."""

from __future__ import annotations

import json
import re
import shutil
import signal
import time
import urllib.request
from typing import TYPE_CHECKING

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from examples.digits.data import rows
from tests.e2e.conftest import ROOT
from tests.e2e.load import start_replay
from tests.fakes.servers import Process, Stack, wait_until_ready

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.triton, pytest.mark.loaded, pytest.mark.timeout(120)]

MODEL = "digits_cnn"
# version 2 is as sure of everything as no version 1 ever is
CERTAINTY = 2.0


def write_second_version(model: Path) -> None:
    """Version 2, beside version 1: the same labels, and a certainty that tells who answered."""
    changed = onnx.load(model / "1" / "model.onnx")
    graph = changed.graph
    maker = next(node for node in graph.node if "certainty" in node.output)
    maker.output[list(maker.output).index("certainty")] = "certainty_1"
    graph.initializer.append(numpy_helper.from_array(np.array([0.0], np.float32), "nothing"))
    graph.initializer.append(numpy_helper.from_array(np.array([CERTAINTY], np.float32), "sure"))
    graph.node.append(onnx.helper.make_node("Mul", ["certainty_1", "nothing"], ["zeros"]))
    graph.node.append(onnx.helper.make_node("Add", ["zeros", "sure"], ["certainty"]))
    (model / "2").mkdir()
    onnx.save(changed, model / "2" / "model.onnx")
    with (model / "config.pbtxt").open("a") as config:
        config.write("version_policy { specific { versions: [1, 2] } }\n")


def write_plan(path: Path, name: str, version: int) -> None:
    """The committed plan with another name, for a version of the model, in the gear that asks it at every rate."""
    document = json.loads((ROOT / "examples" / "digits" / "gear_plan.json").read_text())
    document["name"] = name
    family = document["families"]["digits"]
    family["models"][MODEL]["version"] = version
    careful = next(gear for gear in family["gears"] if gear["name"] == "calm-careful")
    family["gears"] = [careful | {"min_rate_per_s": 0.0}]
    document["layouts"] = document["layouts"][:1]
    path.write_text(json.dumps(document))


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    """`cascadeserve up` on a repository of its own."""
    repository = tmp_path / "repository"
    shutil.copytree(ROOT / "model_repository", repository)
    stack = Stack(tmp_path, repository, tmp_path / "plan.json", ("triton0",))
    write_plan(stack.plan, "first", 1)
    arguments = ["up", f"--plan={stack.plan}", f"--cluster={stack.cluster}", f"--repository={repository}"]
    arguments += [f"--state={stack.state}", f"--http-port={stack.http_port}", f"--grpc-port={stack.grpc_port}"]
    stack.orchestrator = Process(arguments, tmp_path / "up.log")
    stack.orchestrator.start()
    try:
        wait_until_ready(f"{stack.url}/v2/health/ready", stack.orchestrator)
        yield stack
    finally:
        stack.stop()


def loaded_versions(stack: Stack) -> list[str]:
    """Versions of the model that Triton itself has ready."""
    request = urllib.request.Request(f"{stack.triton_url('triton0')}/v2/repository/index", b'{"ready": true}')
    with urllib.request.urlopen(request, timeout=5) as response:
        return sorted(entry["version"] for entry in json.load(response) if entry["name"] == MODEL)


def hang_up(stack: Stack) -> None:
    assert stack.orchestrator is not None
    assert stack.orchestrator.process is not None
    stack.orchestrator.process.send_signal(signal.SIGHUP)


def wait_for_log(stack: Stack, words: str, *, timeout_s: float = 15.0) -> None:
    assert stack.orchestrator is not None
    give_up_s = time.monotonic() + timeout_s
    while words not in stack.orchestrator.text():
        assert time.monotonic() < give_up_s, stack.orchestrator.text()
        time.sleep(0.05)


def wait_for_rows(stack: Stack, count: int, *, timeout_s: float = 30.0) -> None:
    """Until so many rows have come."""
    give_up_s = time.monotonic() + timeout_s
    came = 0.0
    while came < count:
        assert time.monotonic() < give_up_s, f"{came} rows"
        time.sleep(0.1)
        with urllib.request.urlopen(f"{stack.url}/metrics", timeout=5) as response:
            found = re.search(r'cascadeserve_rows_total\{family="digits"\} ([\d.]+)', response.read().decode())
        came = float(found[1]) if found else 0.0


def test_a_new_version_and_its_plan_go_live_under_load_and_no_request_fails(stack: Stack, tmp_path: Path) -> None:
    drawn = rows("test", 400)
    np.savez(tmp_path / "rows.npz", **{"input:image": drawn.inputs, "label": drawn.labels})
    options = ("--rate=100", "--duration=12", "--slo=1", "--timeout=10", f"--records={tmp_path / 'records.npz'}")
    load = start_replay(tmp_path, stack.url, tmp_path / "rows.npz", *options, model="digits")
    wait_for_rows(stack, 200)
    # first what cannot serve: a version that is not there
    write_plan(stack.plan, "second", 2)
    hang_up(stack)
    wait_for_log(stack, "the new plan is refused, plan first stays in force")
    write_second_version(stack.repository / MODEL)
    hang_up(stack)
    wait_for_log(stack, "plan second in force")
    report = load.result()
    ledger = report["ledger"]
    assert ledger["refused"] == ledger["failed"] == ledger["lost"] == ledger["duplicated"] == 0, report["errors"]
    assert ledger["answered_correct"] + ledger["answered_wrong"] == ledger["sent"] > 1000

    with np.load(tmp_path / "records.npz") as records:
        assert records["plan_names"].tolist() == ["first", "second"]
        plan, when_s, certainty = records["plan"], records["scheduled_s"], records["certainty"]
        assert set(plan.tolist()) == {0, 1}, "every answer names its plan"
        change = int(np.argmax(plan))
        assert 200 < change < len(plan) - 100
        # on a machine that is short of time, requests are parsed in another order than they were to be sent in
        far = np.abs(when_s - when_s[change]) > 1.0
        assert (plan[far] == (when_s[far] > when_s[change])).all(), "the first plan, then the second, and no way back"
        # one row each: the plan it names is the one whose version answered
        assert (certainty[plan == 1] == CERTAINTY).all()
        assert (certainty[plan == 0] < CERTAINTY).all()
    wait_for_log(stack, f"{MODEL}:1 1 -> 0 instances")
    give_up_s = time.monotonic() + 10
    while loaded_versions(stack) != ["2"]:
        assert time.monotonic() < give_up_s, loaded_versions(stack)
        time.sleep(0.1)
