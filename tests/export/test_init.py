from __future__ import annotations

import shlex
import sys
from typing import TYPE_CHECKING, Any

import click
import pytest

from cascadeserve import cli
from cascadeserve.cluster import read_cluster
from cascadeserve.gear_plan import TensorSpec
from export.family_file import read_family_file
from export.loading import load_family
from planner.goal import choose_families, read_goal

if TYPE_CHECKING:
    from pathlib import Path


def run(*arguments: str) -> int:
    try:
        cli.main(["init", *arguments])
    except SystemExit as end:
        return int(str(end.code))
    return 0


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return tmp_path


def commands(output: str) -> list[list[str]]:
    return [shlex.split(line, comments=True)[1:] for line in output.splitlines() if line.startswith("  cascadeserve")]


def test_what_is_written_is_what_the_readers_read(folder: Path) -> None:
    assert run() == 0
    assert sorted(contents(folder)) == ["cluster.toml", "family.toml", "goal.toml"]
    family = read_family_file(folder / "family.toml")
    assert [model.name for model in family.models] == ["small", "large"]
    assert family.inputs == (TensorSpec(name="image", datatype="FP32", shape=(3, 32, 32)),)
    assert choose_families(read_goal(folder / "goal.toml"), folder / "goal.toml", None) == (family.name,)
    assert [endpoint.name for endpoint in read_cluster(folder / "cluster.toml").endpoints] == ["triton0"]


@pytest.mark.parametrize("name", ["family.toml", "cluster.toml", "goal.toml"])
def test_what_is_commented_out_can_be_used_as_it_stands(name: str, folder: Path) -> None:
    assert run() == 0
    path = folder / name
    lines = [
        line.removeprefix("# ")
        if line.startswith("# ") and ("= " in line or line.startswith("# [")) and ";" not in line
        else line
        for line in path.read_text().splitlines()
    ]
    # the goal takes one of two
    path.write_text("\n".join(line for line in lines if not line.startswith("slo_per_reference_batch")))
    readers: dict[str, Any] = {"family.toml": read_family_file, "cluster.toml": read_cluster, "goal.toml": read_goal}
    read = readers[name](path)
    if name == "family.toml":
        assert [model.variant for model in read.models] == [None, None, "int8"]
    elif name == "cluster.toml":
        assert len(read.endpoints) == 2
    else:
        assert (read.families["mine"].slo_s, read.families["mine"].max_rate_per_s) == (0.1, 500.0)


@pytest.mark.parametrize("python", [False, True])
def test_the_next_commands_are_ones_that_there_are(
    python: bool, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("new place", *(["--python"] if python else [])) == 0
    output = capsys.readouterr().out
    assert "  cd 'new place'\n" in output
    found = commands(output)
    assert [command[0] for command in found] == [
        "export",
        "verify",
        "triton",
        "record",
        "record",
        "profile",
        "plan",
        "up",
    ]
    for name, *arguments in found:
        if name in {"export", "verify"}:
            assert arguments == ["family:family" if python else "family.toml", "--repository", "model_repository"]
            continue
        command = cli.root.get_command(click.Context(cli.root), name)
        assert command is not None
        for path in ("gear_plan.json", "search.npz", "calibration.npz", "profile.json"):
            (folder / path).touch()
        assert ("--front" in arguments) == (name == "profile")
        command.make_parser(click.Context(command)).parse_args([*arguments])
        required = {option for one in command.params if one.required for option in one.opts}
        assert required <= set(arguments)


@pytest.mark.torch
def test_the_python_start_can_be_exported_as_it_stands(folder: Path) -> None:
    pytest.importorskip("torch")
    assert run("--python") == 0
    try:
        family = load_family("family:family")
        assert [model.name for model in family.models] == ["small", "large"]
        cli.main(["export", "family:family", "--repository", "models"])
    finally:
        sys.modules.pop("family", None)
    assert sorted(path.name for path in (folder / "models").iterdir()) == ["large", "small"]


@pytest.mark.parametrize("name", ["family.toml", "cluster.toml", "goal.toml"])
def test_nothing_is_overwritten_and_nothing_is_written_beside(
    name: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "mine").mkdir()
    (folder / "mine" / name).write_text("mine")
    assert run("mine") == 2
    assert capsys.readouterr().err == (
        f"Error: mine/{name} exists already, so nothing was written; choose another folder\n"
    )
    assert contents(folder / "mine") == {name: b"mine"}


def test_a_folder_that_cannot_be_made_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "file").touch()
    assert run("file/inner") == 2
    assert capsys.readouterr().err == (
        "Error: file/inner: cannot be written to (Not a directory); choose another folder\n"
    )


def test_a_failure_while_writing_leaves_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from pathlib import Path as AnyPath  # noqa: PLC0415 - the class that is patched

    opened = AnyPath.open

    def failing(self: Path, *arguments: Any, **more: Any) -> Any:
        if self.name == "goal.toml":
            raise OSError(28, "No space left on device")
        return opened(self, *arguments, **more)

    monkeypatch.setattr(AnyPath, "open", failing)
    assert run() == 2
    assert "No space left" in capsys.readouterr().err
    assert contents(folder) == {}
