from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from cascadeserve.cluster import CpuDevice, Endpoint
from cascadeserve.errors import UsageError
from cascadeserve.local_triton import cli, server
from cascadeserve.local_triton.cli import triton

if TYPE_CHECKING:
    from pathlib import Path

CLUSTER = """schema_version = 1
[[endpoints]]
name = "triton0"
grpc = "127.0.0.1:1"
http = "127.0.0.1:2"
metrics = "127.0.0.1:3"
device = { kind = "cpu", cores = [0] }
"""


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "repository"
    for name in ("small", "large"):
        (folder / name).mkdir(parents=True)
        (folder / name / "config.pbtxt").write_text(f'name: "{name}"\n')
    (folder / "large" / "configs").mkdir()
    (folder / "large" / "configs" / "baseline.pbtxt").write_text('name: "large"\n')
    (tmp_path / "cluster.toml").write_text(CLUSTER)
    return folder


@pytest.mark.parametrize("options", [["--config-name=other"], ["--config-name=baseline", "--model=small"]])
def test_a_config_that_no_model_has_is_refused(repository: Path, options: list[str]) -> None:
    common = [f"--cluster={repository.parent / 'cluster.toml'}", f"--repository={repository}"]
    with pytest.raises(UsageError, match="--config-name: no model to load has a configs/"):
        CliRunner().invoke(triton, [*common, *options], catch_exceptions=False)
    assert not (repository.parent / ".cascadeserve").exists()


def test_the_server_is_told_which_configs_to_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "_wheel_folder", lambda: tmp_path)
    monkeypatch.setattr(server, "prepare_backends", lambda state: state)
    device = CpuDevice(cores=(0,))
    endpoint = Endpoint(name="here", grpc="127.0.0.1:1", http="127.0.0.1:2", metrics="127.0.0.1:3", device=device)
    for config_name, expected in ((None, "here"), ("baseline", "baseline")):
        triton_server = server.LocalTriton(
            endpoint, repository=tmp_path, models=["m"], state=tmp_path, config_name=config_name
        )
        assert f"--model-config-name={expected}" in triton_server.command()


TENSORRT = """name: "small"
optimization { execution_accelerators { gpu_execution_accelerator { name: "tensorrt" } } }
"""


@pytest.fixture
def with_tensorrt(repository: Path) -> Path:
    (repository / "small" / "config.pbtxt").write_text(TENSORRT)
    return repository


def started(repository: Path, monkeypatch: pytest.MonkeyPatch, *options: str) -> tuple[list[str], str]:
    """Models that the server was to load, and what was said on standard error."""
    loaded: list[str] = []

    class Server:
        def __init__(self, _: Endpoint, *, models: list[str], **__: object) -> None:
            loaded.extend(models)

    async def run(_: Server) -> None:
        pass

    monkeypatch.setattr(cli, "LocalTriton", Server)
    monkeypatch.setattr(cli, "_run", run)
    common = [f"--cluster={repository.parent / 'cluster.toml'}", f"--repository={repository}"]
    result = CliRunner().invoke(
        triton, [*common, f"--state={repository.parent / 'state'}", *options], catch_exceptions=False
    )
    return loaded, result.stderr


def test_a_cpu_serves_the_models_that_are_not_made_for_tensorrt(
    with_tensorrt: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, said = started(with_tensorrt, monkeypatch)
    assert loaded == ["large"]
    assert said == "not served on endpoint 'triton0', a CPU: small (made for TensorRT)\n"


def test_a_gpu_serves_them_all(with_tensorrt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = with_tensorrt.parent / "cluster.toml"
    path.write_text(path.read_text().replace('{ kind = "cpu", cores = [0] }', '{ kind = "gpu" }'))
    assert started(with_tensorrt, monkeypatch) == (["large", "small"], "")


@pytest.mark.parametrize("others", [True, False])
def test_a_cpu_refuses_a_model_made_for_tensorrt_that_is_named_or_alone(
    with_tensorrt: Path, monkeypatch: pytest.MonkeyPatch, *, others: bool
) -> None:
    if not others:
        (with_tensorrt / "large" / "config.pbtxt").write_text(TENSORRT.replace("small", "large"))
    with pytest.raises(UsageError, match="is made for TensorRT, which needs a GPU, and endpoint 'triton0' is a CPU"):
        started(with_tensorrt, monkeypatch, *(["--model=small"] if others else []))
