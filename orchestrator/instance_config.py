"""Instance counts in file mode: rewrites `configs/<endpoint>.pbtxt` of the repository that an endpoint reads.

Only the instance group changes, so Triton updates the model in place when it is asked to load it again; the change
outlives a restart of the server and no other endpoint sees it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cascadeserve.artefacts import write_atomically
from cascadeserve.cluster import GpuDevice
from cascadeserve.triton_config import format_config, parse_config, with_instance_count

if TYPE_CHECKING:
    from pathlib import Path

    from cascadeserve.cluster import Cluster


class InstanceConfig:
    """The endpoint configs under one repository."""

    def __init__(self, repository: Path, cluster: Cluster) -> None:
        """`repository` is the folder the servers were started on."""
        self._repository = repository
        self._cluster = cluster

    def write(self, endpoint: str, model: str, count: int) -> str:
        """Set the count (>= 1) and return the former text of the file.

        Raises:
            OSError: the file cannot be read or replaced.
            InvalidArtefact: it is no model config.

        """
        path = self._path(endpoint, model)
        former = path.read_text()
        gpu = 0 if isinstance(self._cluster.endpoint(endpoint).device, GpuDevice) else None
        kind = "cpu" if gpu is None else "gpu"
        changed = with_instance_count(parse_config(former, path=path), count, kind=kind, gpu=gpu)  # type: ignore[arg-type]
        self._replace(path, format_config(changed))
        return former

    def restore(self, endpoint: str, model: str, text: str) -> None:
        """Put a former text back."""
        self._replace(self._path(endpoint, model), text)

    def _path(self, endpoint: str, model: str) -> Path:
        return self._repository / model / "configs" / f"{endpoint}.pbtxt"

    def _replace(self, path: Path, text: str) -> None:
        # Written beside the model folders: an extra file inside one would count as a changed model.
        write_atomically(path, text.encode(), temporary_directory=self._repository)
