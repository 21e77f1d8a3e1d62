"""Rows for the texts family: a few lines of Python, and which package they come from.

The text is the source code of packages that are installed anyway, so nothing is downloaded, and labels come for free.
The files of every package are divided by the checksum of their names into three pools that share no file:

    training pool   about 60 %   "train"
    held-out pool   about 20 %   "search", "calibration", "replay"
    test pool       about 20 %   "test"

**The certificate's population.** A row of `search`, `calibration` or `replay` is drawn independently of all others: a
package uniformly, a file of its held-out pool uniformly *with replacement*, a line of it, and how many lines, 1 to 4.
The three splits are independent streams of that one generator over the installed versions of the packages. One line
says little and four say much, so most rows are easy and some are very hard, which is what a cascade lives on.
"""

from __future__ import annotations

import importlib.util
import os
import sysconfig
import zlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np

from cascadeserve.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

Split = Literal["train", "search", "calibration", "replay", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
Pool = Literal["train", "held-out", "test"]

# "python" is the standard library
PACKAGES = ("python", "numpy", "scipy", "sklearn", "torch", "matplotlib")
MAX_BYTES = 240

_SEED = 20262
_SHARES: tuple[Pool, ...] = ("held-out", "test", "train", "train", "train")
_MOST_FILES = 150
_MOST_FILE_BYTES = 200_000
_MOST_LINES = 4
# shorter lines, such as a closing bracket, say nothing
_FEWEST_CHARACTERS = 16
_FEWEST_LINES = 20
_NO_SOURCES = {"site-packages", "dist-packages", "__pycache__", "include", "lib"}


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of one split.

    Attributes:
        inputs: byte strings of at most MAX_BYTES ASCII characters [n, 1], without empty ones.
        labels: int64 [n], index into PACKAGES.
        file_ids: int64 [n], checksum of the file's name: the group of dependent rows.

    """

    inputs: NDArray[np.bytes_]
    labels: NDArray[np.int64]
    file_ids: NDArray[np.int64]


@dataclass(frozen=True)
class _File:
    id: int
    lines: tuple[str, ...]


def rows(split: Split, count: int, *, seed: int = 0) -> Rows:
    """Draw `count` rows; the same arguments give the same rows, and fewer rows are the first of more rows."""
    pool: Pool = "train" if split == "train" else "test" if split == "test" else "held-out"
    rng = np.random.default_rng([_SEED, SPLITS.index(split), seed])
    labels = np.empty(count, np.int64)
    ids = np.empty(count, np.int64)
    texts = []
    for row, (of_package, of_file, of_line, of_length) in enumerate(rng.random((count, 4)).tolist()):
        labels[row] = int(of_package * len(PACKAGES))
        files = _files(PACKAGES[labels[row]], pool)
        file = files[int(of_file * len(files))]
        start = int(of_line * len(file.lines))
        text = "\n".join(file.lines[start : start + 1 + int(of_length * _MOST_LINES)])
        texts.append(text[:MAX_BYTES].encode("ascii"))
        ids[row] = file.id
    return Rows(np.array(texts, dtype=f"S{MAX_BYTES}").reshape(count, 1), labels, ids)


@cache
def _files(package: str, pool: Pool) -> tuple[_File, ...]:
    """Return a package's files of a pool, in an order that no file system decides."""
    found = {}
    for name, path in _sources(_folder(package)):
        checksum = zlib.crc32(f"{package}/{name}".encode())
        if _SHARES[checksum % len(_SHARES)] == pool and path.stat().st_size <= _MOST_FILE_BYTES:
            found[checksum] = path
    files: list[_File] = []
    for checksum in sorted(found):
        lines = [line.strip() for line in found[checksum].read_text(errors="replace").splitlines()]
        kept = tuple(line for line in lines if len(line) >= _FEWEST_CHARACTERS and line.isascii() and "\0" not in line)
        if len(kept) >= _FEWEST_LINES and len(files) < _MOST_FILES:
            files.append(_File(checksum, kept))
    return tuple(files)


def _sources(folder: Path) -> Iterator[tuple[str, Path]]:
    """Python files under a folder but tests, by their names relative to it."""
    for root, folders, names in os.walk(folder):
        # site-packages lies within the standard library; header files and the like are many
        folders[:] = [name for name in folders if "test" not in name and name not in _NO_SOURCES]
        for path in (Path(root) / name for name in names if name.endswith(".py") and "test" not in name):
            yield path.relative_to(folder).as_posix(), path


def _folder(package: str) -> Path:
    if package == "python":
        return Path(sysconfig.get_paths()["stdlib"])
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(f"the texts family reads the source of {package}, which is not installed; install it")
    return Path(spec.submodule_search_locations[0])
