"""Models that a person has already: files of three kinds and a family file, through the command."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from click.testing import CliRunner, Result

from cascadeserve.errors import ExportRefused
from cascadeserve.triton_config import read_config
from export.cli import export
from export.family import FamilyModel, Head
from export.family_file import read_family
from export.heads import answers_of
from export.sources import open_source
from export.temperature import fit_temperature, with_fitted_temperature
from tests.export.model_files import (
    NUM_ROWS,
    X,
    family_toml,
    onnx_file,
    onnx_text,
    rows_file,
    torch_export,
    torchscript,
)
from tests.export.tiny_torch import ROWS, deep, family_of, linear

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import nn

pytestmark = pytest.mark.torch

SMALL: dict[str, Any] = {"name": "small", "file": "small.onnx", "max_batch_size": 8}
FILES: dict[str, Callable[[Path, Any], Path]] = {
    "model.onnx": onnx_file,
    "scripted.pt": torchscript,
    "traced.ts": lambda path, build: torchscript(path, build, trace=True),
    "program.pt2": torch_export,
}


def run(reference: Path | str, repository: Path, *arguments: str) -> Result:
    done = CliRunner(env={"COLUMNS": "200"}).invoke(
        export, [str(reference), "--repository", str(repository), *arguments]
    )
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done


def served(repository: Path, name: str, rows: Any = X) -> dict[str, Any]:
    session = ort.InferenceSession(repository / name / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {"x": rows}), strict=True))


def logits_of(build: Callable[[], nn.Module]) -> Any:
    with torch.inference_mode():
        return build().eval()(torch.from_numpy(X)).numpy()


def table(output: str) -> dict[str, list[str]]:
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if "│" in line]
    return {row[0]: row[1:] for row in rows}


@pytest.mark.parametrize("build", [linear, deep])
@pytest.mark.parametrize("file", FILES)
def test_a_model_file_of_every_kind_answers_as_the_module_it_was_made_of(
    file: str, build: Callable[[], nn.Module], tmp_path: Path
) -> None:
    FILES[file](tmp_path / file, build)
    rows_file(tmp_path / "rows.npz")
    path = family_toml(tmp_path / "family.toml", {"name": "mine", "file": file, "max_batch_size": 8})
    assert run(path, tmp_path / "models").exit_code == 0
    found, wanted = served(tmp_path / "models", "mine"), answers_of(logits_of(build), Head())
    np.testing.assert_array_equal(found["label"], wanted["label"])
    for name in ("scores", "certainty"):
        np.testing.assert_allclose(found[name], wanted[name], atol=1e-6)
    assert onnx.load(tmp_path / "models" / "mine" / "1" / "model.onnx").ir_version <= 9
    assert run(path, tmp_path / "models").output.count("unchanged") == 1


@pytest.mark.parametrize("file", FILES)
def test_no_word_of_the_machine_a_file_was_made_on_stands_in_the_served_model(file: str, tmp_path: Path) -> None:
    model = FamilyModel(name="mine", file=FILES[file](tmp_path / file, deep), max_batch_size=8)
    written = open_source(family_of(model), model).onnx_model().SerializeToString()
    for trace in (sys.prefix, str(tmp_path), str(Path.cwd()), ".py"):
        assert trace.encode() not in written


def test_heads_and_variants_are_chosen_model_by_model(tmp_path: Path) -> None:
    onnx_file(tmp_path / "deep.onnx", deep)
    rows_file(tmp_path / "rows.npz")
    heads = [
        {"certainty": "margin"},
        {"certainty": "max_probability", "temperature": 2.5},
        {"certainty": "negative_entropy", "keep_scores": False},
        {"variant": "int8", "temperature": 2.5},
        {"variant": "fp16", "keep_scores": False},
        {"variant": "optimised", "certainty": "max_probability"},
    ]
    models = [{"name": f"m{i}", "file": "deep.onnx", "max_batch_size": 8} | head for i, head in enumerate(heads)]
    done = run(family_toml(tmp_path / "family.toml", *models), tmp_path / "models")
    assert [table(done.output)[f"m{i}"][:2] for i in range(6)] == [
        [str(head.get("variant", "")), f"{head.get('temperature', 1.0):g}"] for head in heads
    ]
    for i, stated in enumerate(heads):
        head = Head(**{key: value for key, value in stated.items() if key != "variant"})
        found, wanted = served(tmp_path / "models", f"m{i}"), answers_of(logits_of(deep), head)
        error = {"int8": 0.05, "fp16": 5e-3}.get(str(stated.get("variant")), 1e-5)
        np.testing.assert_allclose(found["certainty"], wanted["certainty"], atol=error)
        assert ("scores" in found) == head.keep_scores
        config = read_config(tmp_path / "models" / f"m{i}" / "config.pbtxt")
        assert [output.name for output in config.output] == list(found)


def test_a_model_that_gives_probabilities_and_more_is_told_which_output_counts(tmp_path: Path) -> None:
    onnx_text(
        tmp_path / "small.onnx",
        "g (float[n, 4] x) => (float[n, 3] p, float[n, 3] hidden) <float[4, 3] w = {1,2,3, 4,5,6, 0,1,0, 3,1,2}>"
        "{ hidden = MatMul (x, w) p = Softmax (hidden) }",
    )
    rows_file(tmp_path / "rows.npz")
    small = SMALL | {"output": "probabilities", "output_name": "p", "temperature": 3.0}
    assert run(family_toml(tmp_path / "family.toml", small), tmp_path / "models").exit_code == 0
    w = np.array([[1, 2, 3], [4, 5, 6], [0, 1, 0], [3, 1, 2]], np.float32)
    wanted = answers_of(X @ w, Head(temperature=3.0))
    np.testing.assert_allclose(served(tmp_path / "models", "small")["scores"], wanted["scores"], atol=1e-5)


@pytest.mark.parametrize("output", ["logits", "probabilities"])
def test_a_temperature_is_fitted_to_the_labelled_rows_and_shown(output: str, tmp_path: Path) -> None:
    tail = "y = Softmax (z)" if output == "probabilities" else "y = Identity (z)"
    onnx_text(
        tmp_path / "small.onnx",
        "g (float[n, 4] x) => (float[n, 3] y) <float[4, 3] w = {1,2,3, 4,5,6, 0,1,0, 3,1,2}>"
        f"{{ z = MatMul (x, w) {tail} }}",
    )
    logits = X @ np.array([[1, 2, 3], [4, 5, 6], [0, 1, 0], [3, 1, 2]], np.float32)
    label = (logits / 2 + np.random.default_rng(0).gumbel(size=logits.shape)).argmax(1)
    rows_file(tmp_path / "rows.npz", label=label, group=np.arange(NUM_ROWS) // 2)
    models = [
        SMALL | {"output": output, "temperature": "fit"},
        SMALL | {"output": output, "temperature": "fit", "name": "small_fp16", "variant": "fp16"},
    ]
    path = family_toml(tmp_path / "family.toml", *models)
    done = run(path, tmp_path / "models")
    wanted = fit_temperature(logits, label)
    assert wanted == pytest.approx(2.0, rel=0.2)
    assert {name: row[1] for name, row in table(done.output).items() if name.startswith("small")} == {
        "small": f"{wanted:.4g} (fitted)",
        "small_fp16": f"{wanted:.4g} (fitted)",
    }
    family = read_family(path)
    settled = with_fitted_temperature(family, family.models[0], open_source(family, family.models[0]))
    assert settled.head.temperature == pytest.approx(wanted, rel=1e-4)
    np.testing.assert_allclose(
        served(tmp_path / "models", "small")["scores"],
        answers_of(logits, Head(temperature=wanted))["scores"],
        atol=1e-5,
    )


def test_a_family_in_python_takes_files_and_fitted_temperatures_too(tmp_path: Path) -> None:
    model = FamilyModel(name="m", file=torchscript(tmp_path / "m.pt"), max_batch_size=8, fit_temperature=True)
    label = linear()(torch.from_numpy(ROWS)).argmax(1).numpy()
    family = family_of(model, labelled_rows=lambda n: ({"x": ROWS[:n]}, label[:n]))
    settled = with_fitted_temperature(family, model, open_source(family, model))
    assert settled.head.temperature < 0.1, "the model is always right"
    assert not settled.fit_temperature


def test_rows_that_check_and_rows_that_set_scales_are_different_ones_whatever_their_order(tmp_path: Path) -> None:
    onnx_file(tmp_path / "small.onnx")
    rows_file(tmp_path / "rows.npz", **{"input:x": np.arange(NUM_ROWS * 4, dtype=np.float32).reshape(-1, 4)})
    family = read_family(family_toml(tmp_path / "family.toml", SMALL | {"variant": "int8"}))
    sample, scales = (rows["x"][:, 0] for rows in (family.checked_sample(256), family.checked_quantisation_rows(512)))
    assert (len(sample), len(scales)) == (256, NUM_ROWS - 256)
    assert not set(sample) & set(scales)
    assert sample.min() < 200, "files are often sorted by class"
    assert sample.max() > 2400
    np.testing.assert_array_equal(sample[:2], family.checked_sample(2)["x"][:, 0])
    assert family.labelled_rows is not None
    rows, label = family.checked_labelled_rows(2_000)
    assert len(rows["x"]) == len(label) == NUM_ROWS
    with np.load(tmp_path / "rows.npz") as stored:
        np.testing.assert_array_equal(label, stored["label"][(rows["x"][:, 0] / 4).astype(int)])


def test_an_axis_that_is_open_in_the_file_may_be_stated_as_fixed(tmp_path: Path) -> None:
    onnx_text(tmp_path / "small.onnx", "g (float[n, w] x) => (float[n, 4] y) { y = Identity (x) }")
    rows_file(tmp_path / "rows.npz", label=None)
    path = family_toml(tmp_path / "family.toml", SMALL, classes=4)
    assert run(path, tmp_path / "models").exit_code == 0
    assert list(read_config(tmp_path / "models" / "small" / "config.pbtxt").input[0].dims) == [4]


def test_logits_are_no_probabilities(tmp_path: Path) -> None:
    onnx_file(tmp_path / "small.onnx", linear)
    rows_file(tmp_path / "rows.npz")
    path = family_toml(tmp_path / "family.toml", SMALL | {"output": "probabilities"})
    with pytest.raises(ExportRefused, match=r'small: its output is said to be probabilities.* say output = "logits"'):
        run(path, tmp_path / "models")
