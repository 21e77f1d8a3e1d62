"""The compose files and what they mount, held to what can be said of them without running them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
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


def test_opening_the_orchestrator_leaves_grafana_shut() -> None:
    for path in COMPOSE_FILES:
        opened = path.read_text().replace("${LISTEN:-127.0.0.1}", "0.0.0.0")
        grafana = yaml.safe_load(_DEFAULT.sub(r"\1", opened))["services"].get("grafana", {"ports": []})
        assert all(port.startswith("127.0.0.1:") for port in grafana["ports"])


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


class PlanJob:
    """deploy/plan.sh with its folders under `root` and a `cascadeserve` that writes down how it was called."""

    def __init__(self, root: Path) -> None:
        self.root = root
        script = (ROOT / "deploy" / "plan.sh").read_text()
        self.script = re.sub(r"(?<![\w}.])/(state|rows|plans|config)\b", rf"{root}/\1", script)
        files = {
            "rows/search.npz": "search",
            "rows/calibration.npz": "calibration",
            "config/cluster.toml": "slots = 1",
            "config/goal.toml": "goal",
            "bin/cascadeserve": f'#!/bin/bash\necho "$@" >>{root}/calls\necho "$1" >"${{@: -1}}"\n',
            "bin/python3": f'#!/bin/bash\nexec {sys.executable} "$@"\n',
        }
        for name, content in files.items():
            self.write(name, content)
        (root / "plans").mkdir()
        for name in ("cascadeserve", "python3"):
            (root / "bin" / name).chmod(0o755)
        self.model("small")
        self.model("large", step="part")
        self.model("part")

    def write(self, name: str, content: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)

    def model(self, name: str, step: str = "") -> None:
        folder = f"state/model_repository/{name}"
        ensemble = f'platform: "ensemble" ensemble_scheduling {{ step {{ model_name: "{step}" }} }}'
        self.write(f"{folder}/config.pbtxt", f'name: "{name}" {ensemble if step else ""}')
        self.write(f"{folder}/1/model.onnx", name)

    def run(self, models: str = "small large", **options: str) -> subprocess.CompletedProcess[str]:
        path = f"{self.root}/bin:{os.environ['PATH']}"
        environment = {"PATH": path, "PYTHONPATH": str(ROOT), "FAMILY": "f", "MODELS": models, **options}
        bash = shutil.which("bash") or "bash"
        return subprocess.run([bash, "-c", self.script], env=environment, capture_output=True, text=True, check=False)

    def calls(self, **options: str) -> list[str]:
        """Run it; the commands that it called."""
        (self.root / "calls").unlink(missing_ok=True)
        done = self.run(**options)
        assert done.returncode == 0, done.stderr
        return (self.root / "calls").read_text().splitlines()

    def commands(self, **options: str) -> list[str]:
        return [call.split()[0] for call in self.calls(**options)]


def test_plan_job_measures_again_what_changed_and_nothing_else(tmp_path: Path) -> None:
    job = PlanJob(tmp_path)
    everything = ["record", "record", "profile", "plan"]
    assert job.commands() == everything
    assert job.commands() == ["plan"]
    assert job.commands(PROFILE_OPTIONS="--quick") == ["profile", "plan"]
    job.write("config/cluster.toml", "slots = 2")
    assert job.commands() == ["profile", "plan"]
    job.write("state/model_repository/part/1/model.onnx", "the ensemble `large` is made of this")
    assert job.commands() == everything


def test_plan_job_names_a_plan_by_what_it_is_made_from(tmp_path: Path) -> None:
    job = PlanJob(tmp_path)

    def name(**options: str) -> str:
        words = job.calls(**options)[-1].split()
        return words[words.index("--name") + 1]

    first = name()
    assert re.fullmatch(r"f-[0-9a-f]{12}", first)
    assert name() == first
    assert name(PLAN_NAME="mine") == "mine"
    job.write("config/goal.toml", "another goal")
    assert name() != first


def test_plan_job_takes_versions_and_says_which_are_missing(tmp_path: Path) -> None:
    job = PlanJob(tmp_path)
    assert "--model small:1 --model large" in job.calls(models="small:1 large")[0]
    refused = job.run(models="small:7 large")
    assert refused.returncode == 1
    assert refused.stderr.startswith("Error: --model small:7: the versions in")


def test_triton_is_not_started_without_models() -> None:
    done = subprocess.run(
        [shutil.which("bash") or "bash", ROOT / "deploy" / "run_triton.sh"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("Error: /models holds no model")
