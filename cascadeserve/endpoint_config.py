"""The configs of an endpoint: `<model>/configs/<endpoint>.pbtxt`, for a server with `--model-config-name=<endpoint>`.

Written first when a working copy is made, and again whenever the orchestrator changes a count.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cascadeserve.artefacts import write_atomically
from cascadeserve.cluster import GpuDevice
from cascadeserve.triton_config import ModelConfig, format_config, with_instance_count

if TYPE_CHECKING:
    from pathlib import Path

    from cascadeserve.cluster import Endpoint


def endpoint_config_path(repository: Path, model: str, endpoint: str) -> Path:
    """File of a model for an endpoint."""
    return repository / model / "configs" / f"{endpoint}.pbtxt"


def with_instances_of(endpoint: Endpoint, config: ModelConfig, count: int) -> ModelConfig:
    """Copy of a config with `count` (>= 1) instances on the endpoint's device; see `with_instance_count`.

    A server sees only the device it owns, so a GPU is number 0 to it.
    """
    if isinstance(endpoint.device, GpuDevice):
        return with_instance_count(config, count, kind="gpu", gpu=0)
    return with_instance_count(config, count, kind="cpu")


def write_config(repository: Path, path: Path, config: ModelConfig) -> None:
    """Replace the file at `path` by a config; see `write_config_text`."""
    write_config_text(repository, path, format_config(config))


def write_config_text(repository: Path, path: Path, text: str) -> None:
    """Replace the file at `path`, by way of a file beside the model folders.

    An extra file inside one, however short-lived, would count as a changed model and cause a full reload.
    """
    write_atomically(path, text.encode(), temporary_directory=repository)
