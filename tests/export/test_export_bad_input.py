"""What can be wrong with a family file, its rows and its models: one sentence, status 1 or 2, nothing written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import nn

from cascadeserve import cli
from tests.export.model_files import X, family_toml, onnx_file, onnx_text, rows_file, torch_export, torchscript

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.torch

IDENTITY = "g (float[n, 4] x) => (float[n, 3] y) <float[4, 3] w = {1,2,3, 4,5,6, 0,1,0, 3,1,2}> { y = MatMul (x, w) }"


class Inverse(nn.Module):
    """Holds an operator that has no form in ONNX."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(torch.special.bessel_j0(x))


class Several(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x, x


def text(content: str, **model: Any) -> Callable[[Path], dict[str, Any]]:
    return lambda folder: {"file": onnx_text(folder / "small.onnx", content).name} | model


def raw(name: str, content: bytes | None) -> Callable[[Path], dict[str, Any]]:
    def prepare(folder: Path) -> dict[str, Any]:
        if content is not None:
            (folder / name).write_bytes(content)
        return {"file": name}

    return prepare


def cut_short(folder: Path) -> dict[str, Any]:
    path = onnx_file(folder / "small.onnx")
    path.write_bytes(path.read_bytes()[:-200])
    return {"file": path.name}


def state_dict(folder: Path) -> dict[str, Any]:
    torch.save(nn.Linear(4, 3).state_dict(), folder / "small.pt")
    return {"file": "small.pt"}


# what is wrong -> (the model, changes of the family file, changes of the rows, status, words of the sentence)
CASES: dict[str, tuple[Callable[[Path], dict[str, Any]], dict[str, Any], dict[str, Any], int, list[str]]] = {
    "missing output": (
        text(IDENTITY, output_name="logits"), {}, {}, 2, ["small: ", "small.onnx: the model has no output 'logits'"],
    ),
    "several outputs": (
        text("g (float[n, 4] x) => (float[n, 4] a, float[n, 4] b) { a = Identity (x) b = Identity (x) }"),
        {}, {}, 2, ["has the outputs a, b: say by output_name"],
    ),
    "a fixed axis stated as open": (
        text(IDENTITY), {"input": {"shape": [-1]}}, {}, 2, ["the input 'x' of ", "is FP32 [n, 4], but the", "[n, -1]"],
    ),
    "another fixed axis": (
        text(IDENTITY), {"input": {"shape": [5]}}, {"input:x": np.zeros((700, 5), np.float32)},
        2, ["is FP32 [n, 4], but the family states FP32 [n, 5]; make them agree"],
    ),
    "open axes that the layers behind do not take": (
        text(IDENTITY.replace("[n, 4] x", "[n, width] x")), {"input": {"shape": [5]}},
        {"input:x": np.zeros((700, 5), np.float32)}, 1, ["small: ONNX Runtime does not run it on rows of the stated"],
    ),
    "another number of axes": (
        text(IDENTITY), {"input": {"shape": [2, 2]}}, {"input:x": X.reshape(-1, 2, 2)}, 2, ["states FP32 [n, 2, 2]"],
    ),
    "fixed batch": (text(IDENTITY.replace("[n, 4]", "[1, 4]")), {}, {}, 2, ["'x' is fixed to a batch of 1: export"]),
    "fixed batch of a program": (
        lambda folder: {"file": torch_export(folder / "small.pt2", fixed=True).name},
        {}, {}, 2, ["'x' of ", "is fixed to a batch of 2: export it with dynamic_shapes"],
    ),
    "ONNX operator that nobody knows": (
        text("g (float[n, 4] x) => (float[n, 3] y) { y = mine.Magic (x) }"),
        {}, {}, 1, ["small: ONNX Runtime, which serves it, does not take", "Magic"],
    ),
    "PyTorch operator that ONNX lacks": (
        lambda folder: {"file": torchscript(folder / "small.ts", Inverse, trace=True).name},
        {}, {}, 1, ["small: cannot be written as ONNX", "bessel_j0"],
    ),
    "two outputs of a module": (
        lambda folder: {"file": torchscript(folder / "small.pt", Several).name},
        {}, {}, 1, ["small: returns a tuple, but one tensor [n, classes] is needed"],
    ),
    "rows of another dtype": (
        text(IDENTITY), {}, {"input:x": X.astype(np.float64)}, 2,
        ["rows.npz: input:x: is float64 [700, 4], but the family states FP32"],
    ),
    "graph of another dtype": (
        text(IDENTITY), {"input": {"datatype": "FP64"}}, {"input:x": X.astype(np.float64)}, 2,
        ["is FP32 [n, 4], but the family states FP64 [n, 4]"],
    ),
    "program of another dtype": (
        lambda folder: {"file": torch_export(folder / "small.pt2").name},
        {"input": {"datatype": "FP64"}}, {"input:x": X.astype(np.float64)}, 2, ["is FP32 [n, 4], but the"],
    ),
    "TorchScript of another dtype": (
        lambda folder: {"file": torchscript(folder / "small.pt").name},
        {"input": {"datatype": "FP64"}}, {"input:x": X.astype(np.float64)}, 1,
        ["small: PyTorch does not run it on rows of the stated inputs (", "dtype"],
    ),
    "another name of the input": (
        text(IDENTITY), {"input": {"name": "y"}}, {"input:y": X, "input:x": None}, 2, ["has the inputs 'x', the"],
    ),
    "no labels": (
        text(IDENTITY, temperature="fit"), {}, {"label": None}, 2,
        ["rows.npz: label: is missing; the temperature of small is fitted to rows with labels"],
    ),
    "labels of other classes": (text(IDENTITY), {"classes": 2}, {}, 2, ["rows.npz: label: runs from 0 to 2, but"]),
    "another number of classes": (
        text(IDENTITY), {"classes": 5}, {}, 1, ["small: returns logits of shape [256, 3]", "the family has 5 classes"],
    ),
    "probabilities taken for logits": (
        text(IDENTITY.replace("y = MatMul (x, w)", "z = MatMul (x, w) y = Softmax (z)")), {}, {}, 2,
        ["small: the output 'y' holds probabilities"],
    ),
    "missing model file": (raw("small.onnx", None), {}, {}, 2, ["small.onnx: cannot be read (No such file"]),
    "wrong suffix": (
        raw("small.h5", b""), {}, {}, 2, ["family.toml: $.models[0]: model", "small.h5 does not end in .onnx"],
    ),
    "no suffix": (raw("small", b""), {}, {}, 2, ["$.models[0]", "small does not end in .onnx"]),
    "no ONNX file": (raw("small.onnx", b"certainly no model"), {}, {}, 2, ["small.onnx: is no ONNX file"]),
    "empty ONNX file": (raw("small.onnx", b""), {}, {}, 2, ["small.onnx: is no ONNX file"]),
    "ONNX file cut short": (cut_short, {}, {}, 2, ["small.onnx: is no ONNX file, or a damaged one; export the"]),
    "no TorchScript file": (raw("small.pt", b"no zip"), {}, {}, 2, ["small.pt: is no TorchScript file, or a damaged"]),
    "weights alone": (state_dict, {}, {}, 2, ["small.pt: is no TorchScript file", "weights alone hold no model"]),
    "no program": (raw("small.pt2", b"no zip"), {}, {}, 2, ["small.pt2: is no torch.export file, or a damaged"]),
    "missing rows": (text(IDENTITY), {"rows": "absent.npz"}, {}, 2, ["absent.npz: cannot be read (No such file"]),
    "too few rows": (
        text(IDENTITY), {}, {"input:x": X[:100], "label": None}, 2, ["rows.npz: holds 100 rows, but 256 to check the"],
    ),
    "too few rows for scales": (
        text(IDENTITY, variant="int8"), {}, {"input:x": X[:300], "label": None}, 2,
        ["holds 300 rows, but 256 to check the models and 128 others for INT8 scales are needed"],
    ),
    "unknown key": (text(IDENTITY, heads=1), {}, {}, 2, ["family.toml: $.models[0]: ", "`heads`"]),
    "unknown certainty": (
        text(IDENTITY, certainty="entropy"), {}, {}, 2,
        ["$.models[0].certainty: Invalid enum value 'entropy'; it can be margin, max_probability, negative_entropy"],
    ),
    "unknown variant": (
        text(IDENTITY, variant="int4"), {}, {}, 2,
        ["$.models[0].variant: Invalid enum value 'int4'; it can be fp16, int8, optimised, tensorrt"],
    ),
    "dynamic INT8": (
        text(IDENTITY, variant="dynamic_int8"), {}, {}, 2,
        ["$.models[0].variant: there is no", "would depend on the other rows", "choose one of fp16, int8, optimised"],
    ),
    "input without an axis": (
        text(IDENTITY), {"input": {"shape": []}}, {}, 2, ["family.toml: $.inputs[0].shape: is []; give one or more"],
    ),
    "input of nothing": (
        text(IDENTITY), {"input": {"shape": [0]}}, {}, 2, ["family.toml: $.inputs[0].shape: is [0]; give one or more"],
    ),
    "no rows at all": (
        text(IDENTITY), {}, {"input:x": np.zeros((0, 4), np.float32), "label": None}, 2,
        ["rows.npz: input:x: holds no rows: its shape is (0, 4)"],
    ),
    "temperature of zero": (text(IDENTITY, temperature=0.0), {}, {}, 2, ["family.toml: $.models[0]: temperature must"]),
    "temperature that is a word": (
        text(IDENTITY, temperature="fitted"), {}, {}, 2, ["family.toml: $.models[0].temperature: "],
    ),
    "output name of a PyTorch file": (
        lambda folder: {"file": torchscript(folder / "small.pt").name, "output_name": "y"},
        {}, {}, 2, ["$.models[0]: model 'small': output_name chooses an output of an .onnx file"],
    ),
    "unknown version": (
        text(IDENTITY), {"schema_version": 2}, {}, 2, ["$.schema_version: Invalid enum value 2; it can be 1"],
    ),
}  # fmt: skip


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """Exit status and the one line on standard error."""
    with pytest.raises(SystemExit) as ended:
        cli.main(arguments)
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = [line for line in captured.err.splitlines() if line.strip()]
    assert line.startswith("Error: ")
    return int(str(ended.value.code)), line


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_refused_in_one_sentence_and_nothing_is_written(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prepare, changes, rows, wanted, words = CASES[case]
    model = {"name": "small", "max_batch_size": 8} | prepare(tmp_path)
    rows_file(tmp_path / "rows.npz", **rows)
    path = family_toml(tmp_path / "family.toml", model, **changes)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    status, line = refusal(["export", str(path), "--repository", str(tmp_path / "models")], capsys)
    assert status == wanted, line
    for part in words:
        assert part in line
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def good_family(folder: Path) -> Path:
    onnx_file(folder / "small.onnx")
    rows_file(folder / "rows.npz")
    return family_toml(folder / "family.toml", {"name": "small", "file": "small.onnx", "max_batch_size": 8})


def test_a_repository_that_cannot_be_written_to_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = good_family(tmp_path)
    status, line = refusal(["export", str(path), "--repository", str(path / "models")], capsys)
    assert status == 1
    assert line.startswith(f"Error: small: cannot be written ({path / 'models'}: ")


def test_a_full_disk_leaves_the_model_that_stood_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = good_family(tmp_path)
    old = tmp_path / "models" / "small" / "1" / "model.onnx"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"old")

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    status, line = refusal(["export", str(path), "--repository", str(tmp_path / "models")], capsys)
    assert (status, "No space left on device" in line) == (1, True)
    assert old.read_bytes() == b"old"
    assert [file.name for file in (tmp_path / "models").iterdir()] == ["small"]


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ("absent.toml", "absent.toml: cannot be read (No such file or directory)"),
        ("models.py", "'models.py' is Python: name the family in it, such as models:family"),
        ("small.onnx", "small.onnx: "),
    ],
)
def test_a_reference_that_is_no_family_file_is_refused(
    reference: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models.py").write_text("family = None")
    onnx_text(tmp_path / "small.onnx", IDENTITY)
    status, line = refusal(["export", reference, "--repository", "models"], capsys)
    assert (status, words in line) == (2, True), line
