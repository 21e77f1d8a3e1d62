"""The digits family as `cascadeserve export` takes it: `examples.digits.family:family`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file

from examples.digits import models
from examples.digits.data import NUM_CLASSES, SIDE, rows
from export.family import Family, FamilyModel, TensorSpec, Variant

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

WEIGHTS = Path(__file__).parent / "weights"


def _load(name: str, build: Callable[[], nn.Module]) -> nn.Module:
    model = build()
    model.load_state_dict(load_file(WEIGHTS / f"{name}.safetensors"))
    return model.eval()


def _sample(n: int) -> dict[str, NDArray[np.generic]]:
    """Rows on which the exported models are held against PyTorch."""
    return {"image": rows("search", n, seed=1).inputs}


def _quantisation_rows(n: int) -> dict[str, NDArray[np.generic]]:
    """Rows of the search split's own stream, apart from those that records and checks are made of."""
    return {"image": rows("search", n, seed=2).inputs}


def _model(name: str, build: Callable[[], nn.Module], weights: str, variant: Variant | None = None) -> FamilyModel:
    return FamilyModel(name=name, build=partial(_load, weights, build), max_batch_size=64, variant=variant)


family = Family(
    name="digits",
    inputs=(TensorSpec(name="image", datatype="FP32", shape=(1, SIDE, SIDE)),),
    classes=NUM_CLASSES,
    # from cheap to dear
    models=(
        _model("digits_linear", models.build_linear, "digits_linear"),
        _model("digits_mlp", models.build_mlp, "digits_mlp"),
        _model("digits_cnn", models.build_cnn, "digits_cnn"),
        _model("digits_resnet_int8", models.build_resnet, "digits_resnet", "int8"),
        _model("digits_resnet", models.build_resnet, "digits_resnet"),
    ),
    sample=_sample,
    quantisation_rows=_quantisation_rows,
)
