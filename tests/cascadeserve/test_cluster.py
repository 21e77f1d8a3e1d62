from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from cascadeserve.cluster import CpuDevice, GpuDevice, read_cluster
from cascadeserve.errors import InvalidArtefact

if TYPE_CHECKING:
    from pathlib import Path

CPU = """
[[endpoints]]
name = "a"
grpc = "127.0.0.1:8001"
http = "127.0.0.1:8000"
metrics = "127.0.0.1:8002"
device = { kind = "cpu", cores = [0, 2] }
"""
GPU = """
[[endpoints]]
name = "b"
grpc = "gpu-host:8001"
http = "gpu-host:8000"
metrics = "gpu-host:8002"
device = { kind = "gpu", index = 1 }
slots = 2
"""
VALID = f"schema_version = 1\n{CPU}{GPU}"


def written(folder: Path, text: str) -> Path:
    path = folder / "cluster.toml"
    path.write_text(text)
    return path


def test_endpoints_keep_their_order_devices_and_slots(tmp_path: Path) -> None:
    cluster = read_cluster(written(tmp_path, VALID))
    assert [endpoint.name for endpoint in cluster.endpoints] == ["a", "b"]
    assert cluster.endpoint("a").device == CpuDevice(cores=(0, 2))
    assert cluster.endpoint("b").device == GpuDevice(index=1)
    assert [endpoint.slots for endpoint in cluster.endpoints] == [1, 2]


def test_a_device_is_of_the_kind_that_is_named_or_of_what_it_is(tmp_path: Path) -> None:
    plain = read_cluster(written(tmp_path, VALID))
    assert [endpoint.kind for endpoint in plain.endpoints] == ["cpu", "gpu"]
    assert [(endpoint.memory_bytes, endpoint.cost_per_hour) for endpoint in plain.endpoints] == [(None, 0.0)] * 2
    more = 'device_kind = "l4"\nmemory_bytes = 24_000_000_000\ncost_per_hour = 0.7\n'
    (_, gpu) = read_cluster(written(tmp_path, VALID + more)).endpoints
    assert (gpu.kind, gpu.memory_bytes, gpu.cost_per_hour) == ("l4", 24_000_000_000, 0.7)


WRONG = {
    "name used twice": (('"b"', '"a"'), "$.endpoints[1].name"),
    "address used twice": (('"gpu-host:8001"', '"127.0.0.1:8000"'), "$.endpoints[1].grpc"),
    "address used twice in one endpoint": (('"gpu-host:8002"', '"gpu-host:8000"'), "$.endpoints[1].metrics"),
    "address without port": (('"127.0.0.1:8001"', '"127.0.0.1"'), "$.endpoints[0].grpc"),
    "address with scheme": (('"127.0.0.1:8000"', '"http://127.0.0.1:8000"'), "$.endpoints[0].http"),
    "address that ends in a line break": (('"127.0.0.1:8000"', '"127.0.0.1:8000\\n"'), "$.endpoints[0].http"),
    "port beyond 65535": (('"127.0.0.1:8000"', '"127.0.0.1:65536"'), "$.endpoints[0].http"),
    "unknown key": (("slots = 2", "slot = 2"), "$.endpoints[1]"),
    "no slots": (("slots = 2", "slots = 0"), "$.endpoints[1].slots"),
    "unknown device kind": (('"gpu", index', '"tpu", index'), "$.endpoints[1].device.kind"),
    "device without kind": (('kind = "gpu", ', ""), "$.endpoints[1].device"),
    "no cores": (("[0, 2]", "[]"), "$.endpoints[0].device.cores"),
    "negative core": (("[0, 2]", "[-1]"), "$.endpoints[0].device.cores[0]"),
    "cores of a GPU": (("index = 1", "cores = [1]"), "$.endpoints[1].device"),
    "device kind of two words": (("slots = 2", 'device_kind = "two words"'), "$.endpoints[1].device_kind"),
    "device kind without a name": (("slots = 2", 'device_kind = ""'), "$.endpoints[1].device_kind"),
    "no memory": (("slots = 2", "memory_bytes = 0"), "$.endpoints[1].memory_bytes"),
    "negative cost": (("slots = 2", "cost_per_hour = -0.1"), "$.endpoints[1].cost_per_hour"),
    "infinite cost": (("slots = 2", "cost_per_hour = inf"), "$.endpoints[1].cost_per_hour"),
    "cost that is no number": (("slots = 2", "cost_per_hour = nan"), "$.endpoints[1].cost_per_hour"),
    "newer schema": (("schema_version = 1", "schema_version = 2"), "$.schema_version"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_cluster_is_refused_with_file_and_field(case: str, tmp_path: Path) -> None:
    (old, new), field = WRONG[case]
    assert old in VALID
    path = written(tmp_path, VALID.replace(old, new, 1))
    with pytest.raises(InvalidArtefact) as caught:
        read_cluster(path)
    assert (caught.value.path, caught.value.field) == (path, field)


def test_an_address_used_twice_is_refused_naming_its_first_use(tmp_path: Path) -> None:
    with pytest.raises(InvalidArtefact, match=r"127\.0\.0\.1:8000 is used already at \$\.endpoints\[0\]\.http"):
        read_cluster(written(tmp_path, VALID.replace("gpu-host:8001", "127.0.0.1:8000")))


@pytest.mark.parametrize("data", [b"endpoints = [", b'name = "\xff"', b""], ids=["bad TOML", "not UTF-8", "empty"])
def test_what_is_no_cluster_file_is_refused_naming_the_file(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "cluster.toml"
    path.write_bytes(data)
    with pytest.raises(InvalidArtefact) as caught:
        read_cluster(path)
    assert caught.value.path == path
