"""The cluster file: the endpoints a plan may use and how they are reached."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from msgspec import Meta

from cascadeserve.artefacts import Artefact, read_toml
from cascadeserve.errors import InvalidArtefact
from cascadeserve.gear_plan import Count, Name

if TYPE_CHECKING:
    from pathlib import Path

Address = Annotated[str, Meta(pattern=r"\A(?:\[[0-9A-Fa-f:.]+\]|[^\s:/\[\]]+):[0-9]{1,5}\Z")]

_LAST_PORT = 65535


class CpuDevice(Artefact, frozen=True, kw_only=True, tag_field="kind", tag="cpu"):
    """A set of CPU cores; a server started locally is pinned to them."""

    cores: Annotated[tuple[Annotated[int, Meta(ge=0)], ...], Meta(min_length=1)]


class GpuDevice(Artefact, frozen=True, kw_only=True, tag_field="kind", tag="gpu"):
    """One GPU, by its index as the server sees it."""

    index: Annotated[int, Meta(ge=0)] = 0


class Endpoint(Artefact, frozen=True, kw_only=True):
    """One tritonserver, owning exactly one device."""

    name: Name
    grpc: Address
    http: Address
    metrics: Address
    device: CpuDevice | GpuDevice
    # how many batches the device executes at full speed; slots + 1 are kept in flight
    slots: Count = 1
    # devices of one kind are equally fast: one profile applies to all of them; null: `cpu` or `gpu`, as the device is
    device_kind: Name | None = None
    # what models may take of the device's memory; null: it does not limit them
    memory_bytes: Count | None = None
    # in any currency, one for the whole file
    cost_per_hour: Annotated[float, Meta(ge=0.0, le=1e9)] = 0.0

    @property
    def kind(self) -> str:
        """The kind of its device, by which its profile is found."""
        return self.device_kind or ("cpu" if isinstance(self.device, CpuDevice) else "gpu")


class Cluster(Artefact, frozen=True, kw_only=True):
    """All endpoints, in the order in which ties between them are broken."""

    schema_version: Literal[1]
    # at least one
    endpoints: tuple[Endpoint, ...] = ()

    def endpoint(self, name: str) -> Endpoint:
        """Endpoint by name."""
        return next(endpoint for endpoint in self.endpoints if endpoint.name == name)


def read_cluster(path: Path) -> Cluster:
    """Read and check a cluster file.

    Raises:
        InvalidArtefact: naming the field.

    """
    cluster = read_toml(path, Cluster)
    if not cluster.endpoints:
        raise InvalidArtefact("lists none; describe at least one under [[endpoints]]", path=path, field="$.endpoints")
    names: set[str] = set()
    addresses: dict[str, str] = {}
    for index, endpoint in enumerate(cluster.endpoints):
        field = f"$.endpoints[{index}]"
        if endpoint.name in names:
            raise InvalidArtefact(f"endpoint {endpoint.name!r} is named twice", path=path, field=f"{field}.name")
        names.add(endpoint.name)
        for kind in ("grpc", "http", "metrics"):
            address = getattr(endpoint, kind)
            if not 1 <= int(address.rpartition(":")[2]) <= _LAST_PORT:
                raise InvalidArtefact(
                    f"{address} has no port from 1 to {_LAST_PORT}", path=path, field=f"{field}.{kind}"
                )
            if address in addresses:
                raise InvalidArtefact(
                    f"{address} is used already at {addresses[address]}", path=path, field=f"{field}.{kind}"
                )
            addresses[address] = f"{field}.{kind}"
    return cluster
