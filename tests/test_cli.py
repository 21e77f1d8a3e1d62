from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from typing import TYPE_CHECKING

import click
import pytest

from cascadeserve import __version__, cli
from cascadeserve.errors import ServerStartFailed
from orchestrator.lease import lease
from tests.fakes import tiny

if TYPE_CHECKING:
    from pathlib import Path

CLUSTER = """
schema_version = 1

[[endpoints]]
name = "a"
grpc = "127.0.0.1:18001"
http = "127.0.0.1:18000"
metrics = "127.0.0.1:18002"
device = { kind = "cpu", cores = [0] }
"""
SECOND_ENDPOINT = CLUSTER.partition("1\n")[2].replace('"a"', '"b"').replace(":1800", ":1900")


def outcome(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of one call."""
    try:
        cli.main(arguments)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    else:
        status = 0
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(tiny.plan_document()))
    return path


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    path = tmp_path / "cluster.toml"
    path.write_text(CLUSTER)
    return path


def test_help_lists_every_command_and_imports_nothing_heavy() -> None:
    program = "import sys; from cascadeserve.cli import main; main(['--help']); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)
    for command in cli._COMMANDS:
        assert f"\n  {command} " in done.stdout
    loaded = {name.partition(".")[0] for name in done.stderr.split()}
    heavy = {"aiohttp", "grpc", "numpy", "scipy", "torch", "tritonclient", "export", "orchestrator", "planner"}
    assert loaded & heavy == set()


@pytest.mark.parametrize("command", cli._COMMANDS)
def test_every_command_that_help_lists_exists(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    if command in {"export", "verify"} and importlib.util.find_spec("torch") is None:
        pytest.skip("needs the [export] extra")
    status, out, _ = outcome([command, "--help"], capsys)
    assert status == 0
    assert out.startswith(f"Usage: cascadeserve {command}")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert outcome(["--version"], capsys) == (0, f"cascadeserve, version {__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sreve"], "No such command 'sreve'"),
        (["serve"], "Missing option '--plan'"),
        (["serve", "--fast"], "No such option"),
        (["--log-level", "loud", "serve"], "'loud' is not one of"),
        (["serve", "--plan=p", "--cluster=c", "--http-port=70000"], "70000 is not in the range"),
        ([], "Usage: cascadeserve"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_call_is_refused_with_status_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = outcome(arguments, capsys)
    assert status == 2
    assert words in out + err
    assert "Traceback" not in err


def one_sentence(err: str) -> str:
    (line,) = err.splitlines()
    assert line.startswith("Error: ")
    return line


@pytest.mark.parametrize("command", ["serve", "up", "triton"])
def test_a_missing_file_is_one_sentence_with_its_path(
    command: str, plan: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = tmp_path / "absent.toml"
    arguments = [command, f"--cluster={absent}", *([] if command == "triton" else [f"--plan={plan}"])]
    status, _, err = outcome(arguments, capsys)
    assert status == 2
    assert f"{absent}: cannot be read (No such file or directory)" in one_sentence(err)


@pytest.mark.parametrize("command", ["serve", "up"])
def test_a_broken_plan_is_one_sentence_with_file_and_field(
    command: str, plan: Path, cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    document = tiny.plan_document()
    document["families"]["family"]["gears"][1]["layout"] = "tall"
    plan.write_text(json.dumps(document))
    status, _, err = outcome([command, f"--plan={plan}", f"--cluster={cluster}"], capsys)
    assert status == 2
    assert f"{plan}: $.families.family.gears[1].layout: names the unknown layout 'tall'" in one_sentence(err)


def test_a_plan_for_another_cluster_is_refused(plan: Path, cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.write_text(CLUSTER.replace('"a"', '"elsewhere"'))
    status, _, err = outcome(["serve", f"--plan={plan}", f"--cluster={cluster}"], capsys)
    assert status == 2
    assert f"{plan}: $.layouts[0].instances.a: is no endpoint of the cluster" in one_sentence(err)


def test_a_broken_cluster_is_one_sentence_with_file_and_field(
    plan: Path, cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.write_text(CLUSTER.replace("[0]", "[]"))
    status, _, err = outcome(["serve", f"--plan={plan}", f"--cluster={cluster}"], capsys)
    assert status == 2
    assert f"{cluster}: $.endpoints[0].device.cores" in one_sentence(err)


def test_serve_refuses_a_repository_that_is_none(
    plan: Path, cluster: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    absent = tmp_path / "absent"
    status, _, err = outcome(["serve", f"--plan={plan}", f"--cluster={cluster}", f"--repository={absent}"], capsys)
    assert status == 2
    assert f"{absent}: is no folder" in one_sentence(err)


def test_serve_refuses_endpoints_that_another_orchestrator_steers(
    plan: Path, cluster: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repository = tiny.write_repository(tmp_path / "models")
    with lease(repository, ["a"]):
        status, _, err = outcome(
            ["serve", f"--plan={plan}", f"--cluster={cluster}", f"--repository={repository}"], capsys
        )
    assert status == 2
    assert f"another orchestrator steers endpoint 'a' of {repository}; stop it first" in one_sentence(err)


def test_up_refuses_cores_that_are_no_numbers(plan: Path, cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = outcome(["up", f"--plan={plan}", f"--cluster={cluster}", "--cores=1,x"], capsys)
    assert status == 2
    assert "cores `1,x`: write core numbers such as" in err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ([], "name one of a, b"),
        (["--endpoint=c"], "'c' is not in"),
        (["--endpoint=a", "--model=huge"], "'huge' is not in"),
    ],
    ids=["no endpoint named", "unknown endpoint", "unknown model"],
)
def test_triton_refuses_what_the_cluster_or_the_repository_does_not_have(
    more: list[str], words: str, cluster: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.write_text(CLUSTER + SECOND_ENDPOINT)
    (tmp_path / "models" / "small").mkdir(parents=True)
    (tmp_path / "models" / "small" / "config.pbtxt").write_text('name: "small"')
    arguments = ["triton", f"--cluster={cluster}", f"--repository={tmp_path / 'models'}", f"--state={tmp_path / 's'}"]
    status, _, err = outcome([*arguments, *more], capsys)
    assert status == 2
    assert words in one_sentence(err)


def test_the_local_server_is_never_reachable_from_outside(
    cluster: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.write_text(CLUSTER.replace("127.0.0.1:18001", "0.0.0.0:18001"))
    (tmp_path / "models" / "small").mkdir(parents=True)
    (tmp_path / "models" / "small" / "config.pbtxt").write_text('name: "small"')
    arguments = ["triton", f"--cluster={cluster}", f"--repository={tmp_path / 'models'}", f"--state={tmp_path / 's'}"]
    status, _, err = outcome(arguments, capsys)
    assert status == 2
    assert "0.0.0.0" in one_sentence(err)


def raising(error: BaseException) -> click.Command:
    @click.command()
    def fails() -> None:
        raise error

    return fails


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [(ServerStartFailed("it ended"), 1, "Error: it ended\n"), (KeyboardInterrupt(), 130, "interrupted\n")],
    ids=["failed", "interrupted"],
)
def test_a_failure_is_told_from_a_wrong_call_by_its_status(
    error: BaseException,
    status: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cli.root, "get_command", lambda *_: raising(error))
    ended, _, err = outcome(["serve"], capsys)
    assert (ended, err.lstrip()) == (status, words)


@pytest.mark.parametrize(
    ("command", "package", "extra"),
    [("export", "torch", "export"), ("verify", "torch", "export"), ("triton", "pytriton", "local")],
)
def test_a_command_whose_packages_are_not_installed_says_how_to_get_them(
    command: str,
    package: str,
    extra: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def missing(_: str) -> None:
        raise ModuleNotFoundError(f"No module named {package!r}", name=package)

    monkeypatch.setattr(importlib, "import_module", missing)
    status, _, err = outcome([command], capsys)
    assert status == 1
    assert f"pip install 'cascadeserve[{extra}]'" in one_sentence(err)
