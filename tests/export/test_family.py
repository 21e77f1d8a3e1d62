from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from cascadeserve.errors import ExportRefused, UsageError
from export.family import Family, FamilyModel, Head, TensorSpec
from export.parity import check_parity
from tests.export.tiny_torch import CLASSES, INPUT, ROWS, exported, family_of, linear, model_of

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.torch


def family(**changes: Any) -> Family:
    fields: dict[str, Any] = {
        "name": "tiny",
        "inputs": (INPUT,),
        "classes": CLASSES,
        "models": (model_of(),),
        "sample": lambda n: {"x": ROWS[:n]},
    }
    return Family(**fields | changes)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"models": ()}, "has no models"),
        ({"models": (model_of(), model_of())}, "two models named 'tiny'"),
        ({"classes": 1}, "classes must be at least 2"),
        ({"inputs": ()}, "has no inputs"),
        ({"inputs": (TensorSpec(name="x", datatype="FP32", shape=()),)}, "at least one dimension"),
    ],
)
def test_a_family_that_cannot_be_served_is_refused(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        family(**changes)


def test_an_unknown_variant_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"^model 'tiny': there is no variant 'int4'; choose one of fp16, int8, optim"):
        model_of(variant="int4")  # type: ignore[arg-type]


def test_a_family_with_an_int8_model_needs_quantisation_rows() -> None:
    models = (model_of(name="float"), model_of(name="small", variant="int8"))
    with pytest.raises(UsageError, match=r"^model 'small': the variant int8 .* give the family quantisation_rows"):
        family(models=models)
    assert family(models=models, quantisation_rows=lambda n: {"x": ROWS[:n]}).checked_quantisation_rows(3)
    assert family(models=(model_of(variant="fp16"),))


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({}, "^model 'm': give one of build and file"),
        ({"build": linear, "file": Path("m.onnx")}, "^model 'm': give one of build and file"),
        ({"file": Path("m.h5")}, r"^model 'm': m\.h5 does not end in \.onnx, \.pt or \.ts"),
        ({"build": linear, "output_name": "y"}, r"^model 'm': output_name chooses an output of an \.onnx file"),
        (
            {"build": linear, "fit_temperature": True, "head": Head(temperature=2.0)},
            "^model 'm': its temperature is either given or fitted",
        ),
    ],
)
def test_a_model_comes_from_one_place_and_has_one_temperature(fields: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        FamilyModel(name="m", max_batch_size=1, **fields)


def test_a_family_with_a_fitted_temperature_needs_labelled_rows() -> None:
    models = (model_of(fit_temperature=True),)
    with pytest.raises(
        UsageError, match=r"^model 'tiny': a temperature is fitted to rows with labels, give the family"
    ):
        family(models=models)
    rows, label = family(
        models=models, labelled_rows=lambda n: ({"x": ROWS[: n // 2]}, np.zeros(n // 2, np.int64))
    ).checked_labelled_rows(8)
    assert len(rows["x"]) == len(label) == 4


def test_quantisation_rows_may_be_fewer_but_not_few() -> None:
    fewer = family(quantisation_rows=lambda _: {"x": ROWS[:130]})
    assert len(fewer.checked_quantisation_rows(512)["x"]) == 130
    few = family(quantisation_rows=lambda _: {"x": ROWS[:127]})
    with pytest.raises(UsageError, match=r"^input 'x': quantisation_rows\(512\) gives float32 \[127, 4\]"):
        few.checked_quantisation_rows(512)


@pytest.mark.parametrize("name", ["../evil", "", "a/b", ".hidden", "-x", "a b"])
def test_a_model_name_that_is_no_folder_name_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="a name is made of"):
        model_of(name=name)


def test_a_batch_size_below_one_is_refused() -> None:
    with pytest.raises(UsageError, match="max_batch_size must be at least 1"):
        FamilyModel(name="m", build=linear, max_batch_size=0)


@pytest.mark.parametrize(
    ("sample", "sentence"),
    [
        (lambda n: {"y": ROWS[:n]}, "sample has the inputs"),
        (lambda n: {"x": ROWS[:n, :3]}, r"gives float32 \[5, 3\], but it is stated as FP32 \[5, 4\]"),
        (lambda n: {"x": ROWS[: n - 1]}, "gives float32"),
        (lambda n: {"x": ROWS[:n].astype(np.float64)}, "gives float64"),
        (lambda n: {"x": ROWS[:n].tolist()}, "gives None"),
    ],
)
def test_a_sample_that_contradicts_the_inputs_is_refused(sample: Callable[[int], Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        family(sample=sample).checked_sample(5)


def test_quantisation_rows_that_contradict_the_inputs_are_refused() -> None:
    with pytest.raises(UsageError, match=r"^input 'x': quantisation_rows\(5\) gives float32 \[4, 4\]"):
        family(quantisation_rows=lambda n: {"x": ROWS[: n - 1]}).checked_quantisation_rows(5)


def test_logits_of_another_number_of_classes_are_refused() -> None:
    wide = family(classes=CLASSES + 2)
    _, source, onnx_model = exported(model_of(), family_of(model_of()))
    with pytest.raises(ExportRefused, match=f"but the family has {CLASSES + 2} classes"):
        check_parity(wide, model_of(), source, onnx_model, 1e-4)
