from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from cascadeserve.cli import main
from planner.records_files import read_calibration, read_held_out, read_search

if TYPE_CHECKING:
    from pathlib import Path

ROWS = 200


@pytest.fixture
def import_file(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "p.npz", label=rng.integers(0, 3, ROWS), small=rng.normal(size=(ROWS, 3)))
    lines = ["label,sure", *(f"{rng.integers(0, 3)},{rng.random():.4f}" for _ in range(ROWS))]
    (tmp_path / "large.csv").write_text("\n".join(lines) + "\n")
    path = tmp_path / "import.toml"
    path.write_text(
        'schema_version = 1\nfamily = "made"\ntruth = { file = "p.npz", name = "label" }\n'
        '[[models]]\nname = "small"\nscores = { file = "p.npz", name = "small" }\nscale = "logits"\n'
        '[[models]]\nname = "large"\nlabel = { file = "large.csv", name = "label" }\n'
        'certainty = { file = "large.csv", name = "sure" }\n'
    )
    return path


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_three_files_share_out_the_rows(import_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "records"
    main(["import-records", str(import_file), f"--output={output}", "--fractions=0.5,0.25,0.25"])
    search, calibration = read_search(output / "search.npz"), read_calibration(output / "calibration.npz")
    held_out = read_held_out(output / "test.npz")
    assert [len(search), len(calibration), len(held_out)] == [100, 50, 50]
    assert list(search.models) == ["small", "large"]


def test_records_are_never_overwritten(import_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["import-records", str(import_file), f"--output={tmp_path / 'records'}"]
    main(arguments)
    assert "is not overwritten" in refusal(arguments, capsys)


def test_what_is_wrong_is_said_with_path_and_field(
    import_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["import-records", str(import_file), f"--output={tmp_path / 'records'}"]
    assert "three shares" in refusal([*arguments, "--fractions=1"], capsys)
    csv = tmp_path / "large.csv"
    lines = csv.read_text().splitlines()
    csv.write_text("\n".join([lines[0], lines[1].split(",")[0] + ",nan", *lines[2:]]) + "\n")
    assert "NaN" in refusal(arguments, capsys)
    csv.write_text("\n".join(lines[:100]) + "\n")
    assert "rows" in refusal(arguments, capsys)
    assert not (tmp_path / "records").exists()
