"""The working copy of a model repository that the local servers read and the orchestrator rewrites.

The repository itself is never written to. In the copy every model carries `configs/<endpoint>.pbtxt` for every
endpoint of the cluster before any server starts: a file that first appears later would count as a changed model and
cause a full reload.
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
from cascadeserve.triton_config import composing_models, instance_count, parse_config, read_config

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cascadeserve.cluster import Cluster, Endpoint


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

    Unchanged models are not touched, so that other servers may be running on the copy; instance counts that the
    orchestrator wrote there survive unless the model's config changed. Configs of other names that the repository has
    (`<model>/configs/<name>.pbtxt`) are copied; one that has the name of an endpoint gives way to the endpoint's.
    """
    prepare_state_directory(state)
    copy = state / "model_repository"
    names = model_names(repository)
    try:
        copy.mkdir(exist_ok=True)
        with _locked(state / "working-copy.lock"):
            for name in names:
                if not _same_files(repository / name, copy / name):
                    _replace_folder(repository / name, copy / name)
                _ensure_version(copy / name)
                for endpoint in cluster.endpoints:
                    _write_endpoint_config(copy, name, endpoint)
                _copy_other_configs(repository / name, copy, {endpoint.name for endpoint in cluster.endpoints})
    except OSError as error:
        what = f"{error.filename or copy}: {error.strerror}"
        raise UsageError(
            f"the working copy of {repository} cannot be written ({what}); choose another --state"
        ) from error
    return copy


def _ensure_version(model: Path) -> None:
    """Give an ensemble the version folder that Triton wants: it is empty, so git and archives may have lost it."""
    if composing_models(read_config(model / "config.pbtxt")) and not any(
        path.is_dir() and path.name.isdigit() for path in model.iterdir()
    ):
        (model / "1").mkdir()


def _write_endpoint_config(copy: Path, model: str, endpoint: Endpoint) -> None:
    source = copy / model / "config.pbtxt"
    path = endpoint_config_path(copy, model, endpoint.name)
    config = read_config(source)
    if path.exists():
        present = read_config(path)
        # the same but for the count, which is the orchestrator's to choose
        if present == with_instances_of(endpoint, config, max(instance_count(present), 1)):
            return
    path.parent.mkdir(exist_ok=True)
    write_config(copy, path, with_instances_of(endpoint, config, 1))


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


def _same_files(source: Path, copy: Path) -> bool:
    wanted, present = _files(source), _files(copy)
    # copy2 keeps modification times, so the shallow comparison (type, size, time) is enough and cheap
    return wanted.keys() == present.keys() and all(filecmp.cmp(wanted[name], present[name]) for name in wanted)


def _replace_folder(source: Path, target: Path) -> None:
    staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=target.parent.parent))
    try:
        for name, file in _files(source).items():
            path = staging / "new" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, path)
            if path.suffix == ".py":
                # What Python leaves beside a model's code counts as a change of the model, and would make its first
                # change of instances a full reload: better now than when the server imports it.
                py_compile.compile(str(path), dfile=str(target / name), doraise=False, quiet=2)
        if (target / "configs").is_dir():
            shutil.copytree(target / "configs", staging / "new" / "configs")
        if target.exists():
            target.rename(staging / "old")
        (staging / "new").rename(target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
