"""Probe rows are recorded through a real Triton, and notice there that a model is another one than was recorded."""

from __future__ import annotations

import shutil
import time
import urllib.request
from typing import TYPE_CHECKING

import numpy as np
import pytest
import tritonclient.http

from planner.records_files import read_probes
from tests.e2e.conftest import tiny_stack
from tests.fakes.certified import PROBES, certified_document
from tests.fakes.servers import Process, running
from tests.fakes.tiny import LABEL_OFFSET, write_version

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.fakes.servers import Stack

pytestmark = [pytest.mark.triton, pytest.mark.timeout(120)]

VOID = 'cascadeserve_certificate_void{endpoint="a",family="family",model="small"}'


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    with running(tiny_stack(tmp_path, ("a",), certified_document())) as stack:
        yield stack


def certified(stack: Stack) -> bool:
    """Whether the answer to a request says so."""
    with tritonclient.http.InferenceServerClient(stack.url.removeprefix("http://")) as client:
        tensor = tritonclient.http.InferInput("x", list(PROBES.shape), "FP32")
        tensor.set_data_from_numpy(PROBES)
        return bool(client.infer("family", [tensor]).get_response()["parameters"]["certified"])


def wait_for_log(stack: Stack, words: str, times: int = 1) -> None:
    assert stack.orchestrator is not None
    give_up_s = time.monotonic() + 20.0
    while stack.orchestrator.text().count(words) < times:
        assert time.monotonic() < give_up_s, stack.orchestrator.text()
        time.sleep(0.05)


def metrics(stack: Stack) -> str:
    with urllib.request.urlopen(f"{stack.url}/metrics", timeout=5) as response:
        text: str = response.read().decode()
    return text


def serve_another(stack: Stack, version: int) -> None:
    """Start the server again after the small model's file was replaced by that of another version."""
    stack.tritons["a"].stop()
    made = stack.folder / f"version-{version}"
    write_version(made, "small", version)
    shutil.copy(made / "small" / str(version) / "model.onnx", stack.repository / "small" / "1" / "model.onnx")
    stack.start_triton("a")


def test_another_model_file_voids_the_certificate_until_the_right_one_is_back(stack: Stack) -> None:
    wait_for_log(stack, "small:1 answers the probe rows as recorded")
    wait_for_log(stack, "large:1 answers the probe rows as recorded")
    assert certified(stack)
    assert VOID not in metrics(stack)

    serve_another(stack, 2)
    wait_for_log(
        stack, "endpoint a: small:1 answers 3 of 3 probe rows otherwise than when it was recorded (row 0: label"
    )
    wait_for_log(stack, "large:1 answers the probe rows as recorded", times=2)
    assert not certified(stack), "it is served on, but nothing is certified"
    assert f"{VOID} 1.0" in metrics(stack)

    serve_another(stack, 1)
    wait_for_log(stack, "small:1 answers the probe rows as recorded", times=2)
    assert certified(stack)
    assert f"{VOID} 0.0" in metrics(stack)


def test_record_keeps_some_of_the_calibration_rows(stack: Stack, tmp_path: Path) -> None:
    x = np.random.default_rng(1).random((100, 3), np.float32)
    np.savez(tmp_path / "rows.npz", **{"input:x": x, "label": x[:, 0].astype(np.int64)})
    output = tmp_path / "calibration.npz"
    arguments = ["record", f"--cluster={stack.cluster}", f"--rows={tmp_path / 'rows.npz'}", "--split=calibration"]
    arguments += ["--family=family", "--model=small", "--model=large", f"--repository={stack.repository}"]
    process = Process([*arguments, "--probe-rows=8", f"--output={output}"], tmp_path / "record.log")
    process.start()
    assert process.process is not None
    assert process.process.wait(60) == 0, process.text()
    probes = read_probes(output)
    assert probes is not None
    with np.load(output) as file:
        row = file["probe_row"]
        np.testing.assert_array_equal(file["input:x"], x[row])
    assert len(row) == 8
    for model, answers in probes.answers.items():
        assert answers.label == (LABEL_OFFSET[model],) * 8
        np.testing.assert_array_equal(np.float32(answers.certainty), x[row, 1])
