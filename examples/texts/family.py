"""The texts family as `cascadeserve export` takes it: `examples.texts.family:family`."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors.torch import load_file

from examples.texts import grams, models, words
from examples.texts.data import PACKAGES, rows
from export.ensemble import Preprocessing
from export.family import Family, FamilyModel, TensorSpec

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

FOLDER = Path(__file__).parent
WEIGHTS = FOLDER / "weights"


def _load(name: str, build: Callable[[], nn.Module]) -> nn.Module:
    model = build()
    model.load_state_dict(load_file(WEIGHTS / f"{name}.safetensors"))
    return model.eval()


def _sample(n: int) -> dict[str, NDArray[np.generic]]:
    """Rows on which the exported models are held against PyTorch."""
    return {"text": rows("search", n, seed=1).inputs}


def _counts(name: str, source: str, buckets: int) -> Preprocessing:
    outputs = (TensorSpec(name="counts", datatype="FP32", shape=(buckets,)),)
    return Preprocessing(name=name, source=FOLDER / source, outputs=outputs)


def _model(name: str, build: Callable[[], nn.Module], preprocessing: Preprocessing) -> FamilyModel:
    return FamilyModel(name=name, build=partial(_load, name, build), max_batch_size=64, preprocessing=preprocessing)


family = Family(
    name="texts",
    inputs=(TensorSpec(name="text", datatype="BYTES", shape=(1,)),),
    classes=len(PACKAGES),
    # from cheap to dear
    models=(
        _model("texts_words", models.build_words, _counts("texts_count_words", "words.py", words.BUCKETS)),
        _model("texts_grams", models.build_grams, _counts("texts_count_grams", "grams.py", grams.BUCKETS)),
    ),
    sample=_sample,
)
