"""Which layouts are best one after the other, by rates that entries reach in them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from planner.goal import RatePrior

# in a plan, unless fewer are asked for
MOST_LAYOUTS = 3
# accuracy over rows that a further layout has to gain: it costs loads, and a while in which less stands
LAYOUT_PRICE = 2e-3
_NEARLY = 0.995
_RATES = 64


@dataclass(frozen=True)
class Wanted:
    """What layouts are chosen for: rates in rows per second; `top_per_s` has to be reached, None: as much as can be.

    There may be up to `most` of them.
    """

    slo_s: float
    headroom: float
    top_per_s: float | None
    prior: RatePrior | None
    down_frac: float
    most: int = MOST_LAYOUTS


class RankedLayouts:
    """Layouts by what they are worth one after the other; `rates_per_s` [layouts, entries], `accuracy` [entries]."""

    def __init__(
        self, rates_per_s: NDArray[np.float64], accuracy: NDArray[np.float64], wanted: Wanted, *, alone: bool
    ) -> None:
        """`alone`: one entry has to serve all rates."""
        self._max_per_s = rates_per_s.max(axis=1)
        highest = float(self._max_per_s.max())
        self._top_per_s = highest if wanted.top_per_s is None else min(highest, wanted.top_per_s)
        if alone:
            self._at_per_s, self._weight = np.array([_NEARLY * self._top_per_s]), np.ones(1)
        elif wanted.prior is None:
            self._at_per_s = self._top_per_s * (np.arange(_RATES) + 0.5) / _RATES
            self._weight = np.ones(_RATES)
        else:
            self._at_per_s = np.array([rate for rate, _ in wanted.prior])
            self._weight = np.array([rate * share for rate, share in wanted.prior])
        able = rates_per_s[:, :, None] >= self._at_per_s
        best = np.where(able, accuracy[None, :, None], -np.inf).max(axis=1)
        # above all of its rates a layout answers with the fastest of its entries
        fastest = accuracy[rates_per_s.argmax(axis=1)]
        self._accuracy = np.where(np.isfinite(best), best, fastest[:, None])
        self._in_force = self._at_per_s < wanted.down_frac * self._max_per_s[:, None]

    def best(self, most: int, together: NDArray[np.bool_]) -> list[list[int]]:
        """Best single layout; then two and three in a row, if each further one is worth its price."""
        last = [index for index, rate in enumerate(self._max_per_s) if rate >= _NEARLY * self._top_per_s]
        alone = max(last, key=lambda index: (self._worth([index]), -index))
        found = [[alone]]
        rows = [[index] for index in last]
        for _ in range(1, most):
            longer = [
                [index, *row]
                for row in sorted(rows, key=lambda row: -self._worth(row))[:_RATES]
                for index in range(len(self._max_per_s))
                if together[index, row[0]] and self._max_per_s[index] < _NEARLY * self._max_per_s[row[0]]
            ]
            if not longer:
                break
            best = max(longer, key=lambda row: (self._worth(row), [-index for index in row]))
            if self._worth(best) < self._worth(found[-1]) + LAYOUT_PRICE:
                break
            found.append(best)
            rows = longer
        return found

    def _worth(self, row: Sequence[int]) -> float:
        """Accuracy over rows of layouts by rising rate."""
        accuracy = self._accuracy[row[-1]]
        for index in reversed(row[:-1]):
            # a lower layout may end sooner than it has to
            gained = np.cumsum(self._weight * self._in_force[index] * (self._accuracy[index] - accuracy))
            end = int(gained.argmax()) + 1 if gained.max(initial=0.0) > 0.0 else 0
            accuracy = np.concatenate((self._accuracy[index][:end], accuracy[end:]))
        return float(np.average(accuracy, weights=self._weight)) if self._weight.any() else 0.0
