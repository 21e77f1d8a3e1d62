from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from click.testing import CliRunner

from cascadeserve.errors import ExportRefused, UsageError
from cascadeserve.gear_plan import TensorSpec
from cascadeserve.triton_config import composing_models, read_config
from export.cli import export
from export.ensemble import Preprocessing, classifier_of, refuse_versions, write_ensemble
from export.family import Family, FamilyModel
from tests.export.model_files import torchscript
from tests.export.tiny_torch import CLASSES, linear

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.torch

COUNTS = TensorSpec(name="counts", datatype="FP32", shape=(4,))
SOURCE = """
import numpy as np

def preprocess(inputs):
    counts = [np.bincount(np.frombuffer(text, np.uint8) % 4, minlength=4) for text in inputs["text"][:, 0]]
    return {"counts": np.array(counts, np.float32)}
"""

FAMILY = """
schema_version = 1
name = "texts"
classes = 3
rows = "rows.npz"
[[inputs]]
name = "text"
datatype = "BYTES"
shape = [1]
[[models]]
name = "small"
file = "small.pt"
max_batch_size = 8
temperature = "fit"
keep_scores = false
[models.preprocessing]
name = "count"
file = "count.py"
outputs = [{ name = "counts", datatype = "FP32", shape = [4] }]
"""


def preprocessing(folder: Path, text: str = SOURCE, name: str = "count", **changes: Any) -> Preprocessing:
    path = folder / f"{name}.py"
    path.write_text(text)
    return replace(Preprocessing(name=name, source=path, outputs=(COUNTS,)), **changes)


def model_of(name: str, how: Preprocessing | None, max_batch_size: int = 8) -> FamilyModel:
    return FamilyModel(name=name, build=linear, max_batch_size=max_batch_size, preprocessing=how)


def sample(n: int) -> dict[str, Any]:
    return {"text": np.array([f"{i} text".encode() for i in range(n)])[:, None]}


def family_of(*models: FamilyModel) -> Family:
    text = TensorSpec(name="text", datatype="BYTES", shape=(1,))
    return Family(name="texts", inputs=(text,), classes=CLASSES, models=models, sample=sample)


def test_models_that_share_a_preprocessing_are_written_with_one(tmp_path: Path) -> None:
    how = preprocessing(tmp_path)
    small, large = model_of("small", how, 4), model_of("large", how, 16)
    family = family_of(small, large)
    repository = tmp_path / "repository"
    assert write_ensemble(repository, family, small)
    assert write_ensemble(repository, family, large)
    assert not write_ensemble(repository, family, small)
    assert sorted(path.name for path in repository.iterdir()) == ["count", "large", "small"]
    assert composing_models(read_config(repository / "large" / "config.pbtxt")) == ("count", "large_classifier")
    assert read_config(repository / "count" / "config.pbtxt").max_batch_size == 16
    assert sorted(path.name for path in (repository / "count" / "1").iterdir()) == ["model.py", "preprocessing.py"]
    assert (repository / "count" / "1" / "preprocessing.py").read_text() == SOURCE
    # git keeps no empty folder
    assert [path.name for path in (repository / "small" / "1").iterdir()] == [".gitkeep"]


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path: Path) -> None:
    model = model_of("small", preprocessing(tmp_path))
    repository = tmp_path / "repository"
    write_ensemble(repository, family_of(model), model)
    (repository / "count" / "1" / "__pycache__").mkdir()
    assert not write_ensemble(repository, family_of(model), model)
    (repository / "count" / "1" / "notes.txt").write_text("mine")
    with pytest.raises(ExportRefused, match=r"holds 1/notes\.txt, which this command did not write"):
        write_ensemble(repository, family_of(model), model)
    (repository / "count" / "1" / "notes.txt").unlink()
    (repository / "count" / "2").mkdir()
    (repository / "count" / "2" / "model.py").write_text("")
    with pytest.raises(ExportRefused, match="holds version 2"):
        write_ensemble(repository, family_of(model), model)


def test_a_foreign_folder_is_met_before_any_part_of_the_model_is_written(tmp_path: Path) -> None:
    preprocessing(tmp_path)
    torchscript(tmp_path / "small.pt", linear)
    np.savez(tmp_path / "rows.npz", **{"input:text": sample(300)["text"], "label": np.arange(300) % CLASSES})
    (tmp_path / "family.toml").write_text(FAMILY)
    repository = tmp_path / "models"
    (repository / "count" / "1").mkdir(parents=True)
    (repository / "count" / "1" / "other.py").write_text("")
    with pytest.raises(ExportRefused, match=r"count holds 1/other\.py"):
        CliRunner().invoke(
            export, [str(tmp_path / "family.toml"), "--repository", str(repository)], catch_exceptions=False
        )
    assert [path.name for path in repository.iterdir()] == ["count"]


def test_an_ensemble_has_no_versions(tmp_path: Path) -> None:
    model = model_of("small", preprocessing(tmp_path))
    refuse_versions(model, 1)
    with pytest.raises(ExportRefused, match=r"small: .* Triton joins the newest versions"):
        refuse_versions(model, 2)
    refuse_versions(replace(model, preprocessing=None), 2)


def test_the_classifier_takes_what_the_preprocessing_gives(tmp_path: Path) -> None:
    model = model_of("small", preprocessing(tmp_path))
    inner, part = classifier_of(family_of(model), model)
    assert (part.name, part.preprocessing, inner.inputs) == ("small_classifier", None, (COUNTS,))
    rows = inner.checked_sample(3)["counts"]
    np.testing.assert_array_equal(rows.sum(axis=1), [6, 6, 6])


@pytest.mark.parametrize(
    ("source", "what"),
    [
        (SOURCE.replace("np.float32", "np.float64"), "gives float64"),
        (SOURCE.replace('"counts": np', '"others": np'), "returns no array named 'counts'"),
        (
            SOURCE.replace("import numpy as np", "import numpy as np, nosuchmodule"),
            "fails: ModuleNotFoundError: .*nosuch",
        ),
        (SOURCE + "\nraise SystemExit(0)", "fails: SystemExit"),
        (SOURCE.replace("    counts =", "    raise ValueError('one\\ntwo')\n    counts ="), "fails: ValueError: one"),
        (SOURCE.replace('return {"counts": np.array(counts, np.float32)}', "return None"), "returns a NoneType"),
        (SOURCE.replace("np.float32)}", "np.float32) / len(counts)}"), "of a row alone than beside others"),
    ],
)
def test_a_preprocessing_that_is_not_what_it_is_said_to_be_is_refused(tmp_path: Path, source: str, what: str) -> None:
    model = model_of("small", preprocessing(tmp_path, source))
    with pytest.raises(ExportRefused, match=f"preprocessing 'count' .*{what}"):
        classifier_of(family_of(model), model)


@pytest.mark.parametrize(
    ("models", "what"),
    [
        (lambda at: [model_of("a", preprocessing(at, name="b")), model_of("b", None)], "'b' has the name of model 'b'"),
        (
            lambda at: [model_of("a", preprocessing(at)), model_of("a_classifier", None)],
            "model 'a_classifier' has the name under which the classifier of model 'a' is written",
        ),
        (
            lambda at: [model_of("a", preprocessing(at)), model_of("a_classifier", preprocessing(at))],
            "model 'a_classifier' has the name under which the classifier of model 'a' is written",
        ),
        (
            lambda at: [model_of("a", preprocessing(at, name="a_classifier"))],
            "'a_classifier' has the name of the classifier of model 'a'",
        ),
        (
            lambda at: [
                model_of("a", preprocessing(at)),
                model_of("b", preprocessing(at, outputs=(COUNTS, replace_name(COUNTS)))),
            ],
            "two preprocessings named 'count'",
        ),
        (lambda at: [model_of("a", preprocessing(at, "x = 1"))], "has no function preprocess"),
        (lambda at: [model_of("a", preprocessing(at, source=at / "absent.py"))], "is no Python file"),
    ],
)
def test_names_and_files_that_do_not_fit_are_refused(
    tmp_path: Path, models: Callable[[Path], list[FamilyModel]], what: str
) -> None:
    with pytest.raises(UsageError, match=what):
        classifier_of(family_of(*(made := models(tmp_path))), made[0])


def test_a_family_file_names_a_preprocessing(tmp_path: Path) -> None:
    preprocessing(tmp_path)
    torchscript(tmp_path / "small.pt", linear)
    texts = np.array([[f"{i} tëxt"] for i in range(300)])
    np.savez(tmp_path / "rows.npz", **{"input:text": texts, "label": np.arange(300) % CLASSES})
    (tmp_path / "family.toml").write_text(FAMILY)
    repository = tmp_path / "models"
    done = CliRunner().invoke(export, [str(tmp_path / "family.toml"), "--repository", str(repository)])
    assert done.exit_code == 0, done.output
    assert sorted(path.name for path in repository.iterdir()) == ["count", "small", "small_classifier"]
    assert [entry.name for entry in read_config(repository / "small" / "config.pbtxt").output] == ["label", "certainty"]
    second = [str(tmp_path / "family.toml"), "--repository", str(repository), "--version", "2"]
    with pytest.raises(ExportRefused, match="give the new one a model name of its own"):
        CliRunner().invoke(export, second, catch_exceptions=False, standalone_mode=False)


def replace_name(spec: TensorSpec) -> TensorSpec:
    return TensorSpec(name="more", datatype=spec.datatype, shape=spec.shape)


def test_rows_of_text_must_be_byte_strings(tmp_path: Path) -> None:
    model = model_of("small", preprocessing(tmp_path))
    family = replace(family_of(model), sample=lambda n: {"text": np.array([["a"]] * n)})
    with pytest.raises(UsageError, match="stated as BYTES"):
        family.checked_sample(2)
