"""Decide the bars of benchmarks/bars.toml: `python -m benchmarks.bars [--tier quick]`.

A bar runs a command, reads one value out of the JSON file that the command writes, and compares it. Bars with the same
command share one run. Exit status 1 when any bar of the tier fails or could not be run.
"""

from __future__ import annotations

import operator
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
    value = document
    for part in pointer.split("/")[1:]:
        key = part.replace("~1", "/").replace("~0", "~")
        try:
            value = value[int(key)] if isinstance(value, list) else value[key]
        except (KeyError, IndexError, ValueError, TypeError) as error:
            raise KeyError(pointer) from error
    return value


def _run(command: str) -> float | None:
    """Seconds the command took; None if it could not be started. Its exit status is for the result file to tell."""
    arguments = [sys.executable if part == "python" else part for part in shlex.split(command)]
    started_s = time.monotonic()
    try:
        subprocess.run(arguments, cwd=ROOT, check=False)
    except OSError as error:
        Console(stderr=True).print(f"{command}: {error}")
        return None
    return time.monotonic() - started_s


def _value(bar: Bar, wall_s: float | None, started_s: float) -> Any:  # noqa: ANN401
    """The measured value, or None where the command left none behind."""
    if wall_s is None or bar.result == "wall_s":
        return wall_s
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
    return "PASS" if comparable and _COMPARATORS[bar.comparator](value, bar.wanted) else "FAIL"


@click.command()
@click.option("--tier", type=click.Choice(TIERS), default="quick", show_default=True)
@click.option("--only", default="", help="Bars whose id starts with this.")
def main(tier: str, only: str) -> None:
    """Run the bars of a tier and print PASS, FAIL or NOT RUN for each."""
    bars = [bar for bar in read_toml(BARS, Bars).bars if bar.tier == tier and bar.id.startswith(only)]
    console = Console()
    table = Table("bar", "verdict", "value", "wanted", title=f"tier {tier}")
    verdicts: dict[str, dict[str, Any]] = {}
    for command in dict.fromkeys(bar.command for bar in bars):
        console.print(f"[dim]{command}[/dim]")
        started_s = datetime.now(UTC).timestamp()
        wall_s = _run(command)
        for bar in bars:
            if bar.command == command:
                value = _value(bar, wall_s, started_s)
                verdict = _verdict(bar, value)
                verdicts[bar.id] = {"verdict": verdict, "value": value, "wanted": f"{bar.comparator} {bar.wanted}"}
    for bar in bars:
        entry = verdicts[bar.id]
        shown = f"{entry['value']:.4g}" if isinstance(entry["value"], float) else str(entry["value"])
        table.add_row(bar.id, entry["verdict"], shown, entry["wanted"])
    console.print(table)
    write_json(RESULTS / f"bars-{tier}.json", verdicts)
    sys.exit(any(entry["verdict"] != "PASS" for entry in verdicts.values()))


if __name__ == "__main__":
    main()
