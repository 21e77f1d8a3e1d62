"""Model files of the smallest models, each with the weights of `tiny_torch.linear` or `deep`, and a family file."""

from __future__ import annotations

import json
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import torch
from onnx import parser

from tests.export.tiny_torch import CLASSES, exported, linear, model_of

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from torch import nn

NUM_ROWS = 700
X = np.random.default_rng(3).random((NUM_ROWS, 4), dtype=np.float32)
EXAMPLE = torch.from_numpy(X[:2])


def torchscript(path: Path, build: Callable[[], nn.Module] = linear, *, trace: bool = False) -> Path:
    module = build().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (torch.jit.trace(module, (EXAMPLE,)) if trace else torch.jit.script(module)).save(str(path))
    return path


def torch_export(path: Path, build: Callable[[], nn.Module] = linear, *, fixed: bool = False) -> Path:
    shapes = None if fixed else ({0: torch.export.Dim("n", min=1, max=4096)},)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.export.save(torch.export.export(build().eval(), (EXAMPLE,), dynamic_shapes=shapes), path)
    return path


def onnx_file(path: Path, build: Callable[[], nn.Module] = linear) -> Path:
    onnx.save(exported(model_of(build))[1].onnx_model(), path)
    return path


def onnx_text(path: Path, text: str, opset: int = 17) -> Path:
    onnx.save(parser.parse_model(f'<ir_version: 9, opset_import: ["": {opset}, "mine": 1]> {text}'), path)
    return path


def rows_file(path: Path, **changes: Any) -> Path:
    """Labelled rows; a change of None leaves an array out."""
    with torch.inference_mode():
        label = linear()(torch.from_numpy(X)).argmax(1).numpy()
    arrays = {"input:x": X, "label": label} | changes
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})
    return path


def family_toml(path: Path, *models: dict[str, Any], **changes: Any) -> Path:
    """A family file with these models; its rows lie beside it."""
    fields = {"schema_version": 1, "name": "tiny", "classes": CLASSES, "rows": "rows.npz"}
    fields |= {key: value for key, value in changes.items() if key != "input"}
    spec = {"name": "x", "datatype": "FP32", "shape": [4]} | changes.get("input", {})
    parts = ["\n".join(f"{key} = {_toml(value)}" for key, value in fields.items())]
    for table, entries in (("inputs", [spec]), ("models", models)):
        parts += [
            f"[[{table}]]\n" + "\n".join(f"{key} = {_toml(value)}" for key, value in entry.items()) for entry in entries
        ]
    path.write_text("\n\n".join(parts))
    return path


def _toml(value: Any) -> str:
    return json.dumps(value)
