"""The rows that are sent, and which of them go into which request."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cascadeserve.errors import InvalidArtefact, UsageError

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

_INPUT = "input:"
_LABEL = "label"
# which rows depend on each other: for records, of no use to anyone else who reads the same file
_GROUP = "group"


@dataclass(frozen=True)
class Rows:
    """Inputs by tensor name, each [rows, ...], and the true labels, int64 [rows], where they are known."""

    inputs: dict[str, NDArray[np.generic]]
    labels: NDArray[np.int64] | None

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(next(iter(self.inputs.values())))


@dataclass(frozen=True)
class RequestRows:
    """The rows of every request: request i holds `row_index[offset[i]:offset[i + 1]]`.

    `offset` is int64 [requests + 1], `row_index` int64 [rows sent].
    """

    offset: NDArray[np.int64]
    row_index: NDArray[np.int64]


def read_rows(path: Path) -> Rows:
    """Read a rows file: .npz with arrays `input:<TENSOR>` [n, ...] and optionally `label` int64 [n].

    A `group`, which records need, is left unread. Inputs of datatype BYTES are arrays of byte strings or of text, which
    is sent as UTF-8; numpy drops zero bytes at the end of either.

    Raises:
        InvalidArtefact: naming the array.

    """
    arrays = _read_arrays(path)
    labels = arrays.pop(_LABEL, None)
    arrays.pop(_GROUP, None)
    inputs = {_input_name(key, array, path): array for key, array in arrays.items()}
    if not inputs:
        raise InvalidArtefact(f"holds no array `{_INPUT}<TENSOR>`", path=path)
    count = len(next(iter(inputs.values())))
    for name, array in inputs.items():
        if len(array) != count:
            what = f"has {len(array)} rows where the first input has {count}"
            raise InvalidArtefact(what, path=path, field=f"{_INPUT}{name}")
    if labels is not None and (labels.shape != (count,) or labels.dtype.kind not in "iu"):
        what = f"has dtype {labels.dtype} and shape {labels.shape}; it must be int64 of shape [{count}]"
        raise InvalidArtefact(what, path=path, field=_LABEL)
    return Rows(inputs, None if labels is None else labels.astype(np.int64))


def _read_arrays(path: Path) -> dict[str, NDArray[np.generic]]:
    try:
        # opened here, since numpy leaves a file open that it finds to be no archive
        with path.open("rb") as file:
            return _read_archive(np.load(file, allow_pickle=False), path)
    except OSError as error:
        raise InvalidArtefact(f"cannot be read ({error.strerror or error}); check the path", path=path) from error
    except (ValueError, zipfile.BadZipFile, EOFError) as error:
        raise InvalidArtefact(f"is no .npz file ({error})", path=path) from error


def _read_archive(archive: object, path: Path) -> dict[str, NDArray[np.generic]]:
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise InvalidArtefact("is a single array; save the rows with numpy.savez", path=path)
    arrays = {}
    with archive:
        for key in archive.files:
            try:
                arrays[key] = archive[key]
            except ValueError as error:
                raise InvalidArtefact("is an object array; store numbers or text", path=path, field=key) from error
    return arrays


def _input_name(key: str, array: NDArray[np.generic], path: Path) -> str:
    """Name of the tensor in a key `input:<TENSOR>`, its array checked."""
    name = key.removeprefix(_INPUT)
    if name == key or not name:
        raise InvalidArtefact(f"is neither `{_INPUT}<TENSOR>` nor `{_LABEL}`", path=path, field=key)
    if array.size == 0:
        raise InvalidArtefact(f"holds no rows: its shape is {array.shape}", path=path, field=key)
    if array.ndim == 0 or array.dtype.kind not in "biufSU":
        what = f"has dtype {array.dtype} and shape {array.shape}"
        raise InvalidArtefact(f"{what}; it must be numbers, booleans or text of shape [n, ...]", path=path, field=key)
    return name


def choose_rows(
    rows: int,
    requests: int,
    rng: np.random.Generator,
    *,
    per_request: tuple[int, int] = (1, 1),
    shuffle: bool = False,
) -> RequestRows:
    """Deal rows out to requests, going round and round through all `rows` in order, or in one permuted order.

    `per_request` is the smallest and the largest number of rows of a request, drawn uniformly.
    """
    low, high = per_request
    if not 1 <= low <= high:
        raise UsageError(f"rows per request {low}-{high}: it must be a range of positive numbers")
    sizes = np.full(requests, low) if low == high else rng.integers(low, high + 1, requests)
    offset = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    order = rng.permutation(rows) if shuffle else np.arange(rows)
    return RequestRows(offset, order[np.arange(offset[-1]) % rows].astype(np.int64))
