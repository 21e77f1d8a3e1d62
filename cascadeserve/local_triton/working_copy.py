"""The working copy of a model repository that the local servers read and the orchestrator rewrites.

The repository itself is never written to. In the copy every model carries `configs/<endpoint>.pbtxt` for every
endpoint of the cluster before any server starts: a file that first appears later would count as a changed model and
cause a full reload. A version of a model that comes later is copied in beside the others, whose folders are not
touched, so that a running server loads it and nothing else anew.
"""

from __future__ import annotations

import fcntl
import filecmp
import os
import py_compile
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from cascadeserve.endpoint_config import endpoint_config_path, with_instances_of, write_config, write_config_text
from cascadeserve.errors import InvalidArtefact, UsageError
from cascadeserve.triton_config import (
    config_digest,
    instance_count,
    model_versions,
    parse_config,
    read_config,
    served_versions,
    with_versions,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

    from cascadeserve.cluster import Cluster
    from cascadeserve.triton_config import ModelConfig


def model_names(repository: Path) -> list[str]:
    """Names of the models in a repository.

    Raises:
        InvalidArtefact: the folder is missing or holds no model.

    """
    if not repository.is_dir():
        raise InvalidArtefact(
            "is no folder; give the model repository that `cascadeserve export` wrote", path=repository
        )
    names = sorted(path.parent.name for path in repository.glob("*/config.pbtxt"))
    if not names:
        raise InvalidArtefact("holds no model (a folder with a config.pbtxt)", path=repository)
    return names


def prepare_state_directory(state: Path) -> None:
    """Make the state directory; like a test cache it hides itself from git."""
    try:
        state.mkdir(parents=True, exist_ok=True)
        ignore = state / ".gitignore"
        if not ignore.exists():
            ignore.write_text("*\n")
    except OSError as error:
        raise UsageError(
            f"the state directory {state} cannot be made ({error.strerror}); choose another --state"
        ) from error


def prepare_working_copy(repository: Path, cluster: Cluster, state: Path) -> Path:
    """Bring `<state>/model_repository` up to date with `repository` and return it.

    Unchanged models and versions are not touched, so that other servers may be running on the copy; instance counts and
    versions that the orchestrator wrote there survive unless the model's config changed. A server loads a version that
    is new beside those it has, once it is asked to. Configs of other names that the repository has (`<model>/configs/
    <name>.pbtxt`) are copied; one that has the name of an endpoint gives way to the endpoint's.
    """
    prepare_state_directory(state)
    copy = state / "model_repository"
    names = model_names(repository)
    try:
        copy.mkdir(exist_ok=True)
        with _locked(state / "working-copy.lock"):
            for name in names:
                _update_model(repository / name, copy / name, cluster)
                _copy_other_configs(repository / name, copy, {endpoint.name for endpoint in cluster.endpoints})
    except OSError as error:
        what = f"{error.filename or copy}: {error.strerror}"
        raise UsageError(
            f"the working copy of {repository} cannot be written ({what}); choose another --state"
        ) from error
    return copy


def _update_model(source: Path, target: Path, cluster: Cluster) -> None:
    config = read_config(source / "config.pbtxt")
    former = read_config(target / "config.pbtxt") if (target / "config.pbtxt").exists() else None
    held, versions = set(model_versions(target)), set(model_versions(source))
    moved = {str(version) for version in held ^ versions}
    if moved or not _same_files(source, target):
        same_config = former is not None and config_digest(former) == config_digest(config)
        if same_config and _same_files(source, target, apart_from={"config.pbtxt", *moved}):
            _exchange_versions(source, target, moved)
        else:
            _replace_folder(source, target)
    same_policy = former is not None and former.version_policy == config.version_policy
    for endpoint in cluster.endpoints:
        path = endpoint_config_path(target.parent, target.name, endpoint.name)
        present = read_config(path) if path.exists() else None
        wanted = with_instances_of(endpoint, config, 1)
        if present is not None:
            # the orchestrator's to choose, as long as the model is what it was
            count = max(instance_count(present), 1)
            if config_digest(present) == config_digest(config) and present == with_instances_of(
                endpoint, present, count
            ):
                wanted = with_instances_of(endpoint, config, count)
            wanted = _with_versions_of(present, wanted, held, versions, same_policy=same_policy)
        if wanted != present:
            path.parent.mkdir(exist_ok=True)
            write_config(target.parent, path, wanted)


def _with_versions_of(
    present: ModelConfig, wanted: ModelConfig, held: set[int], versions: set[int], *, same_policy: bool
) -> ModelConfig:
    """Keep serving what an endpoint serves, beside what has come; what the model's own config says where it changed."""
    if versions != held:
        served = (served_versions(present, held) | (versions - held)) & versions
        return with_versions(wanted, served or versions)
    if same_policy:
        wanted.ClearField("version_policy")
        if present.HasField("version_policy"):
            wanted.version_policy.CopyFrom(present.version_policy)
    return wanted


def _copy_other_configs(source: Path, copy: Path, endpoints: set[str]) -> None:
    """Bring along the configs that the repository itself has for a model, such as a baseline to compare with."""
    for file in sorted((source / "configs").glob("*.pbtxt")):
        path = endpoint_config_path(copy, source.name, file.stem)
        text = file.read_text()
        if file.stem in endpoints or (path.exists() and path.read_text() == text):
            continue
        parse_config(text, path=file)
        write_config_text(copy, path, text)


def _files(folder: Path) -> dict[str, Path]:
    """Files of a model folder by relative name, without the endpoint configs and what Python leaves behind."""
    files: dict[str, Path] = {}
    for root, folders, names in os.walk(folder, followlinks=True):
        if Path(root) == folder:
            folders[:] = [name for name in folders if name != "configs"]
        folders[:] = [name for name in folders if name != "__pycache__"]
        files |= {str((Path(root) / name).relative_to(folder)): Path(root) / name for name in names}
    return files


def _same_files(source: Path, copy: Path, *, apart_from: Collection[str] = ()) -> bool:
    """Whether both hold the same files; `apart_from` names entries of the two folders that are not looked at."""
    wanted, present = (
        {name: file for name, file in _files(folder).items() if Path(name).parts[0] not in apart_from}
        for folder in (source, copy)
    )
    # copy2 keeps modification times, so the shallow comparison (type, size, time) is enough and cheap
    return wanted.keys() == present.keys() and all(filecmp.cmp(wanted[name], present[name]) for name in wanted)


def _exchange_versions(source: Path, target: Path, versions: Collection[str]) -> None:
    """Take in those version folders that only the source has, take out those that only the target has."""
    staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=target.parent.parent))
    try:
        (staging / "old").mkdir()
        coming = {version for version in versions if (source / version).is_dir()}
        _copy_files(source, staging / "new", coming, goes_to=target)
        for version in sorted(coming):
            (staging / "new" / version).rename(target / version)
        for version in sorted(set(versions) - coming):
            (target / version).rename(staging / "old" / version)
        text = (source / "config.pbtxt").read_text(encoding="utf-8")
        if text != (target / "config.pbtxt").read_text(encoding="utf-8"):
            write_config_text(target.parent, target / "config.pbtxt", text)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _replace_folder(source: Path, target: Path) -> None:
    staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=target.parent.parent))
    try:
        _copy_files(source, staging / "new", {path.name for path in source.iterdir()}, goes_to=target)
        if (target / "configs").is_dir():
            shutil.copytree(target / "configs", staging / "new" / "configs")
        if target.exists():
            target.rename(staging / "old")
        (staging / "new").rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _copy_files(source: Path, target: Path, entries: Collection[str], *, goes_to: Path) -> None:
    """Copy some entries of a model folder; folders of versions also where they are empty, as an ensemble's may be.

    What Python leaves beside a model's code counts for Triton as a change of the model, and would make its first change
    of instances a full reload. So code is compiled here, before a server sees it, under the name `goes_to` gives it.
    """
    for version in model_versions(source):
        if str(version) in entries:
            (target / str(version)).mkdir(parents=True)
    for name, file in _files(source).items():
        if Path(name).parts[0] in entries:
            path = target / name
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, path)
            if path.suffix == ".py":
                py_compile.compile(str(path), dfile=str(goes_to / name), doraise=False, quiet=2)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
