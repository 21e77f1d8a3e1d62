from __future__ import annotations

import mmap
import os
import uuid
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cascadeserve.cluster import CpuDevice, Endpoint
from cascadeserve.errors import UsageError
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
