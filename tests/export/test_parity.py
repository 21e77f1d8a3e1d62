from __future__ import annotations

from typing import TYPE_CHECKING, get_args

import numpy as np
import pytest
import torch
from torch import nn

from cascadeserve.errors import ExportRefused
from export.family import NUM_PARITY_ROWS, Variant
from export.parity import BATCH_TOLERANCE, VARIANT_LIMITS, Parity, check_parity, check_variant
from tests.export.tiny_torch import (
    CLASSES,
    around,
    exported,
    model_of,
    two_input_family,
    with_next_label,
    with_weights,
)

if TYPE_CHECKING:
    from export.family import Family, FamilyModel

pytestmark = pytest.mark.torch
TOLERANCE = 1e-4
NUMBER = r"\d\.\d\de[+-]\d\d"


def checked(model: FamilyModel, family: Family | None = None) -> Parity:
    family, source, onnx_model = exported(model, family)
    return check_parity(family, model, source, onnx_model, TOLERANCE)


def test_a_faithful_model_passes_and_its_differences_are_reported() -> None:
    parity = checked(model_of())
    assert parity.max_abs_error < 1e-6
    assert parity.label_agreement == 1.0
    assert parity.max_batch_difference <= BATCH_TOLERANCE


@pytest.mark.parametrize("max_batch_size", [1, 2, 3, 8, NUM_PARITY_ROWS, NUM_PARITY_ROWS + 44])
def test_a_faithful_model_passes_at_any_largest_batch(max_batch_size: int) -> None:
    assert checked(model_of(max_batch_size=max_batch_size)).label_agreement == 1.0


@pytest.mark.parametrize("max_batch_size", [1, 8, NUM_PARITY_ROWS, NUM_PARITY_ROWS + 44])
def test_a_faithful_model_of_two_inputs_passes_at_any_largest_batch(max_batch_size: int) -> None:
    model = model_of(around(lambda layer, x, factor: layer(x) * factor), max_batch_size=max_batch_size)
    assert checked(model, two_input_family(model)).max_abs_error < 1e-5


def test_batch_norm_and_dropout_are_exported_as_in_inference() -> None:
    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5), nn.Linear(6, CLASSES)).train()

    assert checked(model_of(build)).label_agreement == 1.0


@pytest.mark.parametrize("factor", [1.01, -1.0, 0.0])
def test_other_weights_are_refused_with_the_model_the_measured_error_and_the_limit(factor: float) -> None:
    model = model_of(name="perturbed")
    family, source, onnx_model = exported(model)
    broken = with_weights(onnx_model, lambda weights: weights * factor)
    with pytest.raises(ExportRefused, match=rf"^perturbed: scores differ .* {NUMBER}, allowed are 1e-04"):
        check_parity(family, model, source, broken, TOLERANCE)


def test_the_measured_error_is_the_largest_difference_of_a_score_and_decides_against_the_tolerance() -> None:
    model = model_of()
    family, source, onnx_model = exported(model)
    broken = with_weights(onnx_model, lambda weights: weights * 1.001)
    error = check_parity(family, model, source, broken, 0.1).max_abs_error
    assert 1e-5 < error < 1e-2
    assert check_parity(family, model, source, broken, error * 1.01).max_abs_error == error
    with pytest.raises(ExportRefused, match=f"{error:.2e}"):
        check_parity(family, model, source, broken, error * 0.99)


def test_labels_that_differ_are_refused_though_the_scores_agree() -> None:
    model = model_of(name="mislabelled")
    family, source, onnx_model = exported(model)
    with pytest.raises(ExportRefused, match=r"^mislabelled: \d+ of 256 labels differ") as caught:
        check_parity(family, model, source, with_next_label(onnx_model), TOLERANCE)
    assert int(str(caught.value).split()[1]) > NUM_PARITY_ROWS * 0.9


def test_either_label_of_tied_classes_is_right() -> None:
    model = model_of(around(lambda layer, x: layer(x) * 0))
    family, source, onnx_model = exported(model)
    parity = check_parity(family, model, source, with_next_label(onnx_model), TOLERANCE)
    assert parity.label_agreement == 0.0


def test_scores_that_are_not_numbers_are_refused() -> None:
    model = model_of(name="broken")
    family, source, onnx_model = exported(model)
    with pytest.raises(ExportRefused, match=r"^broken: .* nan"):
        check_parity(family, model, source, with_weights(onnx_model, lambda weights: weights * np.nan), TOLERANCE)


def test_scores_that_are_not_numbers_in_pytorch_either_are_refused() -> None:
    with pytest.raises(ExportRefused, match=r"^nowhere: gives scores that are no numbers"):
        checked(model_of(around(lambda layer, x: layer(x) * float("nan")), name="nowhere"))


def without_mean(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return layer(x - x.mean(0, keepdim=True))


@pytest.mark.parametrize("max_batch_size", [1, 8, NUM_PARITY_ROWS])
def test_a_model_that_subtracts_the_mean_of_its_batch_is_refused(max_batch_size: int) -> None:
    with pytest.raises(ExportRefused, match=rf"^mixing: .* up to {NUMBER}"):
        checked(model_of(around(without_mean), name="mixing", max_batch_size=max_batch_size))


def test_dependence_on_the_batch_is_named_as_such() -> None:
    # at this size the exported model sees the same batch as its source, so they agree
    with pytest.raises(ExportRefused, match=rf"change by up to {NUMBER} with the rows it shares a batch .* allowed"):
        checked(model_of(around(without_mean), max_batch_size=NUM_PARITY_ROWS))


def test_a_model_that_looks_at_its_largest_neighbour_is_refused_though_ordinary_rows_do_not_show_it() -> None:
    model = model_of(around(lambda layer, x: layer(x) * torch.clamp(x.max(), min=2.0)), name="scaled")
    with pytest.raises(ExportRefused, match=rf"^scaled: a row's scores change by up to {NUMBER}"):
        checked(model)


def test_a_model_whose_scores_stop_being_numbers_beside_an_outlying_row_is_refused() -> None:
    # finite for rows of [0, 1], and infinity times 0 for a hundred times that
    model = model_of(around(lambda layer, x: layer(x) + 0 * torch.exp(4 * x.max())), name="overflowing")
    with pytest.raises(ExportRefused, match=r"^overflowing: .* nan"):
        checked(model)


def test_a_model_whose_graph_holds_the_batch_size_of_its_example_is_refused() -> None:
    model = model_of(around(lambda layer, x: torch.stack([layer(row) for row in x])), name="frozen")
    with pytest.raises(ExportRefused, match=r"^frozen: "):
        checked(model)


def test_a_branch_on_a_value_which_tracing_freezes_is_refused() -> None:
    """Both PyTorch and the traced graph take the branch of the first row; only rows on their own show it."""

    def branch(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return layer(x) if x[0, 0] > 0.5 else -layer(x)

    with pytest.raises(ExportRefused, match=rf"^branching: a row's scores change by up to {NUMBER}"):
        checked(model_of(around(branch), name="branching", max_batch_size=NUM_PARITY_ROWS))


@pytest.mark.parametrize("variant", get_args(Variant))
def test_a_variant_is_held_against_its_float_model_within_wider_limits(variant: Variant) -> None:
    model = model_of(variant=variant)
    family, _, onnx_model = exported(model)
    limit = VARIANT_LIMITS[variant].mean_error
    near = with_weights(onnx_model, lambda weights: weights * (1 + limit / 10))
    parity = check_variant(family, model, onnx_model, near)
    assert 0 < parity.max_abs_error < 10 * limit
    assert parity.label_agreement >= VARIANT_LIMITS[variant].label_agreement
    far = with_weights(onnx_model, lambda weights: weights * (1 + 40 * limit))
    with pytest.raises(ExportRefused, match=rf"^tiny: its {variant} variant .* scores {NUMBER} off on average, wanted"):
        check_variant(family, model, onnx_model, far)


@pytest.mark.parametrize("variant", get_args(Variant))
def test_a_variant_with_other_labels_is_refused_though_its_scores_agree(variant: Variant) -> None:
    model = model_of(variant=variant)
    family, _, onnx_model = exported(model)
    with pytest.raises(ExportRefused, match=r"gives the float model's label on 0\.\d{4} of 256 rows"):
        check_variant(family, model, onnx_model, with_next_label(onnx_model))


def test_a_variant_that_gives_no_numbers_is_refused() -> None:
    model = model_of(variant="fp16")
    family, _, onnx_model = exported(model)
    with pytest.raises(ExportRefused, match=r"scores nan off on average, .*FP16 holds"):
        check_variant(family, model, onnx_model, with_weights(onnx_model, lambda weights: weights * np.nan))


def test_a_variant_is_as_strictly_held_to_depend_on_the_row_alone_as_every_model() -> None:
    def slightly(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return layer(x) * (1 + 1e-3 * x.max())

    model = model_of(variant="int8")
    family, _, onnx_model = exported(model)
    mixing = exported(model_of(around(slightly)))[2]
    with pytest.raises(ExportRefused, match=rf"^tiny: a row's scores change by up to {NUMBER} .* allowed are 1e-05"):
        check_variant(family, model, onnx_model, mixing)


def test_a_variant_that_fixes_the_batch_size_is_refused() -> None:
    model = model_of(variant="int8")
    family, _, onnx_model = exported(model)
    frozen = exported(model_of(around(lambda layer, x: torch.stack([layer(row) for row in x]))))[2]
    with pytest.raises(ExportRefused, match=r"^tiny: its int8 variant does not run on every batch size"):
        check_variant(family, model, onnx_model, frozen)
