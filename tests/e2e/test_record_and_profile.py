"""`record` and `profile` on a real Triton that serves the committed repository."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from cascadeserve.triton_config import model_digest
from planner.profile import batch_busy_s, planned_busy_points, read_profile
from planner.records_files import read_search
from tests.fakes.servers import Process, Stack

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime as ort

from examples.digits.data import rows

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.triton, pytest.mark.loaded, pytest.mark.timeout(120)]

ROOT = Path(__file__).parents[2]
REPOSITORY = ROOT / "model_repository"
NUM_ROWS = 1000
INTERRUPTED = 130


@pytest.fixture(scope="module")
def triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """One endpoint and a rows file beside its cluster file."""
    folder = tmp_path_factory.mktemp("record-and-profile")
    drawn = rows("search", NUM_ROWS)
    np.savez(folder / "rows.npz", **{"input:image": drawn.inputs, "label": drawn.labels, "group": drawn.image_ids})
    stack = Stack(folder, REPOSITORY, folder / "no-plan.json", ("triton0",))
    try:
        stack.start_triton("triton0")
        yield stack
    finally:
        stack.stop()


def command(triton: Stack, name: str, output: Path, models: tuple[str, ...], *options: str) -> Process:
    arguments = [name, f"--cluster={triton.cluster}", f"--rows={triton.folder / 'rows.npz'}", f"--output={output}"]
    arguments += [f"--repository={REPOSITORY}", *(f"--model={model}" for model in models), *options]
    process = Process(arguments, output.with_suffix(".log"))
    process.start()
    return process


def finish(process: Process) -> int:
    assert process.process is not None
    return process.process.wait(60)


def record(triton: Stack, output: Path) -> Process:
    options = ("--split=search", "--family=digits", "--keep-scores", "--batch=8")
    return command(triton, "record", output, ("digits_linear", "digits_resnet"), *options)


def test_recorded_answers_are_those_of_the_models_also_after_an_interruption(triton: Stack, tmp_path: Path) -> None:
    whole = record(triton, tmp_path / "whole.npz")
    assert finish(whole) == 0, whole.text()
    output = tmp_path / "records.npz"
    interrupted = record(triton, output)
    partial = tmp_path / "records.npz.partial"
    give_up_s = time.monotonic() + 30
    while not list(partial.glob("digits_resnet-*/000000.npz")):
        assert time.monotonic() < give_up_s, interrupted.text()
        time.sleep(0.01)
    assert interrupted.process is not None
    interrupted.process.send_signal(signal.SIGINT)
    assert finish(interrupted) == INTERRUPTED, interrupted.text()
    assert "the same command goes on from there" in interrupted.text()
    assert not output.exists()
    rest = record(triton, output)
    assert finish(rest) == 0, rest.text()
    assert output.read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert not partial.exists()

    records = read_search(output)
    drawn = rows("search", NUM_ROWS)
    np.testing.assert_array_equal(records.truth, drawn.labels)
    np.testing.assert_array_equal(records.group_id, drawn.image_ids)
    for model, answers in records.models.items():
        session = ort.InferenceSession(str(REPOSITORY / model / "1" / "model.onnx"), providers=["CPUExecutionProvider"])
        label, certainty, scores = session.run(["label", "certainty", "scores"], {"image": drawn.inputs[:300]})
        np.testing.assert_array_equal(answers.label[:300], label[:, 0])
        # kernels sum in another order in another batch
        np.testing.assert_allclose(answers.certainty[:300], certainty[:, 0], atol=1e-5)
        assert answers.scores is not None
        np.testing.assert_allclose(answers.scores[:300], scores, atol=2e-3)
        assert answers.provenance.digest == model_digest(REPOSITORY / model)
        assert (answers.provenance.backend, answers.provenance.device_kind) == ("onnxruntime", "cpu")

    again = record(triton, output)
    assert finish(again) == 2
    assert "not overwritten" in again.text()


def test_a_profile_of_the_digits_family(triton: Stack, tmp_path: Path) -> None:
    output = tmp_path / "profile.json"
    options = ("--quick", "--repeats=3", "--batches=1,8,64", "--allow-reload")
    process = command(triton, "profile", output, ("digits_linear", "digits_resnet"), *options)
    assert finish(process) == 0, process.text()
    profile = read_profile(output)
    resnet = profile.models["digits_resnet"]
    for concurrency in (1, 2):
        one, eight, many = (batch_busy_s(resnet, batch, concurrency) for batch in (1, 8, 64))
        assert one < eight < many
        # a core does 64 rows in no less than a few times what 8 take, however disturbed the machine is
        assert many > 2 * eight
    assert [batch for batch, _ in planned_busy_points(profile, "digits_resnet")] == [1, 8, 64]
    assert batch_busy_s(profile.models["digits_linear"], 64, 2) < batch_busy_s(resnet, 64, 2)
    assert [pair.models for pair in profile.pairs] == [("digits_linear", "digits_resnet")]
    assert profile.repeats == 3
    assert profile.server_version
    assert profile.host is not None
    for name, model in profile.models.items():
        assert model.digest == model_digest(REPOSITORY / name)
        assert model.load_s is not None
        assert model.memory_bytes is not None
        assert model.memory_bytes > 1e6
    assert not (tmp_path / "profile.json.partial").exists()
