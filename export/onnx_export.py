"""PyTorch to ONNX; label, certainty and scores are put behind it by export/heads.py."""

from __future__ import annotations

import io
import logging
import warnings
from contextlib import contextmanager
from typing import TYPE_CHECKING

import onnx
import torch

from cascadeserve.errors import ExportRefused
from export.graph import all_nodes
from export.onnx_versions import IR_VERSION, OPSET
from export.reasons import reason_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn

    from export.family import Family, FamilyModel

_EXAMPLE_ROWS = 2


def export_onnx(family: Family, model: FamilyModel, module: nn.Module) -> onnx.ModelProto:
    """ONNX model of `module` with its output [n, classes] as the only one; the batch axis is dynamic.

    Raises:
        ExportRefused: it holds something that has no form in ONNX.

    """
    sample = family.checked_sample(_EXAMPLE_ROWS)
    example = tuple(torch.from_numpy(sample[spec.name]) for spec in family.inputs)
    names = [spec.name for spec in family.inputs]
    output = "logits" if "logits" not in names else "logits_of_model"
    buffer = io.BytesIO()
    try:
        with quiet_pytorch():
            torch.onnx.export(
                module,
                example,
                buffer,  # type: ignore[arg-type]  # takes a file object, though its annotation does not say so
                # The TorchScript exporter: its graphs carry no source paths and need no further package.
                dynamo=False,
                opset_version=OPSET,
                input_names=names,
                output_names=[output],
                dynamic_axes=_variable_axes(family) | {output: {0: "n"}},
            )
    except torch.onnx.OnnxExporterError as error:
        raise ExportRefused(
            f"{model.name}: cannot be written as ONNX ({reason_of(error)}); replace what has no form there, or "
            "export it to an .onnx file by other means and give that"
        ) from error
    exported = onnx.load_model_from_string(buffer.getvalue())
    exported.ir_version = IR_VERSION
    exported.graph.name = model.name
    for node in all_nodes(exported):
        node.doc_string = ""
    onnx.checker.check_model(exported, full_check=True)
    return exported


def _variable_axes(family: Family) -> dict[str, dict[int, str]]:
    """The batch axis of every input, and the axes that its spec leaves open."""
    return {
        spec.name: {0: "n"} | {i: f"{spec.name}_{i}" for i, size in enumerate(spec.shape, start=1) if size == -1}
        for spec in family.inputs
    }


@contextmanager
def quiet_pytorch() -> Iterator[None]:
    """PyTorch announces the successors of its exporter and of TorchScript at every call, by warnings and by its log."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", category=DeprecationWarning, module="torch")
            warnings.filterwarnings("ignore", category=DeprecationWarning, message=".*TorchScript.*")
            warnings.filterwarnings("ignore", category=UserWarning, module=r"torch\.onnx")
            warnings.filterwarnings("ignore", category=torch.jit.TracerWarning)  # type: ignore[attr-defined]
            yield
    finally:
        logger.setLevel(level)
