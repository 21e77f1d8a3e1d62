"""PyTorch to ONNX, with label, certainty and scores computed inside the graph."""

from __future__ import annotations

import io
import logging
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING

import onnx
import torch
from torch import nn

from export.onnx_versions import IR_VERSION, OPSET

if TYPE_CHECKING:
    from collections.abc import Iterator

    from export.family import Family, FamilyModel

_EXAMPLE_ROWS = 2


class CascadeHead(nn.Module):
    """Wraps a model that returns logits [n, classes]: label [n, 1], certainty [n, 1], scores [n, classes].

    Certainty is the distance between the two largest softmax probabilities (paper, appendix B).
    """

    def __init__(self, model: nn.Module) -> None:
        """`model` takes the family's inputs in order."""
        super().__init__()
        self.model = model

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return (label int64, certainty float32, scores float32)."""
        scores = torch.softmax(self.model(*inputs).float(), dim=1)
        top, index = torch.topk(scores, k=2, dim=1)
        return index[:, :1], top[:, :1] - top[:, 1:], scores


def export_onnx(family: Family, model: FamilyModel, module: nn.Module) -> bytes:
    """Serialised ONNX model of `module` with the cascade head; the batch axis is dynamic."""
    sample = family.checked_sample(_EXAMPLE_ROWS)
    example = tuple(torch.from_numpy(sample[spec.name]) for spec in family.inputs)
    names = [spec.name for spec in family.inputs]
    outputs = ["label", "certainty", "scores"]
    buffer = io.BytesIO()
    with _quiet_exporter():
        torch.onnx.export(
            CascadeHead(module).eval(),
            example,
            buffer,  # type: ignore[arg-type]  # takes a file object, though its annotation does not say so
            # The TorchScript exporter: its graphs carry no source paths and need no further package.
            dynamo=False,
            opset_version=OPSET,
            input_names=names,
            output_names=outputs,
            dynamic_axes=_variable_axes(family) | {name: {0: "n"} for name in outputs},
        )
    graph = onnx.load_model_from_string(buffer.getvalue())
    graph.ir_version = IR_VERSION
    graph.graph.name = model.name
    for node in graph.graph.node:
        node.doc_string = ""
    onnx.checker.check_model(graph, full_check=True)
    return graph.SerializeToString(deterministic=True)


def _variable_axes(family: Family) -> dict[str, dict[int, str]]:
    """The batch axis of every input, and the axes that its spec leaves open."""
    return {
        spec.name: {0: "n"} | {i: f"{spec.name}_{i}" for i, size in enumerate(spec.shape, start=1) if size == -1}
        for spec in family.inputs
    }


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """PyTorch announces its exporter's successor at every call, through warnings and through its log."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")
            warnings.filterwarnings("ignore", category=DeprecationWarning, message=".*TorchScript.*")
            warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # type: ignore[attr-defined]
            yield
    finally:
        logger.setLevel(level)
