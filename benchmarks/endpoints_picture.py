"""Draw the grid of `benchmarks.endpoints_saved`: `python -m benchmarks.endpoints_picture`.

docs/endpoints-saved.svg has a panel per family; a row is an accuracy, from low to high, a column an SLO under one of
the two traces. The number is how many endpoints of the best baseline one endpoint of a cascade plan replaces. Tables
for docs/explanation/where-a-cascade-helps.md are printed.
"""

from __future__ import annotations

import math
from html import escape
from itertools import groupby
from pathlib import Path
from statistics import median, mode
from typing import TYPE_CHECKING

import click

from benchmarks.endpoints_by_planner import CheckResult
from benchmarks.endpoints_saved import Cell, Result
from benchmarks.populations import ROOT
from cascadeserve.artefacts import read_json, write_atomically

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

RESULT = ROOT / "benchmarks" / "results" / "endpoints_saved.json"
PLANNED = ROOT / "benchmarks" / "results" / "endpoints_by_planner.json"
PICTURE = ROOT / "docs" / "endpoints-saved.svg"

_LABEL, _WIDTH, _HEIGHT, _GAP, _HEAD, _MARGIN = 190, 38, 22, 10, 58, 16
_INK, _PALE, _BARE = "#1f2328", "#6b7280", "#f1f2f4"
# from what saves nothing to what saves sixteenfold: rising darkness of one hue, read in grey too
_LIGHT, _DARK = (232, 240, 247), (24, 78, 128)
_DARKEST_SAVING = 16.0
_WHITE_FROM = 0.55
_FONT = 'font-family="system-ui, sans-serif"'
_SAYS = {
    "digits": "digits (measured profile)",
    "llama2-mmlu": "Llama 2 on MMLU (stated profile)",
    "command-speech": "speech commands (stated profile)",
    "cifar10": "CIFAR-10 (stated profile)",
}
# accuracies of which the table speaks
_QUOTED = ("2 points below", "0.5 points below")
_MUCH, _LITTLE = 2.0, 1.1
_TRACES = {"azure": "Azure", "world-cup": "World Cup"}


def draw(result: Result) -> str:
    """SVG of a result; the same result gives the same text."""
    families = list(result.families)
    columns = list(dict.fromkeys((cell.trace, cell.slo_multiple) for cell in result.cells))
    columns.sort(key=lambda column: (list(_TRACES).index(column[0]), column[1]))
    rows = len({cell.accuracy for cell in result.cells})
    width = _LABEL + len(columns) * _WIDTH + _GAP
    height = _HEAD + rows * _HEIGHT
    across = 2
    total = (across * (width + _MARGIN) + _MARGIN, math.ceil(len(families) / across) * (height + _MARGIN) + _MARGIN)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {total[0]} {total[1]}" font-size="12" {_FONT}>',
        f'<rect width="{total[0]}" height="{total[1]}" fill="#ffffff"/>',
    ]
    for index, family in enumerate(families):
        x = _MARGIN + index % across * (width + _MARGIN)
        y = _MARGIN + index // across * (height + _MARGIN)
        own = [cell for cell in result.cells if cell.family == family]
        parts += _panel(_SAYS.get(family, family), own, columns, x, y)
    return "\n".join([*parts, "</svg>", ""])


def _panel(title: str, cells: Sequence[Cell], columns: Sequence[tuple[str, float]], x: int, y: int) -> Iterator[str]:
    yield _text(x, y + 13, title, size=14, weight="600")
    left = {column: x + _LABEL + place * _WIDTH + _apart(columns, place) for place, column in enumerate(columns)}
    for trace, under in groupby(columns, key=lambda column: column[0]):
        yield _text(left[next(under)], y + 32, f"{_TRACES[trace]}, SLO", fill=_PALE)
    for column, at in left.items():
        yield _text(at + _WIDTH / 2, y + _HEAD - 8, f"{column[1]:g} x", fill=_PALE, anchor="middle")
    by_floor = sorted(cells, key=lambda cell: cell.floor)
    for row, (label, group) in enumerate(groupby(by_floor, key=lambda cell: cell.accuracy)):
        own = list(group)
        top = y + _HEAD + row * _HEIGHT
        weight = "600" if own[0].only_reference else "400"
        yield _text(x, top + 15, f"{own[0].floor:.1%}", weight=weight)
        yield _text(x + 50, top + 15, label, weight=weight)
        for cell in own:
            yield from _square(cell, left[cell.trace, cell.slo_multiple], top)


def _apart(columns: Sequence[tuple[str, float]], place: int) -> int:
    return 0 if columns[place][0] == columns[0][0] else _GAP


def _square(cell: Cell, x: float, y: float) -> Iterator[str]:
    share = 0.0 if cell.saving is None else min(math.log(max(cell.saving, 1.0)) / math.log(_DARKEST_SAVING), 1.0)
    shade = "#" + "".join(f"{round(a + share * (b - a)):02x}" for a, b in zip(_LIGHT, _DARK, strict=True))
    fill = _BARE if cell.saving is None else shade
    yield f'<rect x="{x:g}" y="{y}" width="{_WIDTH - 2}" height="{_HEIGHT - 2}" fill="{fill}"/>'
    says = "-" if cell.saving is None else f"{cell.saving:.1f}"
    ink = "#ffffff" if share > _WHITE_FROM else _INK
    yield _text(x + (_WIDTH - 2) / 2, y + 14, says, fill=ink, anchor="middle")


def _text(
    x: float, y: float, says: str, *, fill: str = _INK, size: int = 12, weight: str = "400", anchor: str = "start"
) -> str:
    return (
        f'<text x="{x:g}" y="{y:g}" fill="{fill}" font-size="{size}" font-weight="{weight}" text-anchor="{anchor}">'
        f"{escape(says)}</text>"
    )


def table(result: Result) -> list[str]:
    """Lines of a table: for every family what makes a cascade pay, or not, and what it comes to; medians over cells."""
    lines = [
        "| family | first model, reference | work of a row | asks the reference for | saves | >= 2 | < 1.1 |",
        "|---|---|---|---|---|---|---|",
    ]
    for family, facts in result.families.items():
        own = [cell for cell in result.cells if cell.family == family]
        at = {label: [cell for cell in own if cell.accuracy == label] for label in _QUOTED}
        entries = [cell.several.entry for cell in at[_QUOTED[0]] if cell.several]
        first = next(name for name in facts.accuracies if mode(entries).startswith(name))
        work = facts.most_rows_per_s[facts.reference] / facts.most_rows_per_s[first]
        asked = [median(cell.several.to_last for cell in cells if cell.several) for cells in at.values()]
        saved = [median(cell.saving for cell in cells if cell.saving) for cells in at.values()]
        savings = [cell.saving for cell in own if cell.saving]
        lines.append(
            f"| {family} | `{first}` {facts.accuracies[first]:.1%}, `{facts.reference}` "
            f"{facts.accuracies[facts.reference]:.1%} | {work:.2%} | {asked[0]:.0%}, {asked[1]:.0%} | {saved[0]:.1f}, "
            f"{saved[1]:.1f} | {sum(s >= _MUCH for s in savings)} | {sum(s < _LITTLE for s in savings)} |"
        )
    return lines


def checks(found: CheckResult) -> list[str]:
    """Lines of a table: the cells that the planner counted itself."""
    lines = [
        "| cell | policy | counted | planned | accuracy over the trace |",
        "|---|---|---|---|---|",
    ]
    for each in found.checked:
        cell = f"{each.family}, {_TRACES[each.trace]}, {each.slo_multiple:g} x, {each.accuracy}"
        accuracy = "-" if each.accuracy_over_rows is None else f"{each.accuracy_over_rows:.2%}"
        lines.append(f"| {cell} | {each.policy} | {each.counted} | {each.planned or '-'} | {accuracy} |")
    return lines


@click.command()
@click.option("--result", type=click.Path(path_type=Path, exists=True), default=RESULT)
@click.option("--planned", type=click.Path(path_type=Path, exists=True), default=PLANNED)
@click.option("--picture", type=click.Path(path_type=Path), default=PICTURE)
def main(result: Path, planned: Path, picture: Path) -> None:
    """Draw a result and print the tables."""
    document = read_json(result, Result)
    write_atomically(picture, draw(document).encode())
    click.echo("\n".join([*table(document), "", *checks(read_json(planned, CheckResult))]))


if __name__ == "__main__":
    main()
