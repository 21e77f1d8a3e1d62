"""The Pareto front over accuracy (more is better) and work (less is better)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray


def pareto_front(accuracy: ArrayLike, work: ArrayLike) -> NDArray[np.int64]:
    """Indices of the points [n] that no other point beats, from the most accurate to the cheapest.

    A point is beaten when another is at least as accurate at no more work and better in one of the two. Of points that
    are equal in both, the first one stands for all. Along the result both accuracy and work fall strictly.
    """
    accuracy_, work_ = np.asarray(accuracy, np.float64), np.asarray(work, np.float64)
    order = np.lexsort((-accuracy_, work_))  # stable: equal points stay in the order in which they were given
    rising = np.concatenate(([-np.inf], accuracy_[order]))
    better: NDArray[np.bool_] = rising[1:] > np.maximum.accumulate(rising)[:-1]
    front: NDArray[np.int64] = order[better][::-1]
    return front
