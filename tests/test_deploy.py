"""The compose files and what they mount, held to what can be said of them without running them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from cascadeserve.cluster import read_cluster
from orchestrator.metrics import Metrics

ROOT = Path(__file__).parent.parent
COMPOSE_FILES = sorted(ROOT.glob("docker-compose*.yml"))
# what `${NAME:-value}` stands for when nobody sets it
_DEFAULT = re.compile(r"\$\{\w+:-([^}]*)\}")


def services(path: Path) -> dict[str, dict[str, Any]]:
    return dict(yaml.safe_load(_DEFAULT.sub(r"\1", path.read_text()))["services"])


def every_service() -> list[Any]:
    found = [(path, name, service) for path in COMPOSE_FILES for name, service in services(path).items()]
    # an overlay that only changes a service of another file states no image
    return [pytest.param(service, id=f"{path.name}-{name}") for path, name, service in found if "image" in service]


@pytest.mark.parametrize("service", every_service())
def test_every_service_is_confined(service: dict[str, Any]) -> None:
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert service["pids_limit"] > 0
    assert service["logging"]["options"]["max-size"]


@pytest.mark.parametrize("service", every_service())
def test_images_are_pinned(service: dict[str, Any]) -> None:
    assert "build" in service or re.search(r":[\w.-]+$", service["image"])
    assert not service["image"].endswith(":latest")


@pytest.mark.parametrize("path", COMPOSE_FILES, ids=lambda path: path.name)
def test_what_runs_on_is_restarted_watched_and_limited(path: Path) -> None:
    for name, service in services(path).items():
        once = name in {"plan", "prepare"}
        if "image" not in service:
            continue
        if not once:
            assert service["restart"] == "unless-stopped", name
        if not once and name != "network":  # it only sleeps
            assert "healthcheck" in service, name
        if name != "prepare":
            assert "mem_limit" in service, name


@pytest.mark.parametrize("path", COMPOSE_FILES, ids=lambda path: path.name)
def test_published_ports_are_on_loopback_unless_told_otherwise(path: Path) -> None:
    ports = [port for service in services(path).values() for port in service.get("ports", [])]
    assert all(port.startswith("127.0.0.1:") for port in ports)


@pytest.mark.parametrize("path", COMPOSE_FILES, ids=lambda path: path.name)
def test_what_is_mounted_is_there(path: Path) -> None:
    for name, service in services(path).items():
        for volume in service.get("volumes", []):
            # rows are the user's
            if volume["type"] == "bind" and volume["target"] != "/rows":
                assert (ROOT / volume["source"]).exists(), (name, volume)


@pytest.mark.parametrize("path", sorted((ROOT / "deploy").glob("cluster.*.toml")), ids=lambda path: path.name)
def test_clusters_name_the_services_of_their_file(path: Path) -> None:
    cluster = read_cluster(path)
    if "gpu" in path.name:
        known = services(ROOT / "docker-compose.yml") | services(ROOT / "docker-compose.2gpu.yml")
        for endpoint in cluster.endpoints:
            host = endpoint.grpc.partition(":")[0]
            assert known[host]["environment"]["ENDPOINT"] == endpoint.name


def metrics_in(expression: str) -> set[str]:
    return set(re.findall(r"\bcascadeserve_\w+", expression))


def known_metrics() -> set[str]:
    known = set()
    for metric in Metrics().registry.collect():
        suffixes = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(metric.type, [""])
        known |= {metric.name + suffix for suffix in suffixes}
    return known


def test_dashboard_asks_for_metrics_that_exist() -> None:
    dashboard = json.loads((ROOT / "deploy" / "grafana" / "dashboards" / "cascadeserve.json").read_text())
    asked = {
        name for panel in dashboard["panels"] for target in panel["targets"] for name in metrics_in(target["expr"])
    }
    assert asked
    assert asked <= known_metrics()


def test_alerts_ask_for_metrics_that_exist() -> None:
    groups = yaml.safe_load((ROOT / "deploy" / "prometheus" / "alerts.yml").read_text())["groups"]
    asked = {name for group in groups for rule in group["rules"] for name in metrics_in(rule["expr"])}
    assert asked
    assert asked <= known_metrics()
