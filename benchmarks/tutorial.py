"""Runs docs/tutorial.md as it is written: a wheel of this checkout, a fresh environment, every block in its order.

A block with a title is a file; a `console` block is run by bash, all of them in one shell, which stops at the first
command that fails. The one thing that differs from the page is where pip finds cascadeserve.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import click

ROOT = Path(__file__).parent.parent
_BLOCK = re.compile(r'^```(\w+)(?: title="([\w.]+)")?\n(.*?)^```$', re.MULTILINE | re.DOTALL)
_INSTALL = "pip install 'cascadeserve["


def script_of(page: str, wheel: Path, folder: Path) -> str:
    """Write the page's files to `folder`; returns its commands as one script.

    Raises:
        ValueError: the page has no line that installs cascadeserve.

    """
    commands = ["set -euo pipefail", f"export PIP_CONSTRAINT={ROOT / 'constraints.txt'}"]
    for language, title, text in _BLOCK.findall(page):
        if title:
            (folder / title).write_text(text)
        elif language == "console":
            commands.append(text)
    script = "\n".join(commands)
    if _INSTALL not in script:
        raise ValueError(f"the tutorial has no line with {_INSTALL!r}")
    return script.replace(_INSTALL, f"pip install --quiet '{wheel}[")


@click.command()
@click.option("--result", type=click.Path(path_type=Path), default="benchmarks/results/local/tutorial.json")
def main(result: Path) -> None:
    """Run the tutorial; the exit status is that of its first command that failed."""
    page = (ROOT / "docs" / "tutorial.md").read_text()
    with tempfile.TemporaryDirectory(prefix="tutorial-") as name:
        folder = Path(name)
        # of a copy: setuptools would take in what an earlier build left in build/, and leave that here again
        source = folder / "source"
        shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "*.egg-info", "results"))
        subprocess.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", folder, source], check=True)
        shutil.rmtree(source)
        (wheel,) = folder.glob("cascadeserve-*.whl")
        script = script_of(page, wheel, folder)
        # where this runs from must not be what is imported
        environment = {key: value for key, value in os.environ.items() if key not in {"PYTHONPATH", "VIRTUAL_ENV"}}
        began_s = time.monotonic()
        # its own session: what is left of its background commands goes with it
        done = subprocess.run(["bash", "-c", script], cwd=folder, env=environment, check=False, start_new_session=True)
        lasted_s = time.monotonic() - began_s
    result.parent.mkdir(parents=True, exist_ok=True)
    result.write_text(json.dumps({"status": done.returncode, "lasted_s": round(lasted_s, 1)}, indent=2) + "\n")
    click.echo(f"status {done.returncode} after {lasted_s:.0f} s")
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
