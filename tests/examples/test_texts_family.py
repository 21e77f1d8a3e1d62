"""The texts family: its rows, and its committed weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from examples.texts.data import MAX_BYTES, PACKAGES, rows
from examples.texts.family import WEIGHTS, family
from export.ensemble import classifier_of

pytestmark = pytest.mark.torch
NUM_ROWS = 1_500


def test_rows_are_the_same_every_time_and_fewer_are_the_first_of_more() -> None:
    many, few = rows("search", 200), rows("search", 50)
    np.testing.assert_array_equal(many.inputs[:50], few.inputs)
    np.testing.assert_array_equal(many.labels[:50], few.labels)
    assert many.inputs.shape == (200, 1)
    assert all(0 < len(text) <= MAX_BYTES and text.isascii() for text in many.inputs[:, 0])
    assert set(rows("search", 300).labels.tolist()) == set(range(len(PACKAGES)))
    assert not np.array_equal(many.inputs[:50], rows("calibration", 50).inputs)
    assert not np.array_equal(many.inputs[:50], rows("search", 50, seed=1).inputs)


def test_training_and_held_out_rows_come_from_different_files() -> None:
    train, search, replay = (set(rows(split, 2_000).file_ids.tolist()) for split in ("train", "search", "replay"))
    assert not train & search
    assert len(search & replay) > 0.5 * len(search)


def test_the_dear_model_is_clearly_more_accurate_than_the_cheap_one() -> None:
    part = rows("search", NUM_ROWS, seed=3)
    right = []
    for model in family.models:
        assert model.preprocessing is not None
        inner, classifier = classifier_of(family, model)
        (inputs,) = model.preprocessing.load()({"text": part.inputs.astype(object)}).values()
        with torch.inference_mode():
            answers = classifier.build()(torch.from_numpy(inputs)).argmax(1).numpy()
        assert inner.inputs == model.preprocessing.outputs
        right.append(float(np.mean(answers == part.labels)))
    # other versions of the packages are other rows
    assert right[0] > 2 / len(PACKAGES)
    assert right[1] > right[0] + 0.05


def test_the_weights_are_those_of_the_family_and_small() -> None:
    files = list(WEIGHTS.glob("*.safetensors"))
    assert {path.stem for path in files} == {model.name for model in family.models}
    assert sum(path.stat().st_size for path in files) < 1_000_000
