"""Instance counts and versions in file mode: rewrites `configs/<endpoint>.pbtxt` of the repository an endpoint reads.

Only the instance group and the version policy change, so Triton updates the model in place when it is asked to load it
again; the change outlives a restart of the server and no other endpoint sees it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cascadeserve.endpoint_config import endpoint_config_path, with_instances_of, write_config, write_config_text
from cascadeserve.errors import InvalidArtefact
from cascadeserve.triton_config import config_digest, parse_config, read_config, with_versions

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

    from cascadeserve.cluster import Cluster


class InstanceConfig:
    """The endpoint configs under one repository."""

    def __init__(self, repository: Path, cluster: Cluster) -> None:
        """`repository` is the folder the servers were started on."""
        self._repository = repository
        self._cluster = cluster

    def write(self, endpoint: str, model: str, count: int, versions: Iterable[int]) -> str:
        """Have `count` (>= 1) instances of each of these versions, and return the former text of the file.

        Raises:
            InvalidArtefact: the file cannot be read or replaced, is no model config, or not the model's own but for
                instances and versions. Triton loads one that lost its inputs and outputs, or everything, without a
                word, and the model answers nothing.

        """
        path = endpoint_config_path(self._repository, model, endpoint)
        try:
            former = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise InvalidArtefact(f"is no text in UTF-8 ({error})", path=path) from error
        except OSError as error:
            raise InvalidArtefact(f"cannot be read ({error.strerror})", path=path) from error
        present = parse_config(former, path=path)
        if config_digest(present) != config_digest(read_config(self._repository / model / "config.pbtxt")):
            problem = f"differs from {model}/config.pbtxt in more than instances and versions; restore what was changed"
            raise InvalidArtefact(problem, path=path)
        wanted = with_instances_of(self._cluster.endpoint(endpoint), with_versions(present, versions), count)
        try:
            write_config(self._repository, path, wanted)
        except OSError as error:
            # which of itself says neither where nor, of a full disk, what for
            raise InvalidArtefact(f"cannot be replaced ({error.strerror})", path=path) from error
        return former

    def restore(self, endpoint: str, model: str, text: str) -> None:
        """Put a former text back."""
        write_config_text(self._repository, endpoint_config_path(self._repository, model, endpoint), text)
