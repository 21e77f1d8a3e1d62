"""Records: what every model of a family answered, how certain it was, and what was right, row by row.

Search and calibration records are different types on purpose: everything is chosen on the first, and the second is
looked at once, by the certificate. No function that chooses anything accepts CalibrationRecords.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True, eq=False)
class ModelAnswers:
    """One model's answers to n rows: label int64 [n], certainty float32 [n], scores float16 [n, classes] if kept."""

    label: NDArray[np.int64]
    certainty: NDArray[np.float32]
    scores: NDArray[np.float16] | None = None


@dataclass(frozen=True, eq=False)
class Records:
    """Answers of all models, by name from cheap to dear, to the same n rows.

    `truth` is int64 [n], the right labels; `group_id` int64 [n] is equal for rows that are not independent of each
    other (all different where rows were drawn independently).
    """

    family: str
    models: dict[str, ModelAnswers]
    truth: NDArray[np.int64]
    group_id: NDArray[np.int64]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.truth)


@dataclass(frozen=True, eq=False)
class SearchRecords(Records):
    """Rows on which everything is chosen: reference model, ladder, thresholds."""


@dataclass(frozen=True, eq=False)
class CalibrationRecords(Records):
    """Rows that the certificate looks at, once, after the ladder is frozen."""


@dataclass(frozen=True, eq=False)
class HeldOutRecords(Records):
    """Rows (the test split) that only show afterwards whether predictions and bounds were true."""
