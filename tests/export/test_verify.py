from __future__ import annotations

import asyncio
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from cascadeserve.errors import CascadeServeError, ExportRefused, InvalidArtefact, ServerStartFailed, UsageError
from export import verify_cli
from export.cli import export
from export.family import NUM_PARITY_ROWS
from export.repository import write_model
from export.served import ServedModels
from export.verify import Measured, expected_answers, measure, sample_rows, verdict
from tests.export.tiny_torch import SERVED, around, exported, family_of, model_of, with_weights
from tests.fakes.servers import is_alive, server_pid

if TYPE_CHECKING:
    from collections.abc import Callable

    from export.family import FamilyModel, Variant
    from export.parity import Outputs

pytestmark = pytest.mark.torch
ROOT = Path(__file__).parents[2]
FAMILY = "tests.export.tiny_torch:SERVED"
TOLERANCE = 1e-4

# --- measuring and judging --------------------------------------------------------------------------------------------

MODEL = model_of()
ROWS = sample_rows(family_of(MODEL))
EXPECTED = expected_answers(family_of(MODEL), MODEL, ROWS)
BY_CONTENT = {row.tobytes(): i for i, row in enumerate(ROWS["x"])}


def answers_to(rows: Outputs) -> Outputs:
    """The source's answers to rows of the sample; rows that are none of them are answered as the first."""
    places = [BY_CONTENT.get(row.tobytes(), 0) for row in rows["x"]]
    return {name: array[places].copy() for name, array in EXPECTED.items()}


def measured(change: Callable[[Outputs, int], Any], model: FamilyModel = MODEL) -> Measured:
    """A served model that answers as its source but for a change, which is told how many rows came together."""

    def run(rows: Outputs, size: int) -> Outputs:
        answers = answers_to(rows)
        changed = change(answers, size)
        return answers if changed is None else changed

    return measure(model, EXPECTED, run, ROWS, TOLERANCE)


def moved(by: float) -> Callable[[Outputs, int], None]:
    def change(answers: Outputs, _: int) -> None:
        answers["scores"][:, 0] += np.float32(by)

    return change


def test_a_model_that_answers_as_its_source_passes() -> None:
    found = measured(lambda _, __: None)
    assert found == Measured(0.0, 0.0, 1.0, 0, 0.0)
    assert verdict(MODEL, found, TOLERANCE) is None


@pytest.mark.parametrize(("by", "passes"), [(TOLERANCE / 2, True), (TOLERANCE * 2, False), (float("nan"), False)])
def test_scores_are_held_to_the_tolerance(by: float, passes: bool) -> None:
    problem = verdict(MODEL, measured(moved(by)), TOLERANCE)
    assert (problem is None) == passes
    assert passes or str(problem).startswith("scores differ from the source's by up to ")


def test_a_certainty_that_is_not_the_sources_fails() -> None:
    def change(answers: Outputs, _: int) -> None:
        answers["certainty"] += np.float32(0.01)

    assert "scores differ" in str(verdict(MODEL, measured(change), TOLERANCE))


def test_other_labels_fail_though_the_scores_agree() -> None:
    def change(answers: Outputs, _: int) -> None:
        answers["label"] += 1

    found = measured(change)
    assert (found.label_agreement, found.max_abs_error) == (0.0, 0.0)
    assert found.wrong_labels > NUM_PARITY_ROWS * 0.9
    assert str(verdict(MODEL, found, TOLERANCE)).startswith(f"{found.wrong_labels} of {NUM_PARITY_ROWS} labels differ")


def test_an_answer_that_changes_with_its_batch_fails_though_full_batches_agree() -> None:
    def change(answers: Outputs, size: int) -> None:
        if size == 3:
            answers["scores"] += np.float32(TOLERANCE / 2)

    found = measured(change)
    assert found.max_abs_error == 0.0
    assert "changes" not in str(verdict(MODEL, found, 10 * TOLERANCE)), "a tenth of the tolerance is allowed"
    assert str(verdict(MODEL, found, TOLERANCE)).startswith("a row's scores change by up to 5.00e-05 with the rows")


def test_no_batch_is_larger_than_the_model_takes() -> None:
    sizes: set[int] = set()
    measured(lambda _, size: sizes.add(size), model_of(max_batch_size=2))
    assert sizes == {1, 2}


@pytest.mark.parametrize("variant", ["int8", "fp16", "tensorrt"])
def test_a_variant_is_held_within_its_limits(variant: Variant) -> None:
    model = model_of(variant=variant)
    assert verdict(model, measured(moved(0.003), model), TOLERANCE) is None
    problem = str(verdict(model, measured(moved(0.3), model), TOLERANCE))
    assert f"with scores 3.00e-01 off on average, wanted of {variant} are 0.9" in problem


def test_a_model_that_keeps_its_scores_to_itself_is_held_to_its_certainties() -> None:
    def without(answers: Outputs, _: int) -> Outputs:
        return {name: array for name, array in answers.items() if name != "scores"}

    assert verdict(MODEL, measured(without), TOLERANCE) is None

    def wrong(answers: Outputs, size: int) -> Outputs:
        return {name: array * np.float32(0.5) for name, array in without(answers, size).items()}

    assert "scores differ" in str(verdict(MODEL, measured(wrong), TOLERANCE))


def test_outputs_of_another_shape_are_named() -> None:
    def change(answers: Outputs, _: int) -> None:
        answers["scores"] = answers["scores"][:, :2]

    with pytest.raises(ExportRefused, match=r"^tiny: its scores are \[256, 2\], the source's are \[256, 3\]"):
        measured(change)


def test_a_source_that_fails_is_one_sentence() -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("no such layer\nat line 3")

    model = model_of(around(fail), name="broken")
    with pytest.raises(ExportRefused, match=r"^broken: PyTorch does not run it .*\(no such layer\)"):
        expected_answers(family_of(model), model, ROWS)


# --- the command, up to the server ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def exported_family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "repository"
    result = CliRunner().invoke(export, [FAMILY, "--repository", str(folder)])
    assert result.exit_code == 0, result.output
    return folder


@pytest.fixture
def repository(exported_family: Path, tmp_path: Path) -> Path:
    """A copy of the exported family, to be damaged."""
    return Path(shutil.copytree(exported_family, tmp_path / "repository"))


def run(repository: Path, *options: str, family: str = FAMILY) -> Result:
    arguments = [family, f"--repository={repository}", *options]
    return CliRunner(env={"COLUMNS": "200"}).invoke(verify_cli.verify, arguments)


def refusal(result: Result, kind: type[CascadeServeError]) -> str:
    assert type(result.exception) is kind, result.output
    text = str(result.exception)
    assert "\n" not in text
    return text


@pytest.fixture
def no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify_cli, "LocalTriton", None)


@pytest.mark.usefixtures("no_server")
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--model=fourth"], "--model: 'fourth' is not in family 'tiny'; models are first, second, third"),
        (["--url=elsewhere"], "--url: 'elsewhere' is no address; give host and port of Triton's gRPC service"),
    ],
)
def test_a_wrong_call_is_refused(repository: Path, options: list[str], words: str) -> None:
    assert refusal(run(repository, *options), UsageError) == words


@pytest.mark.usefixtures("no_server")
def test_a_repository_that_is_none_is_refused(tmp_path: Path) -> None:
    assert "is no folder" in refusal(run(tmp_path / "absent"), InvalidArtefact)


@pytest.mark.usefixtures("no_server")
def test_a_model_of_the_family_that_the_repository_lacks_is_named(repository: Path) -> None:
    shutil.rmtree(repository / "second")
    assert refusal(run(repository), ExportRefused).startswith(f"second: {repository} holds no such model; export")


@pytest.mark.usefixtures("no_server")
@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            'parameters { key: "intra_op_threads" value { string_value: "1" } }',
            'parameters["intra_op_threads"]: the native onnxruntime backend does not read this parameter',
        ),
        ("optimization { cuda { graphs: true } }", "optimization.cuda: the native onnxruntime backend does not read"),
        ("max_batch_sice: 8", "is no Triton model config"),
    ],
)
def test_a_config_with_a_field_that_nobody_reads_is_refused_before_any_server_starts(
    repository: Path, text: str, words: str
) -> None:
    path = repository / "second" / "config.pbtxt"
    path.write_text(path.read_text() + text)
    result = run(repository)
    problem = refusal(result, ExportRefused)
    assert problem.startswith(f"{path}: ")
    assert words in problem
    assert "second/config.pbtxt: error: " in result.output


@pytest.mark.usefixtures("no_server")
def test_a_config_without_an_output_is_refused(repository: Path) -> None:
    path = repository / "first" / "config.pbtxt"
    path.write_text(path.read_text().replace('name: "certainty"', 'name: "sureness"'))
    assert 'a stage has an output "certainty"' in refusal(run(repository), ExportRefused)


@pytest.mark.usefixtures("no_server")
@pytest.mark.parametrize("options", [["--model=first"], []])
def test_a_model_made_for_tensorrt_is_not_checked_on_a_cpu(
    repository: Path, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(name="first", variant="tensorrt")
    write_model(repository, SERVED, model, (repository / "first" / "1" / "model.onnx").read_bytes())
    monkeypatch.setattr(verify_cli, "load_family", lambda _: family_of(model))
    assert "'first' is made for TensorRT, which needs a GPU; give --url" in refusal(
        run(repository, *options), UsageError
    )


def test_nobody_at_the_address_is_one_sentence(repository: Path) -> None:
    (port,) = verify_cli.free_ports(1)
    text = refusal(run(repository, f"--url=127.0.0.1:{port}"), ServerStartFailed)
    assert text.startswith(f"no Triton answers at 127.0.0.1:{port} (")


# --- on a real Triton -------------------------------------------------------------------------------------------------


def table(result: Result) -> dict[str, tuple[str, str]]:
    """Model -> version and verdict."""
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in result.output.splitlines() if "│" in line]
    return {row[0]: (row[1], row[-1]) for row in rows}


@pytest.mark.triton
@pytest.mark.timeout(180)
def test_the_example_repository_passes() -> None:
    result = run(ROOT / "model_repository", family="examples.digits.family:family")
    assert result.exit_code == 0, result.output
    names = ("digits_linear", "digits_mlp", "digits_cnn", "digits_resnet_int8", "digits_resnet")
    assert table(result) == dict.fromkeys(names, ("1", "ok"))


@pytest.mark.triton
@pytest.mark.timeout(120)
def test_every_model_is_checked_and_the_first_that_fails_is_named(repository: Path) -> None:
    first = repository / "first" / "1" / "model.onnx"
    good = first.read_bytes()
    first.write_bytes(with_weights(good, lambda weights: -weights))
    write_model(repository, SERVED, SERVED.models[0], good, 2)
    exchanged = exported(model_of(name="second"))[2]
    (repository / "second" / "1" / "model.onnx").write_bytes(exchanged)
    (repository / "third" / "1" / "model.onnx").write_bytes(b"no model")
    before = {path: path.stat().st_mtime_ns for path in repository.rglob("*")}
    result = run(repository)
    assert refusal(result, ExportRefused).startswith("second version 1: scores differ from the source's by up to ")
    assert table(result) == {"first": ("2", "ok"), "second": ("1", "failed"), "third": ("", "failed")}
    assert {path: path.stat().st_mtime_ns for path in repository.rglob("*")} == before

    text = refusal(run(repository, "--model=third"), ExportRefused)
    assert text.startswith("third: is not loaded by the Triton at 127.0.0.1:")
    assert "model.onnx" in text


@pytest.mark.triton
@pytest.mark.timeout(120)
def test_a_triton_that_runs_elsewhere_is_verified_by_its_address(repository: Path, tmp_path: Path) -> None:
    good = (repository / "first" / "1" / "model.onnx").read_bytes()
    write_model(repository, SERVED, SERVED.models[0], with_weights(good, lambda weights: -weights), 2)
    results: list[Result] = []
    answers: list[Any] = []

    def check(address: str) -> list[Any]:
        served = ServedModels(address)
        served.load("second")
        served.load("first")
        answers.extend(
            served.answer("first", version, SERVED.inputs, ("scores",), ROWS, 8)["scores"] for version in ("1", "2")
        )
        results.append(run(repository, f"--url={address}", "--model=second"))
        results.append(run(repository, f"--url={address}"))
        served.close()
        return []

    asyncio.run(verify_cli._serve(repository, tmp_path / "state", check))
    alone, both = results
    assert (alone.exit_code, table(alone)) == (0, {"second": ("1", "ok")}), alone.output
    assert table(both) == {"first": ("2", "failed"), "second": ("1", "ok"), "third": ("", "failed")}
    assert refusal(both, ExportRefused).startswith("first version 2: scores differ from the source's")
    np.testing.assert_allclose(answers[0], EXPECTED["scores"], atol=1e-5)
    assert np.abs(answers[1] - EXPECTED["scores"]).max() > 0.1, "each version answers as itself"


@pytest.mark.triton
@pytest.mark.timeout(120)
def test_models_made_for_tensorrt_are_left_out_on_a_cpu_and_the_others_are_checked(repository: Path) -> None:
    write_model(
        repository,
        SERVED,
        model_of(name="third", variant="tensorrt"),
        (repository / "third" / "1" / "model.onnx").read_bytes(),
    )
    result = run(repository)
    assert result.exit_code == 0, result.output
    assert table(result) == {
        "first": ("1", "ok"), "second": ("1", "ok"), "third": ("", "needs a GPU, not checked"),
    }  # fmt: skip


@pytest.mark.triton
@pytest.mark.timeout(120)
def test_a_server_that_does_not_start_is_one_sentence_with_its_reason(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ports = [taken.getsockname()[1], *verify_cli.free_ports(2)]
        monkeypatch.setattr(verify_cli, "free_ports", lambda _: ports)
        text = refusal(run(repository), ServerStartFailed)
    assert text.startswith(f"endpoint 'verify': its http address 127.0.0.1:{ports[0]} cannot be listened on (")


@pytest.mark.triton
@pytest.mark.timeout(120)
def test_ctrl_c_ends_it_and_the_server_and_leaves_nothing(repository: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cascadeserve", "verify", FAMILY, f"--repository={repository}"]
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=os.environ | {"TMPDIR": str(temporary)}, stdout=log, stderr=log
        )
    try:
        server = wait_for_server(process)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130, (tmp_path / "log").read_text()
    finally:
        process.kill()
        process.wait()
    assert not is_alive(server)
    assert (tmp_path / "log").read_text().splitlines()[-1] == "interrupted"
    assert list(temporary.iterdir()) == []


def wait_for_server(process: subprocess.Popen[bytes]) -> int:
    give_up_s = time.monotonic() + 90
    while time.monotonic() < give_up_s:
        try:
            return server_pid(SimpleNamespace(pid=process.pid))  # type: ignore[arg-type]  # asks for no more
        except AssertionError:
            assert process.poll() is None
            time.sleep(0.1)
    raise AssertionError("no tritonserver was started")
