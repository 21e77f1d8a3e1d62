"""Repositories in which a model of the digits family runs inside a `model.py` of ours."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from cascadeserve.artefacts import write_atomically
from cascadeserve.demo.family import REPOSITORY
from cascadeserve.local_triton import onnxruntime_backend
from cascadeserve.triton_config import format_config, parse_config

if TYPE_CHECKING:
    from collections.abc import Mapping

_PACED = Path(__file__).with_name("paced") / "model.py"


def write_wrapped(repository: Path, model: str, program: Path, parameters: Mapping[str, str]) -> None:
    """Write a model into a repository, as it is but run by `program`, which finds `parameters` in its config.

    `onnx_backend.py` beside it is the local server's own ONNX backend, for programs that ask the model itself.
    """
    source, version = REPOSITORY / model, repository / model / "1"
    config = parse_config((source / "config.pbtxt").read_text(), path=source / "config.pbtxt")
    config.backend, config.default_model_filename = "python", "model.py"
    for name, value in parameters.items():
        config.parameters[name].string_value = value
    version.mkdir(parents=True, exist_ok=True)
    write_atomically(repository / model / "config.pbtxt", format_config(config).encode())
    shutil.copyfile(source / "1" / "model.onnx", version / "model.onnx")
    shutil.copyfile(program, version / "model.py")
    shutil.copyfile(onnxruntime_backend.__path__[0] + "/model.py", version / "onnx_backend.py")


def write_paced(repository: Path, model: str, first_s: float, row_s: float) -> None:
    """Write a model that takes so many seconds of processor time for a batch, and for each row of it."""
    write_wrapped(repository, model, _PACED, {"pace_first_s": str(first_s), "pace_row_s": str(row_s)})
