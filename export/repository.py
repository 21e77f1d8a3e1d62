"""Writes models into a Triton model repository: file by file whole or not at all, and only what changed.

A version is a folder named by its number. What is being written stands in a hidden *file* beside the models until it is
complete: Triton takes every folder of a repository for a model, hidden ones too, and passes over files.
"""

from __future__ import annotations

import os
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cascadeserve.errors import ExportRefused
from cascadeserve.triton_config import cascade_model_config, format_config, model_versions, parse_config, read_config
from export.config_lint import different_fields
from export.tensorrt import ask_for_tensorrt

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from export.family import Family, FamilyModel

_CONFIG = Path("config.pbtxt")
_FILE = "model.onnx"


def model_config(family: Family, model: FamilyModel, onnx_model: bytes, versions: Sequence[int] = (1,)) -> str:
    """Text of a model's `config.pbtxt`, with a version policy only where there are several `versions`.

    Without one Triton serves the newest version alone, and a plan that names an older one would stand still.
    """
    config = cascade_model_config(
        model.name,
        family.inputs,
        num_classes=family.classes,
        max_batch_size=model.max_batch_size,
        scores=model.head.keep_scores,
    )
    if model.variant == "tensorrt":
        ask_for_tensorrt(config, onnx_model)
    if len(versions) > 1:
        config.version_policy.specific.versions.extend(sorted(versions))
    return format_config(config)


def write_model(repository: Path, family: Family, model: FamilyModel, onnx_model: bytes, version: int = 1) -> bool:
    """Bring version `version` of `<repository>/<model>` up to date; returns whether anything changed.

    A model that has one version may be written anew in its place. Where there are several, somebody counts on what they
    are: none of them changes any more, and a new one gets a higher number. Endpoint configs (`configs/`) are the
    owner's and not looked at.

    Raises:
        ExportRefused: the folder holds other files, the version stands there with other content or is not the newest,
            the new version would need another config than those beside it, or the disk refuses.

    """
    target = repository / model.name
    config = check_model(repository, family, model, onnx_model, version)
    with _disk_refusals(target):
        return _bring_up_to_date(target, {target / str(version) / _FILE: onnx_model}, config)


def check_model(repository: Path, family: Family, model: FamilyModel, onnx_model: bytes, version: int = 1) -> str:
    """Refuse what `write_model` would, but for the disk, and return the text of the config it would write."""
    target = repository / model.name
    with _disk_refusals(target):
        versions = _present_versions(target, {_FILE})
        config = model_config(family, model, onnx_model, sorted(versions | {version}))
        path = target / str(version) / _FILE
        if versions - {version}:
            _refuse_another_version(path, model, onnx_model, versions)
            _refuse_another_config(target / _CONFIG, config)
    return config


def write_folder(target: Path, files: dict[str, bytes], config: str) -> bool:
    """Bring a model folder up to date whose only version, 1, consists of `files`; returns whether anything changed.

    Raises:
        ExportRefused: the folder holds other files, or the disk refuses.

    """
    check_folder(target, files)
    with _disk_refusals(target):
        return _bring_up_to_date(target, {target / "1" / name: data for name, data in files.items()}, config)


def check_folder(target: Path, files: Collection[str]) -> None:
    """Check that a model folder, if it is there, holds a version 1 with some of these files and nothing else.

    Raises:
        ExportRefused: it does not, or cannot be read.

    """
    with _disk_refusals(target):
        if others := _present_versions(target, files) - {1}:
            raise ExportRefused(f"{target} holds version {max(others)}, which this command did not write; remove it")


def _bring_up_to_date(target: Path, files: dict[Path, bytes], config: str) -> bool:
    # the config last: a model folder without one is not loaded
    wanted = files | {target / _CONFIG: config.encode()}
    changed = {path: data for path, data in wanted.items() if not _holds(path, data)}
    if changed:
        _replace_files(target.parent, changed)
    return bool(changed)


@contextmanager
def _disk_refusals(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = f"{error.filename or target.parent}: {error.strerror or error}"
        raise ExportRefused(
            f"{target.name}: cannot be written ({where}); make room or give write access, or choose another "
            "--repository"
        ) from error


def _present_versions(target: Path, files: Collection[str]) -> set[int]:
    """Versions that the folder holds, each made of some of `files` and what Python leaves beside them.

    Raises:
        ExportRefused: it is no folder, or holds what was not written here.

    """
    if target.exists() and not target.is_dir():
        raise ExportRefused(f"{target} is no folder; remove it or choose another --repository")
    folders = {str(version) for version in model_versions(target)}
    versions = set()
    foreign = []
    for path in target.rglob("*"):
        name = path.relative_to(target)
        if name.parts[0] == "configs" or name == _CONFIG:
            continue
        in_version = name.parts[0] in folders
        if in_version and len(name.parts) == 2 and name.name in files:  # noqa: PLR2004 - the version and a file
            versions.add(int(name.parts[0]))
        elif not (in_version and (name.parts[1:] == () or "__pycache__" in name.parts)):
            foreign.append(name)
    if foreign:
        # a file says more than the folder it is in
        first = min(foreign, key=lambda name: ((target / name).is_dir(), name))
        raise ExportRefused(
            f"{target} holds {first}, which this command did not write; remove it or choose another --repository"
        )
    return versions


def _refuse_another_version(path: Path, model: FamilyModel, onnx_model: bytes, versions: set[int]) -> None:
    target, version, newest = path.parent.parent, int(path.parent.name), max(versions)
    advice = f"export it with --version {newest + 1}"
    if version in versions:
        if not _holds(path, onnx_model):
            raise ExportRefused(
                f"{target} holds version {version} with other content beside other versions, and versions that stand "
                f"side by side do not change; {advice}"
            )
    elif version < newest:
        raise ExportRefused(f"{target} holds version {newest} already, so version {version} is no new one; {advice}")
    elif model.variant == "tensorrt":
        # their config names one cache, in which engines are not told apart by weights: export/tensorrt.py
        raise ExportRefused(
            f"{target} holds version {newest}, and versions of a TensorRT model would take each other's engines from "
            "their cache; give the new one a model name of its own"
        )


def _refuse_another_config(path: Path, text: str) -> None:
    if path.exists():
        present, wanted = read_config(path), parse_config(text)
        if different := different_fields(present, wanted) - {"instance_group", "version_policy"}:
            raise ExportRefused(
                f"{path} has another {min(different)} than this export needs, and versions share one config; give the "
                "new one a model name of its own"
            )


def _holds(path: Path, data: bytes) -> bool:
    return path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data


def _replace_files(repository: Path, changed: dict[Path, bytes]) -> None:
    """Write all files beside the models first, so that a full disk is met before any of them is put in its place."""
    repository.mkdir(parents=True, exist_ok=True)
    written: list[tuple[Path, Path]] = []
    try:
        for path, data in changed.items():
            handle, name = tempfile.mkstemp(prefix=".export-", dir=repository)
            written.append((Path(name), path))
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            Path(name).chmod(0o644)  # Triton may run as another user
        for temporary, path in written:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.replace(path)
    finally:
        for temporary, _ in written:
            temporary.unlink(missing_ok=True)
