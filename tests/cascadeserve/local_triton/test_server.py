from __future__ import annotations

import mmap
import os
import socket
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cascadeserve.cluster import CpuDevice, Endpoint, GpuDevice
from cascadeserve.errors import ServerStartFailed, UsageError
from cascadeserve.local_stack import free_ports
from cascadeserve.local_triton import server

if TYPE_CHECKING:
    from collections.abc import Iterator

OLD_S = 1_000_000_000


@pytest.fixture
def region() -> Iterator[Path]:
    path = Path(f"{server._REGION}test-{uuid.uuid4()}")
    path.write_bytes(bytes(mmap.PAGESIZE))
    yield path
    path.unlink(missing_ok=True)


def test_shared_memory_that_a_crashed_server_left_behind_is_removed(region: Path) -> None:
    server._remove_stale_regions()
    assert region.exists(), "a young file may belong to a server that is just starting"
    os.utime(region, (OLD_S, OLD_S))
    server._remove_stale_regions()
    assert not region.exists()


def test_shared_memory_in_use_stays_however_old(region: Path) -> None:
    os.utime(region, (OLD_S, OLD_S))
    with region.open("r+b") as file, mmap.mmap(file.fileno(), 0):
        server._remove_stale_regions()
        assert region.exists()


def test_the_old_server_is_served_on_loopback_only(tmp_path: Path) -> None:
    endpoint = Endpoint(
        name="a", grpc="0.0.0.0:1", http="127.0.0.1:2", metrics="127.0.0.1:3", device=CpuDevice(cores=(0,))
    )
    with pytest.raises(UsageError, match=r"127\.0\.0\.1 only"):
        server.LocalTriton(endpoint, repository=tmp_path, models=["m"], state=tmp_path)


@pytest.mark.parametrize("field", ["http", "grpc", "metrics"])
async def test_a_taken_port_is_named_with_what_to_do(field: str, tmp_path: Path) -> None:
    http, grpc, metrics = (f"127.0.0.1:{port}" for port in free_ports(3))
    device = CpuDevice(cores=(min(os.sched_getaffinity(0)),))
    endpoint = Endpoint(name="a", http=http, grpc=grpc, metrics=metrics, device=device)
    address = getattr(endpoint, field)
    taken = ("127.0.0.1", int(address.rpartition(":")[2]))
    with socket.create_server(taken), pytest.raises(ServerStartFailed) as refused:
        await server.LocalTriton(endpoint, repository=tmp_path, models=["m"], state=tmp_path).start()
    assert str(refused.value) == (
        f"endpoint 'a': its {field} address {address} cannot be listened on (Address already in use); "
        "end what uses it, or give another port in the cluster file"
    )


async def test_a_gpu_that_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr("ctypes.CDLL", absent)
    http, grpc, metrics = (f"127.0.0.1:{port}" for port in free_ports(3))
    endpoint = Endpoint(name="a", http=http, grpc=grpc, metrics=metrics, device=GpuDevice(index=0))
    with pytest.raises(ServerStartFailed, match=r"^endpoint 'a': its device is a GPU, but no NVIDIA driver is found"):
        await server.LocalTriton(endpoint, repository=tmp_path, models=["m"], state=tmp_path).start()


async def test_a_start_that_fails_carries_the_last_error_of_this_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = 'E0101 00:00:00.0 1 model.cc:1] "no such model"'
    monkeypatch.setattr(server.LocalTriton, "command", lambda _: ["/bin/sh", "-c", f"echo '{said}'; echo bye; exit 1"])
    monkeypatch.setattr(server.LocalTriton, "_environment", lambda _: dict(os.environ))
    http, grpc, metrics = (f"127.0.0.1:{port}" for port in free_ports(3))
    endpoint = Endpoint(
        name="a", http=http, grpc=grpc, metrics=metrics, device=CpuDevice(cores=(min(os.sched_getaffinity(0)),))
    )
    path = tmp_path / "a.log"
    path.write_text("error: of an earlier run\n")
    for expected in ("no such model", "bye"):
        with path.open("ab") as log, pytest.raises(ServerStartFailed) as failed:
            await server.LocalTriton(endpoint, repository=tmp_path, models=["m"], state=tmp_path, log=log).start()
        assert str(failed.value) == f"tritonserver of endpoint 'a' ended with status 1 while starting: {expected}"
        said = "nothing of note"
