from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import onnx
import onnxruntime as ort
import pytest
from click.testing import CliRunner, Result

from cascadeserve.errors import ExportRefused, UsageError
from export.cli import export

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = pytest.mark.torch
ROOT = Path(__file__).parents[2]
MODULE = """
from tests.export.tiny_torch import Around, deep, family_of, linear, model_of

def mixing():
    return Around(lambda layer, x: layer(x - x.mean(0, keepdim=True)))

good = family_of(model_of(name="first"), model_of(name="second", max_batch_size=4))
variants = family_of(
    model_of(deep, name="float"),
    *(model_of(deep, name=variant, variant=variant) for variant in ("fp16", "int8", "optimised")),
)
shallow = family_of(model_of(name="shallow", variant="int8"))
bad = family_of(model_of(name="first"), model_of(mixing, name="mixing"), model_of(name="last"))
"""


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "export_cli_families.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(ROOT)])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield tmp_path / "repository"
    sys.modules.pop("export_cli_families", None)


def run(reference: str, repository: Path, *arguments: str) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(export, [reference, "--repository", str(repository), *arguments])


def models(repository: Path) -> list[str]:
    return sorted(path.name for path in repository.iterdir())


def test_a_family_is_written_and_the_second_time_nothing_changes(repository: Path) -> None:
    first = run("export_cli_families:good", repository)
    assert first.exit_code == 0, first.output
    assert models(repository) == ["first", "second"]
    assert "unchanged" not in first.output
    path = repository / "second" / "1" / "model.onnx"
    written = path.stat().st_mtime_ns
    ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    second = run("export_cli_families:good", repository)
    assert second.exit_code == 0
    assert second.output.count("unchanged") == 2
    assert path.stat().st_mtime_ns == written


def test_variants_are_written_as_models_of_their_own_and_named_in_the_table(repository: Path) -> None:
    first = run("export_cli_families:variants", repository)
    assert first.exit_code == 0, first.output
    names = ["float", "fp16", "int8", "optimised"]
    assert models(repository) == names
    files = {name: (repository / name / "1" / "model.onnx").read_bytes() for name in names}
    assert len(set(files.values())) == 4
    kinds = {
        name: {tensor.data_type for tensor in onnx.load_model_from_string(content).graph.initializer}
        for name, content in files.items()
    }
    assert onnx.TensorProto.FLOAT16 in kinds["fp16"]
    assert onnx.TensorProto.INT8 in kinds["int8"]
    columns = [[cell.strip() for cell in line.split("│")] for line in first.output.splitlines() if "│" in line]
    assert [row[1:3] for row in columns] == [["float", ""], *([name, name] for name in names[1:])]
    assert run("export_cli_families:variants", repository).output.count("unchanged") == 4


def test_a_variant_that_cannot_be_made_is_refused_by_name(repository: Path) -> None:
    result = run("export_cli_families:shallow", repository)
    assert isinstance(result.exception, ExportRefused)
    assert str(result.exception).startswith("shallow: INT8 leaves the last layer in float")
    assert not repository.exists()


def test_unless_every_model_passes_nothing_is_written(repository: Path) -> None:
    result = run("export_cli_families:bad", repository)
    assert isinstance(result.exception, ExportRefused)
    assert str(result.exception).startswith("mixing: ")
    assert not repository.exists()


def test_a_refused_model_leaves_what_stood_there_before(repository: Path) -> None:
    old = repository / "mixing" / "1" / "model.onnx"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"old")
    assert isinstance(run("export_cli_families:bad", repository).exception, ExportRefused)
    assert old.read_bytes() == b"old"


def test_a_family_that_does_not_exist_makes_no_repository(repository: Path) -> None:
    result = run("export_cli_families:absent", repository)
    assert isinstance(result.exception, UsageError)
    assert not repository.exists()


@pytest.mark.parametrize("tolerance", ["0", "-1", "much"])
def test_a_tolerance_that_is_not_above_zero_is_a_usage_error(repository: Path, tolerance: str) -> None:
    result = run("export_cli_families:good", repository, "--tolerance", tolerance)
    assert result.exit_code == 2
    assert "--tolerance" in result.output
    assert not repository.exists()


def test_an_unknown_family_ends_the_command_with_status_2_and_one_sentence(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "cascadeserve", "export", "no_such_family:family", "--repository", "models"]
    done = subprocess.run(command, cwd=tmp_path, check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("Error: 'no_such_family:family': there is no module")
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []
