"""Which rows of a batch leave the cascade at this stage (paper section 4.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray


def accepted(certainty: NDArray[np.float32], threshold: float | None) -> NDArray[np.bool_]:
    """Rows whose answer is taken: shape [n] from certainty [n].

    `threshold` None marks the last stage, which answers every row. A certainty that is NaN is below every threshold,
    so such a row goes on to a larger model.
    """
    if threshold is None:
        return np.ones(certainty.shape, dtype=np.bool_)
    return np.greater_equal(certainty, np.float32(threshold))
