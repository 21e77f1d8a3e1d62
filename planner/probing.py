"""Which calibration rows a plan carries as probe rows (`cascadeserve.probes`).

Rows of which a model is sure tell little, since another version of it is sure of them too; rows at a tie may fall to
either side by rounding alone. So they are taken from between, by rank, since certainties have no common scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from planner.records import Records

PROBE_ROWS = 16
# Of their inputs, before they are packed, but for one row: a plan stays a file that can be sent and kept anywhere.
LARGEST_BYTES = 512 << 10
# share of the rows, those that a model is least sure of, that are near a tie
_TIED = 0.02
# the less certain part of the rows, from which probe rows are taken
_UNSURE = 0.5


@dataclass(frozen=True, eq=False)
class ProbeRows:
    """Rows of a records file, int64 [k], and their inputs, [k, ...] by name."""

    row: NDArray[np.int64]
    inputs: Mapping[str, NDArray[np.generic]]


def choose_probe_rows(
    records: Records, inputs: Mapping[str, NDArray[np.generic]], count: int = PROBE_ROWS
) -> ProbeRows | None:
    """Choose up to `count` rows of those recorded; `inputs` are [n, ...] of all of them. None: `count` is 0."""
    if not count:
        return None
    row_bytes = sum(array.nbytes for array in inputs.values()) / len(records)
    count = min(count, max(int(LARGEST_BYTES / row_bytes), 1))
    # by model and row: the share of rows that the model is less sure of
    ranks = np.array([_ranks(answers.certainty) for answers in records.models.values()]) / len(records)
    clear = np.flatnonzero((ranks >= _TIED).all(axis=0))
    if len(clear) < count:
        clear = np.arange(len(records))
    by_certainty = clear[np.argsort(ranks[:, clear].mean(axis=0), kind="stable")]
    unsure = by_certainty[: max(int(_UNSURE * len(by_certainty)), count)]
    taken = np.unique(np.linspace(0, len(unsure) - 1, count).round().astype(np.int64))
    row = np.sort(unsure[taken]).astype(np.int64)
    return ProbeRows(row, {name: array[row] for name, array in inputs.items()})


def _ranks(values: NDArray[np.float32]) -> NDArray[np.int64]:
    ranks = np.empty(len(values), np.int64)
    ranks[np.argsort(values, kind="stable")] = np.arange(len(values))
    return ranks
