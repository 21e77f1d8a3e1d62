"""Find the highest rate that a system sustains: generators that ask for runs and are told how they went.

Nothing here measures: whoever drives a generator runs what it asks for (`Ask`), sends back the `Verdict`, and gets the
result when it returns. A machine that others use stalls now and then, so one failed probe proves nothing and is tried
once more; a run whose load generator was late says nothing about the system and is repeated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Generator

Kind = Literal["probe", "confirmation"]
Verdict = Literal["sustained", "overloaded", "void"]

# A first step away from the predicted rate; every further one in the same direction is squared.
_FIRST_STEP = 1.15
_LARGEST_STEP = 2.0
# Bisection ends when the rates that do and do not work are this near to each other.
_NEAR = 1.04
# Down by so much where a long run fails at a rate that short ones passed.
CONFIRMATION_STEP = 1.04
_LATER_STEP = 1.08
_MAX_PROBES = 14
_MAX_CONFIRMATIONS = 6
_MAX_TRIES = 3
# A rate this far below the predicted one is not looked for: something is broken.
_FLOOR_SHARE = 0.02
_MAX_STEPS_UP = 3


@dataclass(frozen=True)
class Ask:
    """Please run this: short ones (`probe`) search, long ones (`confirmation`) decide."""

    rate_per_s: float
    kind: Kind


@dataclass(frozen=True)
class Found:
    """The highest rate that a long run confirmed, None if there was none, and what stood in the way of a higher one.

    `limited_by` is "generator" where the rate above was given up because the load generator was late in every try;
    "nothing" where no rate above was tried.
    """

    rate_per_s: float | None
    limited_by: Literal["system", "generator", "nothing"]


@dataclass
class _Budget:
    probes: int = _MAX_PROBES


def search(predicted_rate_per_s: float) -> Generator[Ask, Verdict, Found]:
    """Bracket the highest sustained rate from a predicted one, bisect, confirm."""
    budget = _Budget()
    low: float | None = None
    high: float | None = None
    limited_by: Literal["system", "generator", "nothing"] = "nothing"
    rate, step = predicted_rate_per_s, _FIRST_STEP
    while budget.probes > 0 and rate > predicted_rate_per_s * _FLOOR_SHARE:
        reason = yield from _settle(rate, budget)
        if reason == "nothing":
            low = rate
        else:
            high, limited_by = rate, reason
        if low is not None and high is not None:
            if high / low <= _NEAR:
                break
            rate = math.sqrt(low * high)
        else:
            rate = rate * step if high is None else rate / step
            step = min(step * step, _LARGEST_STEP)
    if low is None:
        return Found(None, limited_by)
    return (yield from _confirm(low, limited_by))


def search_near(rate_per_s: float) -> Generator[Ask, Verdict, Found]:
    """Look again near a rate that was found before, with long runs only: up while it goes, else down."""
    for step in range(_MAX_STEPS_UP + 1):
        rate = rate_per_s * CONFIRMATION_STEP**step
        verdict = yield Ask(rate, "confirmation")
        if verdict == "void":
            verdict = yield Ask(rate, "confirmation")
        if verdict == "sustained":
            continue
        limited_by: Literal["system", "generator"] = "generator" if verdict == "void" else "system"
        if step:
            return Found(rate / CONFIRMATION_STEP, limited_by)
        return (yield from _confirm(rate / CONFIRMATION_STEP, limited_by))
    return Found(rate_per_s * CONFIRMATION_STEP**_MAX_STEPS_UP, "nothing")


def _settle(rate: float, budget: _Budget) -> Generator[Ask, Verdict, Literal["system", "generator", "nothing"]]:
    """Decide one rate with short runs: what stands in its way, "nothing" if one of them was sustained."""
    failures = 0
    for _ in range(_MAX_TRIES):
        verdict = yield Ask(rate, "probe")
        budget.probes -= 1
        if verdict == "sustained":
            return "nothing"
        failures += verdict == "overloaded"
        if failures > 1 or budget.probes <= 0:
            break
    return "system" if failures else "generator"


def _confirm(rate: float, limited_by: Literal["system", "generator", "nothing"]) -> Generator[Ask, Verdict, Found]:
    """Confirm a rate by a long run, or a lower one: the second step down and all further ones are larger."""
    for number in range(_MAX_CONFIRMATIONS):
        verdict = yield Ask(rate, "confirmation")
        if verdict == "void":
            verdict = yield Ask(rate, "confirmation")
        if verdict == "sustained":
            return Found(rate, limited_by)
        limited_by = "generator" if verdict == "void" else "system"
        rate /= CONFIRMATION_STEP if number == 0 else _LATER_STEP
    return Found(None, limited_by)
