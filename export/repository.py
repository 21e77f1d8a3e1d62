"""Writes models into a Triton model repository: whole or not at all, and only what changed."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from cascadeserve.errors import ExportRefused
from cascadeserve.triton_config import cascade_model_config, format_config

if TYPE_CHECKING:
    from export.family import Family, FamilyModel

_VERSION = "1"


def model_config(family: Family, model: FamilyModel) -> str:
    """Text of a model's `config.pbtxt`."""
    return format_config(
        cascade_model_config(model.name, family.inputs, num_classes=family.classes, max_batch_size=model.max_batch_size)
    )


def write_model(repository: Path, family: Family, model: FamilyModel, onnx_model: bytes) -> bool:
    """Bring `<repository>/<model>` up to date; returns whether anything changed. See `write_folder`."""
    wanted = {
        Path("config.pbtxt"): model_config(family, model).encode(),
        Path(_VERSION, "model.onnx"): onnx_model,
    }
    return write_folder(repository / model.name, wanted)


def write_folder(target: Path, wanted: dict[Path, bytes]) -> bool:
    """Bring a model's folder up to date with the files of a model of version 1; returns whether anything changed.

    The folder is made beside the repository's models and renamed into place. A folder of that name that holds anything
    not written here is left alone.

    Raises:
        ExportRefused: the folder holds other files.

    """
    repository = target.parent
    if target.exists() and not target.is_dir():
        raise ExportRefused(f"{target} is no folder; remove it or choose another --repository")
    if target.exists():
        present = {path.relative_to(target) for path in target.rglob("*")} - {Path(_VERSION)}
        # configs/ holds configs for servers that ask for another one by name; they are the owner's
        present = {name for name in present if name.parts[0] != "configs"}
        # a file says more than the folder it is in
        if foreign := sorted(present - wanted.keys(), key=lambda name: ((target / name).is_dir(), name)):
            raise ExportRefused(
                f"{target} holds {foreign[0]}, which this command did not write; remove it or choose another "
                "--repository"
            )
        same = present == wanted.keys() and all((target / name).read_bytes() == data for name, data in wanted.items())
        if same and (target / _VERSION).is_dir():
            return False
    repository.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".export-", dir=repository))
    try:
        # an ensemble has a version, and no file in it
        (staging / "new" / _VERSION).mkdir(parents=True)
        for name, data in wanted.items():
            path = staging / "new" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        if (target / "configs").is_dir():
            shutil.copytree(target / "configs", staging / "new" / "configs")
        if target.exists():
            target.rename(staging / "old")
        (staging / "new").rename(target)
    finally:
        if not target.exists() and (staging / "old").exists():
            (staging / "old").rename(target)
        shutil.rmtree(staging, ignore_errors=True)
    return True
