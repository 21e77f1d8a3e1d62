"""Decide the bars of benchmarks/bars.toml: `python -m benchmarks.bars [--tier quick]`.

A bar runs a command, reads one value out of the JSON file that the command writes, and compares it. Bars with the same
command share one run. Exit status 1 when any bar of the tier fails or could not be run.
"""

from __future__ import annotations

import operator
import re
import shlex
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import click
import msgspec
from rich.console import Console
from rich.table import Table

from cascadeserve.artefacts import Artefact, read_toml, write_json

ROOT = Path(__file__).parents[1]
BARS = ROOT / "benchmarks" / "bars.toml"
RESULTS = ROOT / "benchmarks" / "results" / "local"
TIERS = ("quick", "full", "soak", "gpu")
_COMPARATORS = {"==": operator.eq, "<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}


class Bar(Artefact, frozen=True, kw_only=True):
    """One line of a "done when"."""

    id: Annotated[str, msgspec.Meta(pattern=r"\A[a-z0-9]+([.-][a-z0-9]+)*\Z")]
    says: str
    tier: Literal["quick", "full", "soak", "gpu"]
    # run from the top of the checkout, `python` being this interpreter
    command: str
    # JSON file that the command writes; "wall_s" alone stands for the seconds that the command took
    result: str
    pointer: str = ""
    comparator: Literal["==", "<=", ">=", "<", ">"]
    wanted: bool | int | float | str


class Bars(Artefact, frozen=True, kw_only=True):
    """The file."""

    bars: list[Bar]


def resolve(document: Any, pointer: str) -> Any:  # noqa: ANN401
    """Value at a JSON pointer (RFC 6901); raises KeyError when there is none."""
    if pointer and not pointer.startswith("/"):
        raise KeyError(pointer)
    value = document
    for part in pointer.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        try:
            value = value[_index(key)] if isinstance(value, list) else value[key]
        except (KeyError, IndexError, TypeError) as error:
            raise KeyError(pointer) from error
    return value


def _index(key: str) -> int:
    if not re.fullmatch("0|[1-9][0-9]*", key):
        raise KeyError(key)
    return int(key)


def _run(command: str) -> tuple[float, int] | None:
    """Seconds the command took and its exit status; None if it could not be started."""
    arguments = [sys.executable if part == "python" else part for part in shlex.split(command)]
    started_s = time.monotonic()
    try:
        status = subprocess.run(arguments, cwd=ROOT, check=False).returncode
    except OSError as error:
        Console(stderr=True).print(f"{command}: {error}")
        return None
    return time.monotonic() - started_s, status


def _value(bar: Bar, run: tuple[float, int] | None, started_s: float) -> Any:  # noqa: ANN401
    """The measured value, or None where the command left none behind."""
    if run is None:
        return None
    if bar.result == "wall_s":
        wall_s, status = run
        return wall_s if status == 0 else None  # how fast it failed is no measurement
    path = ROOT / bar.result
    if not path.exists() or path.stat().st_mtime < started_s:
        return None  # an old file says nothing about this run
    try:
        return resolve(msgspec.json.decode(path.read_bytes()), bar.pointer)
    except (KeyError, msgspec.DecodeError):
        return None


def _verdict(bar: Bar, value: Any) -> str:  # noqa: ANN401
    if value is None:
        return "NOT RUN"
    comparable = isinstance(value, bool) == isinstance(bar.wanted, bool)
    try:
        return "PASS" if comparable and _COMPARATORS[bar.comparator](value, bar.wanted) else "FAIL"
    except TypeError:
        return "FAIL"


@click.command()
@click.option("--tier", type=click.Choice(TIERS), default="quick", show_default=True)
@click.option("--only", default="", help="Bars whose id starts with this.")
def main(tier: str, only: str) -> None:
    """Run the bars of a tier and print PASS, FAIL or NOT RUN for each."""
    bars = [bar for bar in read_toml(BARS, Bars).bars if bar.tier == tier and bar.id.startswith(only)]
    if not bars:
        raise click.UsageError(f"no bar of tier {tier} has an id that starts with {only!r}")
    console = Console()
    table = Table("bar", "verdict", "value", "wanted", title=f"tier {tier}")
    verdicts: dict[str, dict[str, Any]] = {}
    for command in dict.fromkeys(bar.command for bar in bars):
        console.print(f"[dim]{command}[/dim]")
        started_s = datetime.now(UTC).timestamp()
        run = _run(command)
        for bar in bars:
            if bar.command == command:
                value = _value(bar, run, started_s)
                verdict = _verdict(bar, value)
                verdicts[bar.id] = {"verdict": verdict, "value": value, "wanted": f"{bar.comparator} {bar.wanted}"}
    for bar in bars:
        entry = verdicts[bar.id]
        shown = f"{entry['value']:.4g}" if isinstance(entry["value"], float) else str(entry["value"])
        table.add_row(bar.id, entry["verdict"], shown, entry["wanted"])
    console.print(table)
    write_json(RESULTS / f"bars-{tier}.json", verdicts)
    sys.exit(int(any(entry["verdict"] != "PASS" for entry in verdicts.values())))


if __name__ == "__main__":
    main()
