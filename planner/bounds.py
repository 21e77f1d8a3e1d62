"""Bounds on how much less accurate a cascade is than the reference model, from a sample. All are non-asymptotic.

A row is *harmed* when the reference model is right and the cascade wrong, and *repaired* when it is the other way
round. The **gap**, accuracy of the reference minus accuracy of the cascade, is the rate of harm minus the rate of
repairs; it is at most the rate of harm, and at most the rate of disagreement, which needs no labels.

Counts are those of one sample, `delta` is the probability with which a bound may be wrong; rates lie in [0, 1] and gaps
in [-1, 1], per row. Sources: Clopper and Pearson (1934); betting, Waudby-Smith and Ramdas (2024).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from scipy.special import betaincc, betainccinv, betaincinv

from cascadeserve.errors import UsageError

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Bets as shares of the largest one that cannot lose more than everything. They are fixed here, before any data: the
# largest serves rare harm, the smallest harm in half of the rows, and neighbours differ by at most this factor.
_LARGEST_BET = 0.9
_BET_FACTOR = 2.0
_WORST_VARIANCE = 0.25

# the bound of `grouped_gap_upper` is found to this precision, from above
_PRECISION = 1e-9
# where `rows_needed` gives up
_MOST_HARMED = 1 << 22


def harms(label: NDArray[np.int64], reference: NDArray[np.int64], truth: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Rows [n] where the reference's label is right and the cascade's is not."""
    harmed: NDArray[np.bool_] = (reference == truth) & (label != truth)
    return harmed


def repairs(label: NDArray[np.int64], reference: NDArray[np.int64], truth: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Rows [n] where the cascade's label is right and the reference's is not."""
    repaired: NDArray[np.bool_] = (reference != truth) & (label == truth)
    return repaired


def rate_upper(count: float, rows: float, delta: float) -> float:
    """Exact upper bound (Clopper-Pearson, one-sided) on a rate of which `count` cases were seen in `rows` trials.

    Trials must be independent and alike. Holds with probability at least 1 - delta. Counts need not be whole, for the
    planning of sample sizes. With disagreements as cases it is the label-free bound on the gap.
    """
    _check(rows, delta, count)
    return 1.0 if count >= rows else float(betainccinv(count + 1.0, rows - count, delta))


def rate_lower(count: float, rows: float, delta: float) -> float:
    """Exact lower bound (Clopper-Pearson, one-sided) on a rate; see `rate_upper`."""
    _check(rows, delta, count)
    return 0.0 if count <= 0 else float(betaincinv(count, rows - count + 1.0, delta))


def gap_upper(harmed: float, repaired: float, rows: float, delta: float, *, repair_share: float) -> float:
    """Upper bound on the gap from independent rows: harm from above minus repairs from below.

    `repair_share` in [0, 1) of delta goes to the repairs and the rest to the harm; it must be fixed before the counts
    are seen. 0 leaves the repairs out: the plain bound on harm. On the event that both parts hold (1 - delta) the plain
    bound at the harm's part of delta holds as well, so the smaller of the two costs nothing more; since a lower bound
    on a rate is never negative, the smaller one is always the difference. What may *not* be done is to take the smaller
    of this and the plain bound at the whole delta.
    """
    if not 0.0 <= repair_share < 1.0:
        raise UsageError(f"repair_share is {repair_share:g}, but must be at least 0 and below 1")
    if harmed + repaired > rows * (1.0 + _PRECISION):
        raise UsageError(f"{harmed:g} harmed and {repaired:g} repaired rows cannot come from {rows:g} rows")
    harm = rate_upper(harmed, rows, delta * (1.0 - repair_share))
    return harm if repair_share == 0.0 else harm - rate_lower(repaired, rows, delta * repair_share)


def grouped_gap_upper(
    net_harm: NDArray[np.int64],
    size: NDArray[np.int64],
    delta: float,
    *,
    largest: int | None = None,
    copies: float = 1.0,
) -> float:
    """Upper bound on the gap from rows in groups: only the groups are independent of each other.

    `net_harm` [groups] is harmed minus repaired rows of each group, `size` [groups] its rows. The gap that is bounded
    is the one per row, E[net harm of a group] / E[rows of a group], so large groups count by their rows.

    The method is a bet that the gap is below g. A group of s rows with net harm d multiplies the wealth by
    1 - c (d - g s) / ((1 - g) largest) with a fixed c in (0, 1), which is never negative. Were the gap at least g, the
    wealth would be at most 1 on average, so it exceeds 1/delta with probability at most delta (Markov). The wealth is
    averaged over a few bets c that are fixed beforehand, does not depend on the order of the groups and rises with g;
    the bound is the g at which it reaches 1/delta. It adapts to the variance: rows that say the same in a group cost
    what they must, rows that are nearly independent inside their group cost little.

    `largest` is the size that no group of the population exceeds. Without it the largest one seen is used and the sizes
    are taken as given: the bound then speaks of the gap per row under the mix of sizes of this sample. (Given the
    sizes, groups are independent but not alike; the mean wealth is still at most 1, because a product of 1 - x_i is at
    most exp(-sum x_i).) `copies` counts every group as so many groups, for the planning of sample sizes.
    """
    seen = int(size.max(initial=0))
    _check(seen, delta)
    if np.any(size < 1) or np.any(np.abs(net_harm) > size) or len(size) != len(net_harm):
        raise UsageError("every group needs at least one row and no more net harm than rows")
    largest = seen if largest is None else largest
    if seen > largest:
        raise UsageError(f"a group has {seen} rows, more than the {largest} that no group was said to exceed")
    # Few distinct (net harm, size) pairs stand for very many groups.
    pairs, counts = np.unique(np.stack([net_harm, size]), axis=1, return_counts=True)
    harm, rows = (pairs / largest)[:, :, None]
    weight = copies * counts[:, None]
    bets = _bets(copies * len(size), delta)
    goal = math.log(1.0 / delta) + math.log(len(bets))

    def rejected(gap: float) -> bool:
        log_wealth = np.sum(weight * np.log1p(bets * (gap * rows - harm) / (1.0 - gap)), axis=0)
        return bool(np.logaddexp.reduce(log_wealth) >= goal)

    # log1p needs its argument above -1: (gap s - d) / (1 - gap) >= -s >= -largest, and every bet is below 1.
    low, high = -1.0, 1.0
    while high - low > _PRECISION:
        middle = 0.5 * (low + high)
        low, high = (low, middle) if rejected(middle) else (middle, high)
    return high


def _bets(groups: float, delta: float) -> NDArray[np.float64]:
    smallest = min(_LARGEST_BET, math.sqrt(2.0 * math.log(1.0 / delta) / (groups * _WORST_VARIANCE)))
    steps = math.ceil(math.log(_LARGEST_BET / smallest) / math.log(_BET_FACTOR))
    return np.geomspace(smallest, _LARGEST_BET, steps + 1)


def rows_needed(epsilon: float, harm_rate: float, delta: float) -> int | None:
    """Fewest independent rows with which the plain bound on harm is at most `epsilon` at that rate of harm.

    The count of harmed rows is taken as ceil(harm_rate rows): its expectation, so a certificate on so many rows passes
    about every other time, and 1.5 to 2 times as many are advisable. For G ladder entries pass delta / G. None when the
    harm rate is not below epsilon, or so near that more than some 10^8 rows were needed.
    """
    if not 0.0 < epsilon < 1.0 or not 0.0 <= harm_rate <= 1.0:
        raise UsageError(f"epsilon {epsilon:g} and the harm rate {harm_rate:g} must be shares between 0 and 1")
    _check(1, delta)
    if harm_rate >= epsilon:
        return None
    start, stop = 0, 64
    while start < _MOST_HARMED:
        harmed = np.arange(start, stop, dtype=np.int64)
        rows = _fewest_rows(harmed, epsilon, delta)
        # The slack keeps 0.1 * 30 from counting as more than 3.
        enough = harm_rate * rows <= harmed + 1e-9
        if enough.any():
            return int(rows[np.argmax(enough)])
        start, stop = stop, 2 * stop
    return None


def _fewest_rows(harmed: NDArray[np.int64], epsilon: float, delta: float) -> NDArray[np.int64]:
    """Fewest rows with which the bound is at most epsilon, for each count [k] of harmed ones, by bisection."""

    def passes(rows: NDArray[np.int64]) -> NDArray[np.bool_]:
        # The chance of so few harmed rows if the rate were epsilon.
        return np.asarray(betaincc(harmed + 1.0, (rows - harmed).astype(np.float64), epsilon) <= delta, dtype=np.bool_)

    low, high = harmed, 2 * (harmed + 1)
    while not (passed := passes(high)).all():
        low, high = np.where(passed, low, high), np.where(passed, high, 2 * high)
    while np.any(high - low > 1):
        middle = np.maximum((low + high) // 2, harmed + 1)
        passed = passes(middle)
        low, high = np.where(passed, low, middle), np.where(passed, middle, high)
    return high


def _check(rows: float, delta: float, count: float = 0.0) -> None:
    if not 0.0 < delta < 1.0:
        raise UsageError(f"delta is {delta:g}, but must lie between 0 and 1")
    if rows <= 0 or not 0 <= count <= rows:
        raise UsageError(
            f"a bound needs at least one row and a count between 0 and the rows, got {count:g} of {rows:g}"
        )
