"""`cascadeserve import-records`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np
from rich.console import Console
from rich.table import Table

from cascadeserve.errors import UsageError
from planner.importing import import_records, split
from planner.records_files import write_records

if TYPE_CHECKING:
    from planner.records import CalibrationRecords, HeldOutRecords, SearchRecords


def _parse_fractions(text: str) -> tuple[float, float, float]:
    try:
        search, calibration, test = (float(part) for part in text.split(","))
    except ValueError as error:
        raise UsageError(f"--fractions {text}: give three shares such as 0.4,0.4,0.2") from error
    return search, calibration, test


@click.command(short_help="Make records of predictions that exist already.")
@click.argument("import_path", metavar="IMPORT.TOML", type=click.Path(dir_okay=False, path_type=Path))
@click.option("--output", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder for the files.")
@click.option("--fractions", default="0.4,0.4,0.2", show_default=True, help="Shares: search, calibration, test.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Same seed, same split.")
def import_command(*, import_path: Path, output: Path, fractions: str, seed: int) -> None:
    """Read scores, or labels and certainties, from npz and csv files, and write search, calibration and test records.

    The file says where the right labels and each model's answers stand; rows of one group stay in one split. So a
    family can be planned before it is deployed. A records file is never overwritten: plans and certificates name it by
    its content.
    """
    splits = split(import_records(import_path), fractions=_parse_fractions(fractions), seed=seed)
    files: dict[Path, SearchRecords | CalibrationRecords | HeldOutRecords] = {
        output / "search.npz": splits.search,
        output / "calibration.npz": splits.calibration,
        output / "test.npz": splits.held_out,
    }
    if there := [path for path in files if path.exists()]:
        raise UsageError(f"--output: {there[0]} exists; a records file is not overwritten, name another folder")
    output.mkdir(parents=True, exist_ok=True)
    table = Table("file", "rows", *splits.search.models, title="accuracy by model")
    for path, records in files.items():
        write_records(path, records)
        right = (float(np.mean(answers.label == records.truth)) for answers in records.models.values())
        table.add_row(str(path), str(len(records)), *(f"{share:.2%}" for share in right))
    Console().print(table)
