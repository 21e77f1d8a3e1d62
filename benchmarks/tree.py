"""Count what a run left changed in the checkout: `python -m benchmarks.tree --result FILE`."""

from __future__ import annotations

import subprocess
from pathlib import Path

import click

from cascadeserve.artefacts import write_json


@click.command()
@click.option("--result", type=click.Path(path_type=Path), required=True)
def main(result: Path) -> None:
    """Write {changes: number of lines that `git status --porcelain` prints}."""
    answer = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=True)
    write_json(result, {"changes": len(answer.stdout.splitlines()), "paths": answer.stdout.splitlines()})


if __name__ == "__main__":
    main()
