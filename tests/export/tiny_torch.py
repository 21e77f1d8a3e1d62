"""A family of the smallest models that can be exported: 4 numbers in, 3 classes out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch import nn

from export.family import Family, FamilyModel, Head, TensorSpec, Variant
from export.heads import add_head
from export.sources import Source, open_source

if TYPE_CHECKING:
    from collections.abc import Callable

CLASSES = 3
ROWS = np.random.default_rng(0).random((512, 4), dtype=np.float32)
QUANTISATION_ROWS = np.random.default_rng(2).random((512, 4), dtype=np.float32)
INPUT = TensorSpec(name="x", datatype="FP32", shape=(4,))
FACTOR = TensorSpec(name="factor", datatype="INT32", shape=(1,))


def linear() -> nn.Linear:
    """The same weights every time."""
    layer = nn.Linear(4, CLASSES)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(np.random.default_rng(1).normal(size=(CLASSES, 4))))
        layer.bias.zero_()
    return layer


def deep() -> nn.Module:
    """Convolution, batch norm and two layers, so that something is left to quantise before the last one."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)),
        nn.Conv2d(1, 4, 1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(16, 8),
        nn.ReLU(),
        nn.Linear(8, CLASSES),
    )


class Around(nn.Module):
    """`forward` is a function of the linear layer and the inputs."""

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.layer = linear()
        self.function = function

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.function(self.layer, *inputs)


def around(function: Callable[..., torch.Tensor]) -> Callable[[], nn.Module]:
    return lambda: Around(function)


def model_of(
    build: Callable[[], nn.Module] = linear,
    *,
    name: str = "tiny",
    max_batch_size: int = 8,
    variant: Variant | None = None,
    head: Head | None = None,
    **more: Any,
) -> FamilyModel:
    return FamilyModel(
        name=name, build=build, max_batch_size=max_batch_size, variant=variant, head=head or Head(), **more
    )


def family_of(*models: FamilyModel, **more: Any) -> Family:
    return Family(
        name="tiny",
        inputs=(INPUT,),
        classes=CLASSES,
        models=models,
        sample=lambda n: {"x": ROWS[:n]},
        quantisation_rows=lambda n: {"x": QUANTISATION_ROWS[:n]},
        **more,
    )


def two_input_family(*models: FamilyModel) -> Family:
    def sample(n: int) -> dict[str, Any]:
        return {"x": ROWS[:n], "factor": np.arange(n, dtype=np.int32)[:, None] % 5}

    return Family(name="tiny", inputs=(INPUT, FACTOR), classes=CLASSES, models=models, sample=sample)


def exported(model: FamilyModel, family: Family | None = None) -> tuple[Family, Source, bytes]:
    """The family, the model before its export, and after, with its head."""
    family = family or family_of(model)
    source = open_source(family, model)
    return family, source, with_head(source.onnx_model(), model.head)


def with_head(bare: onnx.ModelProto, head: Head | None = None) -> bytes:
    return add_head(bare, head or Head()).SerializeToString(deterministic=True)


def with_weights(onnx_model: bytes, change: Callable[[Any], Any]) -> bytes:
    """The model with `change` applied to its largest initializer."""
    model = onnx.load_model_from_string(onnx_model)
    largest = max(model.graph.initializer, key=lambda tensor: int(np.prod(tensor.dims)))
    changed = change(numpy_helper.to_array(largest).copy())
    largest.CopyFrom(numpy_helper.from_array(changed.astype(np.float32), largest.name))
    return model.SerializeToString()


def with_next_label(onnx_model: bytes) -> bytes:
    """The model with every label one too high, its scores untouched."""
    model = onnx.load_model_from_string(onnx_model)
    (producer,) = (node for node in model.graph.node if "label" in node.output)
    producer.output[list(producer.output).index("label")] = "right_label"
    model.graph.initializer.append(numpy_helper.from_array(np.array([[1]], np.int64), "one"))
    model.graph.node.append(onnx.helper.make_node("Add", ["right_label", "one"], ["label"]))
    return model.SerializeToString()


# what tests/export/test_verify.py has served
SERVED = family_of(
    model_of(name="first"),
    model_of(deep, name="second", max_batch_size=4),
    model_of(deep, name="third", variant="int8"),
)
