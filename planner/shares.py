"""Shares of the device time where several families are planned for the same devices.

A share has to do for the highest rate of its family; beyond that it is chosen for accuracy over rows, at the rates that
each family expects, weighted by the weights of the goal, and what makes no difference to that is spread so that the
family that is nearest to its limit is as far from it as can be. All of this is judged by **fluid** figures: the rate at
which a share of the devices would be busy all the time with a ladder entry, less what answers within an SLO and the
headroom of the goal usually cost. The simulator, which plans the gears, may find that a share does not do; then that
family's `least` is raised and the shares are chosen again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from planner.infeasible import Infeasible

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

# shares are multiples of one of so many parts
PARTS = 20
# sums of accuracies that differ by less are the same
_DIGITS = 9


@dataclass(frozen=True, eq=False)
class Claim:
    """What a family could do with a share of the device time.

    carried_per_s [PARTS, entries] is the highest rate, in rows per second, of each of its ladder entries with 1, 2, ...
    of the parts, and `accuracy` [entries] how accurate they are. It expects rates_per_s [rates], at each of which it
    has `rows` [rates] of its rows, and has to reach `top_per_s`. With `one_entry` one entry has to serve all rates.
    """

    family: str
    weight: float
    top_per_s: float
    rates_per_s: NDArray[np.float64]
    rows: NDArray[np.float64]
    accuracy: NDArray[np.float64]
    carried_per_s: NDArray[np.float64]
    one_entry: bool = False

    def spare(self, parts: int) -> float:
        """Rate that some entry reaches, as a multiple of the one that is to be reached."""
        return float(self.carried_per_s[parts - 1].max()) / self.top_per_s

    def worth(self, parts: int) -> float:
        """Weighted accuracy over rows; above all of its rates the fastest entry answers."""
        carried = self.carried_per_s[parts - 1]
        rates = np.full_like(self.rates_per_s, self.top_per_s) if self.one_entry else self.rates_per_s
        able = np.where(carried[:, None] >= rates, self.accuracy[:, None], -np.inf).max(axis=0)
        fastest = self.accuracy[carried.argmax()]
        return self.weight * float(np.average(np.where(np.isfinite(able), able, fastest), weights=self.rows))

    def least(self) -> int:
        """Fewest parts with which some entry reaches the rate.

        Raises:
            Infeasible: none does with all of them.

        """
        for parts in range(1, PARTS + 1):
            if self.spare(parts) >= 1.0:
                return parts
        most_per_s = self.spare(PARTS) * self.top_per_s
        raise Infeasible(
            f"family {self.family!r} asks for {self.top_per_s:g} rows/s, but even with all of the device time its "
            f"fastest entry that is accurate enough would serve about {most_per_s:.0f}; lower its max_rate_per_s, "
            "relax its SLO or accuracy, or add endpoints",
            "rate",
        )


def choose_shares(claims: Sequence[Claim], least: Mapping[str, int]) -> dict[str, int]:
    """Parts of the device time by family, `PARTS` in all; `least` is the fewest that each may have.

    Raises:
        Infeasible: the families need more than there is.

    """
    if sum(least.values()) > PARTS:
        needs = ", ".join(f"{name} {parts / PARTS:.0%}" for name, parts in least.items())
        others = sum(list(least.values())[:-1])
        last = claims[-1].family
        lacks = (others + least[last] - PARTS) / PARTS
        raise Infeasible(
            f"the families need more device time than there is to reach their rates ({needs}): with what the others "
            f"need, {last!r} lacks {lacks:.0%}; lower a max_rate_per_s, relax an SLO or an accuracy, or add endpoints",
            "rate",
        )
    # by parts given away so far: (sum of worths, least spare, parts of each family)
    best: dict[int, tuple[float, float, tuple[int, ...]]] = {0: (0.0, np.inf, ())}
    for claim in claims:
        further: dict[int, tuple[float, float, tuple[int, ...]]] = {}
        for given, (worth, spare, parts) in best.items():
            for mine in range(least[claim.family], PARTS - given + 1):
                found = (
                    round(worth + claim.worth(mine), _DIGITS), min(spare, claim.spare(mine)), (*parts, mine),
                )  # fmt: skip
                further[given + mine] = max(further.get(given + mine, found), found)
        best = further
    _, _, chosen = best[PARTS]
    return {claim.family: parts for claim, parts in zip(claims, chosen, strict=True)}
