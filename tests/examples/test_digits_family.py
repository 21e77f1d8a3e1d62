"""The model repository that is committed, against the weights that are committed and the data they are for."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import pytest

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

import onnxruntime as ort

from examples.digits.data import Rows, rows
from examples.digits.family import WEIGHTS, family
from export.family import Head
from export.heads import add_head, class_model
from export.repository import model_config
from export.sources import open_source
from export.variants import make_variant

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from export.family import FamilyModel

pytestmark = pytest.mark.torch
ROOT = Path(__file__).parents[2]
REPOSITORY = ROOT / "model_repository"
NAMES = ("digits_linear", "digits_mlp", "digits_cnn", "digits_resnet")
INT8 = "digits_resnet_int8"
FLOAT = [model for model in family.models if model.variant is None]
NUM_ROWS, NUM_COMPARED = 1_000, 200
THRESHOLD = 0.7


def answers(onnx_model: bytes, inputs: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 2
    session = ort.InferenceSession(onnx_model, options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    parts = [session.run(names, {"image": batch}) for batch in np.split(inputs, len(inputs) // 50)]
    return {name: np.concatenate([part[i] for part in parts]) for i, name in enumerate(names)}


@cache
def search() -> Rows:
    return rows("search", NUM_ROWS)


@cache
def committed(name: str) -> dict[str, NDArray[Any]]:
    """Answers of a committed model, worked out once: the residual network takes seconds."""
    return answers((REPOSITORY / name / "1" / "model.onnx").read_bytes(), search().inputs)


def accuracy(label: NDArray[np.int64]) -> float:
    return float(np.mean(label == search().labels))


def test_the_family_the_weights_and_the_repository_hold_the_same_models() -> None:
    assert tuple(model.name for model in FLOAT) == NAMES
    assert [(model.name, model.variant) for model in family.models if model.variant is not None] == [(INT8, "int8")]
    assert {path.stem for path in WEIGHTS.glob("*.safetensors")} == set(NAMES)
    assert {path.name for path in REPOSITORY.iterdir() if path.is_dir()} == {*NAMES, INT8}


@pytest.mark.parametrize("model", family.models, ids=lambda model: model.name)
def test_the_committed_config_is_the_one_that_an_export_writes(model: FamilyModel) -> None:
    onnx_model = (REPOSITORY / model.name / "1" / "model.onnx").read_bytes()
    assert (REPOSITORY / model.name / "config.pbtxt").read_text() == model_config(family, model, onnx_model)
    files = {path.relative_to(REPOSITORY / model.name).as_posix() for path in (REPOSITORY / model.name).rglob("*.*")}
    # tests/cascadeserve/demo looks at the baseline
    assert files - {"configs/baseline.pbtxt"} == {"config.pbtxt", "1/model.onnx"}


@pytest.mark.parametrize("model", FLOAT, ids=lambda model: model.name)
def test_the_committed_model_answers_as_an_export_of_the_committed_weights(model: FamilyModel) -> None:
    # Not the same bytes: an earlier head, with the same answers, wrote the repository, whose digests stand in plans.
    onnx_model = add_head(open_source(family, model).onnx_model(), model.head).SerializeToString()
    fresh, stored = answers(onnx_model, search().inputs[:NUM_COMPARED]), committed(model.name)
    np.testing.assert_array_equal(fresh["label"], stored["label"][:NUM_COMPARED])
    np.testing.assert_allclose(fresh["scores"], stored["scores"][:NUM_COMPARED], rtol=0, atol=1e-5)
    np.testing.assert_allclose(fresh["certainty"], stored["certainty"][:NUM_COMPARED], rtol=0, atol=1e-5)


def test_the_committed_int8_model_is_what_quantising_the_committed_float_model_gives() -> None:
    (model,) = (model for model in family.models if model.name == INT8)
    bare = class_model(onnx.load(REPOSITORY / "digits_resnet" / "1" / "model.onnx"), "scores")
    fresh = add_head(make_variant(family, model, bare), Head(output="probabilities")).SerializeToString()
    stored = (REPOSITORY / INT8 / "1" / "model.onnx").read_bytes()
    # Other processors sum in another order, which moves weights and scales by their last bits.
    shapes = [
        {
            tensor.name: tuple(tensor.dims)
            for tensor in onnx.load_model_from_string(content).graph.initializer
            if len(tensor.dims) > 1
        }
        for content in (fresh, stored)
    ]
    assert shapes[0] == shapes[1]
    some = search().inputs[:100]
    np.testing.assert_allclose(answers(fresh, some)["scores"], answers(stored, some)["scores"], rtol=0, atol=0.05)


def test_int8_keeps_the_accuracy_of_the_float_model() -> None:
    quantised, large = committed(INT8), committed("digits_resnet")
    truth = search().labels[:, None]
    assert np.mean(quantised["label"] == truth) >= np.mean(large["label"] == truth) - 0.003
    assert np.mean(quantised["label"] == large["label"]) >= 0.995
    assert np.abs(quantised["certainty"] - large["certainty"]).mean() < 0.005


def test_int8_scales_and_checks_are_made_of_different_rows() -> None:
    sample, scales = family.checked_sample(256)["image"], family.checked_quantisation_rows(256)["image"]
    recorded = rows("calibration", 256).inputs
    assert not any(np.array_equal(one, other) for one in (sample[:8], recorded[:8]) for other in (scales[:8],))


def test_every_model_is_more_accurate_than_the_one_before() -> None:
    found = [accuracy(committed(name)["label"][:, 0]) for name in NAMES]
    assert found == sorted(set(found))
    assert found[-1] >= 0.97


def test_a_cascade_sends_few_rows_on_and_stays_within_a_point_of_its_largest_model() -> None:
    small, large = committed("digits_cnn"), committed("digits_resnet")["label"][:, 0]
    goes_on = small["certainty"][:, 0] < THRESHOLD
    assert 0.12 < np.mean(goes_on) < 0.25
    assert accuracy(np.where(goes_on, large, small["label"][:, 0])) >= accuracy(large) - 0.01
    assert accuracy(small["label"][:, 0]) < accuracy(large) - 0.01, "or there would be nothing to gain"
