from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from planner.infeasible import Infeasible
from planner.shares import PARTS, Claim, choose_shares

ACCURACY = np.array([0.95, 0.9])


def claim(family: str, *, most_per_s: tuple[float, float] = (200.0, 1000.0), **changes: Any) -> Claim:
    """An accurate entry and a fast one, whose rates grow with the share; as many rows at any rate up to the top."""
    given: dict[str, Any] = {
        "family": family,
        "weight": 1.0,
        "top_per_s": 300.0,
        "rates_per_s": np.linspace(5.0, 295.0, 30),
        "rows": np.ones(30),
        "accuracy": ACCURACY,
        "carried_per_s": np.outer(np.arange(1, PARTS + 1) / PARTS, most_per_s),
    }
    return Claim(**(given | changes))


def chosen(*claims: Claim) -> dict[str, int]:
    return choose_shares(claims, {each.family: each.least() for each in claims})


def test_equals_have_equal_shares_and_all_is_given_away() -> None:
    assert chosen(claim("a"), claim("b")) == {"a": 10, "b": 10}
    assert sum(chosen(claim("a"), claim("b"), claim("c")).values()) == PARTS


def test_a_share_does_for_the_rate_whatever_it_is_worth() -> None:
    parts = chosen(claim("a", weight=1000.0), claim("b", top_per_s=600.0))
    assert parts["b"] >= 12
    assert claim("b", top_per_s=600.0).least() == 12


def test_time_goes_where_it_makes_more_rows_right() -> None:
    # at these rates the accurate entry of b is never fast enough, so that more time would change nothing
    slow = claim("b", rates_per_s=np.array([250.0]), rows=np.ones(1))
    assert chosen(claim("a"), slow) == {"a": 14, "b": 6}


def test_the_weights_of_the_goal_count() -> None:
    even = chosen(claim("a"), claim("b", most_per_s=(400.0, 1000.0)))
    favoured = chosen(claim("a", weight=4.0), claim("b", most_per_s=(400.0, 1000.0)))
    assert favoured["a"] > even["a"]


def test_what_makes_no_difference_goes_to_whoever_is_nearest_to_its_limit() -> None:
    alike = np.array([0.9, 0.9])
    parts = chosen(claim("a", accuracy=alike), claim("b", accuracy=alike, top_per_s=150.0))
    assert parts == {"a": 13, "b": 7}


def test_one_entry_for_all_rates_has_to_carry_the_highest() -> None:
    alone = claim("a", one_entry=True)
    assert alone.worth(PARTS) == pytest.approx(0.9)
    assert claim("a", one_entry=True, top_per_s=150.0).worth(PARTS) == pytest.approx(0.95)


def test_a_family_that_no_share_does_for_is_named_with_what_it_would_reach() -> None:
    with pytest.raises(Infeasible, match=r"family 'a' asks for 2000 rows/s.* would serve about 1000"):
        claim("a", top_per_s=2000.0).least()


def test_families_that_need_more_than_there_is_are_told_how_much_is_missing() -> None:
    with pytest.raises(Infeasible, match=r"\(a 70%, b 60%\): with what the others need, 'b' lacks 30%"):
        chosen(claim("a", top_per_s=700.0), claim("b", top_per_s=600.0))
