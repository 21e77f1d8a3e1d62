"""`cascadeserve init`: a commented start for a family of one's own."""

from __future__ import annotations

import shlex
from importlib import resources
from pathlib import Path

import click

from cascadeserve.errors import UsageError

_COMMON = ("cluster.toml", "goal.toml")
_MODELS = "--model small --model large"
_RECORD = f"cascadeserve record --cluster cluster.toml --family mine {_MODELS}"
_NEXT = (
    "cascadeserve export {family} --repository model_repository",
    "cascadeserve verify {family} --repository model_repository",
    "cascadeserve triton --cluster cluster.toml --repository model_repository",
    f"{_RECORD} --rows search.npz --split search --output records/search.npz",
    f"{_RECORD} --rows calibration.npz --split calibration --output records/calibration.npz",
    f"cascadeserve profile --cluster cluster.toml {_MODELS} --rows search.npz --front --output profile.json",
    (
        "cascadeserve plan --goal goal.toml --profile profile.json --cluster cluster.toml --search records/search.npz "
        "--calibration records/calibration.npz --output gear_plan.json"
    ),
    "cascadeserve up --plan gear_plan.json --cluster cluster.toml",
)
_NOTES = {
    2: "  # leave it running in another terminal until the plan is made",
    4: "  # rows that nothing was chosen by, labelled like the others",
    7: "  # instead of `cascadeserve triton`",
}


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), default=Path())
@click.option("--python", is_flag=True, help="Write family.py, for models that Python code builds, not family.toml.")
def init(folder: Path, *, python: bool) -> None:
    """Write a start for a family of your own into FOLDER, here by default: family, cluster and goal file.

    No file is ever overwritten: if one of them exists, nothing is written.
    """
    names = ("family.py" if python else "family.toml", *_COMMON)
    _write_new(folder, {name: _template(name) for name in names})
    for name in names:
        click.echo(f"wrote {folder / name}")
    click.echo("\nSay in them what your models are, where they run and what they have to keep. Then:\n")
    if folder != Path():
        click.echo(f"  cd {shlex.quote(str(folder))}")
    for index, command in enumerate(_NEXT):
        family = "family:family" if python else "family.toml"
        click.echo(f"  {command.format(family=family)}{_NOTES.get(index, '')}")


def _template(name: str) -> str:
    return resources.files("export").joinpath("templates", f"{name}.template").read_text(encoding="utf-8")


def _write_new(folder: Path, texts: dict[str, str]) -> None:
    """Write all files or none."""
    for name in texts:
        if (folder / name).exists():
            raise UsageError(f"{folder / name} exists already, so nothing was written; choose another folder")
    written: list[Path] = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            with (folder / name).open("x", encoding="utf-8") as file:  # "x": not even one that was made meanwhile
                written.append(folder / name)
                file.write(text)
    except OSError as error:
        for path in written:
            path.unlink()
        raise UsageError(f"{folder}: cannot be written to ({error.strerror}); choose another folder") from error
