"""Reading CSV traces: one row per request with its time, or one row per minute with a count.

Three forms, told apart by their header: times alone (numbers in seconds or datetimes; no header needed), a table with a
column of times such as the Azure LLM 2023 traces (`TIMESTAMP`), and counts per minute (`minute,count`).
"""

from __future__ import annotations

import csv
import math
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import numpy as np

from cascadeserve.errors import InvalidArtefact, UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

# Whole seconds and their fraction.
Moment = tuple[int, float]

_TIME_NAMES = ("timestamp", "time", "arrival", "arrival_s", "time_s", "seconds")
_COUNT_NAMES = ("count", "counts", "requests")
_MINUTE_S = 60.0
# Differences of times up to here fit into int64, in whatever unit a file has them; so does a sum of such counts.
_FARTHEST = 2**61
_MOST_COUNT, _COUNT_DIGITS = 10**9, 100
_DATETIME = re.compile(
    r"(?P<seconds>\d{4}-\d\d-\d\d[ T]\d\d:\d\d(?::\d\d)?)(?:\.(?P<fraction>\d+))?(?P<zone>Z|[+-]\d\d:?\d\d)?"
)


@dataclass(frozen=True)
class Timestamps:
    """Times of single requests, in seconds from the first: float64 [requests], never decreasing."""

    times_s: NDArray[np.float64]


@dataclass(frozen=True)
class Counts:
    """Requests per period: start of each period in seconds from the first, float64 [periods], and int64 [periods]."""

    starts_s: NDArray[np.float64]
    counts: NDArray[np.int64]
    period_s: float


@dataclass(frozen=True)
class _Layout:
    """Where times and counts stand (no counts: a row is one request), and which row is the first of data."""

    time_column: int
    count_column: int | None
    first_row: int


def _parse_time(text: str) -> Moment:
    """Whole seconds and the fraction: together they would lose the 100 ns of a datetime in one float64."""
    match = _DATETIME.fullmatch(text)
    if match:
        moment = datetime.fromisoformat(match["seconds"] + (match["zone"] or ""))
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=UTC)
        fraction = match["fraction"]
        return int(moment.timestamp()), int(fraction) / 10 ** len(fraction) if fraction else 0.0
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    whole = math.floor(value)
    return whole, value - whole


def _is_time(text: str) -> bool:
    try:
        _parse_time(text)
    except ValueError:
        return False
    return True


def _read_rows(path: Path) -> list[list[str]]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            return [[cell.strip() for cell in row] for row in csv.reader(file)]
    except OSError as error:
        raise InvalidArtefact(f"cannot be read ({error.strerror}); check the path", path=path) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InvalidArtefact(f"is no CSV text ({error})", path=path) from error


def _find_column(names: list[str], wanted: str, path: Path) -> int:
    if wanted.isdecimal() and int(wanted) < len(names):
        return int(wanted)
    if wanted in names:
        return names.index(wanted)
    raise InvalidArtefact(f"has no column `{wanted}`; it has {', '.join(names)}", path=path, field="row 1")


def _find_layout(first: list[str], column: str | None, path: Path) -> _Layout:
    lowered = [cell.lower() for cell in first]
    if column is not None:
        index = _find_column(first, column, path)
        return _Layout(index, None, 0 if _is_time(first[index]) else 1)
    if _is_time(first[0]):
        return _Layout(0, None, 0)
    counts = next((lowered.index(name) for name in _COUNT_NAMES if name in lowered), None)
    if counts is not None and len(first) > 1:
        return _Layout(0 if counts else 1, counts, 1)
    return _Layout(next((lowered.index(name) for name in _TIME_NAMES if name in lowered), 0), None, 1)


def _cells(rows: list[list[str]], layout: _Layout, path: Path) -> Iterator[tuple[int, str, str]]:
    """Row number from 1 as an editor shows it, text of the time, text of the count."""
    for number, row in enumerate(rows[layout.first_row :], start=layout.first_row + 1):
        if not any(row):
            continue
        try:
            count = row[layout.count_column] if layout.count_column is not None else "1"
            yield number, row[layout.time_column], count
        except IndexError as error:
            raise InvalidArtefact(f"has only {len(row)} columns", path=path, field=f"row {number}") from error


def _parse_bound(text: str | None, name: str) -> Moment | None:
    if text is None:
        return None
    try:
        return _parse_time(text)
    except ValueError as error:
        raise UsageError(f"the {name} of the trace's window, `{text}`, is neither a number nor a datetime") from error


def _parse_rows(rows: list[list[str]], layout: _Layout, path: Path) -> Iterator[tuple[Moment, int]]:
    """Time and count of every row, checked to be in order."""
    previous: Moment | None = None
    for number, time_text, count_text in _cells(rows, layout, path):
        where = f"row {number}"
        try:
            moment = _parse_time(time_text)
        except ValueError as error:
            raise InvalidArtefact(
                f"`{time_text}` is neither a number nor a datetime", path=path, field=where
            ) from error
        if abs(moment[0]) > _FARTHEST:
            raise InvalidArtefact(
                f"`{time_text}` is too far from 0; times go up to {_FARTHEST:.2g}", path=path, field=where
            )
        if previous is not None and moment < previous:
            raise InvalidArtefact("goes back in time; sort the file by time", path=path, field=where)
        previous = moment
        if not count_text.isdecimal():
            raise InvalidArtefact(f"count `{count_text}` is no whole number", path=path, field=where)
        # by its length first: Python reads no number of thousands of digits
        if len(count_text) > _COUNT_DIGITS or int(count_text) > _MOST_COUNT:
            raise InvalidArtefact(f"count is more than the {_MOST_COUNT:,} that a row may have", path=path, field=where)
        yield moment, int(count_text)


def _check_minutes(times_s: NDArray[np.float64], path: Path) -> None:
    too_close = np.flatnonzero(np.diff(times_s) < _MINUTE_S)
    if len(too_close):
        at_s = times_s[too_close[0]]
        raise InvalidArtefact(f"periods are shorter than a minute, {at_s:g} s after the first", path=path)


def read_trace(
    path: Path, *, column: str | None = None, start: str | None = None, end: str | None = None
) -> Timestamps | Counts:
    """Read a trace; `start` (inclusive) and `end` (exclusive) cut a window, written like the times in the file.

    Raises:
        InvalidArtefact: the file cannot be read or a row is wrong; it names the row, counted from 1.

    """
    rows = _read_rows(path)
    if not rows or not rows[0]:
        raise InvalidArtefact("is empty; it must hold one row per request or minute", path=path)
    layout = _find_layout(rows[0], column, path)
    lower, upper = _parse_bound(start, "start"), _parse_bound(end, "end")
    kept = [
        (moment, count)
        for moment, count in _parse_rows(rows, layout, path)
        if (lower is None or moment >= lower) and (upper is None or moment < upper)
    ]
    if not any(count for _, count in kept):
        raise InvalidArtefact("holds no request in the asked window", path=path)
    whole = np.array([moment[0] for moment, _ in kept])
    fraction = np.array([moment[1] for moment, _ in kept])
    times_s = (whole - whole[0]) + (fraction - fraction[0])
    if layout.count_column is None:
        return Timestamps(times_s)
    # A plain number in a table of counts is the index of a minute, a datetime is a moment.
    if not _DATETIME.fullmatch(rows[layout.first_row][layout.time_column]):
        times_s = times_s * _MINUTE_S
    _check_minutes(times_s, path)
    return Counts(times_s, np.array([count for _, count in kept], dtype=np.int64), _MINUTE_S)
