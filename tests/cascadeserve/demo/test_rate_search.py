"""The searches against systems that are made up: a capacity, noise, stalls, a load generator that is late."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pytest

from cascadeserve.demo.rate_search import CONFIRMATION_STEP, Ask, Found, Verdict, search, search_near

if TYPE_CHECKING:
    from collections.abc import Callable, Generator


def drive(
    searching: Generator[Ask, Verdict, Found], judge: Callable[[Ask], Verdict]
) -> tuple[Found, list[tuple[Ask, Verdict]]]:
    asked: list[tuple[Ask, Verdict]] = []
    try:
        ask = next(searching)
        while True:
            asked.append((ask, judge(ask)))
            ask = searching.send(asked[-1][1])
    except StopIteration as end:
        return end.value, asked


def up_to(capacity: float) -> Callable[[Ask], Verdict]:
    return lambda ask: "sustained" if ask.rate_per_s <= capacity else "overloaded"


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8, 0.97, 1.0, 1.03, 1.3, 2.0, 5.0])
def test_the_rate_is_found_wherever_the_prediction_was(share: float) -> None:
    found, asked = drive(search(1000 * share), up_to(1000))
    assert found.rate_per_s is not None
    assert 1000 / 1.08 <= found.rate_per_s <= 1000
    assert found.limited_by == "system"
    assert [ask.kind for ask, _ in asked][-1] == "confirmation"
    assert len(asked) <= 15


def test_a_good_prediction_needs_few_runs() -> None:
    _, asked = drive(search(1000), up_to(1050))
    assert len(asked) <= 8


def test_one_failure_is_tried_once_more_and_two_count() -> None:
    def judge(ask: Ask) -> Verdict:
        seen.append(ask.rate_per_s)
        stalled = seen.count(ask.rate_per_s) == 1 and ask.kind == "probe"
        return "overloaded" if stalled or ask.rate_per_s > 500 else "sustained"

    seen: list[float] = []
    found, asked = drive(search(480), judge)
    assert found.rate_per_s is not None
    assert 480 <= found.rate_per_s <= 500
    probes = [ask.rate_per_s for ask, _ in asked if ask.kind == "probe"]
    assert all(probes.count(rate) == 2 for rate in probes[:-1]), "the last one may run out of probes"


def test_a_late_generator_is_given_another_chance() -> None:
    def judge(ask: Ask) -> Verdict:
        seen.append(ask)
        return "void" if len(seen) % 2 else up_to(500)(ask)

    seen: list[Ask] = []
    found, _ = drive(search(490), judge)
    assert found.rate_per_s is not None
    assert found.rate_per_s <= 500


def test_what_the_generator_cannot_send_does_not_count_as_sustained() -> None:
    found, _ = drive(search(800), lambda ask: "void" if ask.rate_per_s > 900 else "sustained")
    assert found.rate_per_s is not None
    assert 900 / 1.05 <= found.rate_per_s <= 900
    assert found.limited_by == "generator"


def test_failed_confirmations_step_down() -> None:
    def judge(ask: Ask) -> Verdict:
        return up_to(1000 if ask.kind == "probe" else 900)(ask)

    found, asked = drive(search(980), judge)
    confirmations = [ask.rate_per_s for ask, _ in asked if ask.kind == "confirmation"]
    assert found.rate_per_s == confirmations[-1]
    assert 900 / 1.2 <= found.rate_per_s <= 900
    assert confirmations[0] / confirmations[1] == pytest.approx(CONFIRMATION_STEP)
    assert confirmations == sorted(confirmations, reverse=True)


def test_a_void_confirmation_is_repeated_at_the_same_rate() -> None:
    verdicts = iter(["void", "sustained"])
    found, asked = drive(
        search(1000),
        lambda ask: next(verdicts) if ask.kind == "confirmation" else up_to(1000)(ask),  # type: ignore[arg-type, return-value]
    )
    rates = [ask.rate_per_s for ask, _ in asked if ask.kind == "confirmation"]
    assert rates == [found.rate_per_s] * 2


@pytest.mark.parametrize("verdict", ["overloaded", "void"])
def test_a_broken_system_is_given_up(verdict: Verdict) -> None:
    found, asked = drive(search(1000), lambda _: verdict)
    assert found.rate_per_s is None
    assert found.limited_by == ("system" if verdict == "overloaded" else "generator")
    assert len(asked) <= 20


def test_confirmations_that_never_pass_are_given_up() -> None:
    found, asked = drive(search(1000), lambda ask: "sustained" if ask.kind == "probe" else "overloaded")
    assert found.rate_per_s is None
    assert sum(ask.kind == "confirmation" for ask, _ in asked) <= 8


def test_a_system_without_limit_ends_the_search_too() -> None:
    found, asked = drive(search(100), lambda _: "sustained")
    assert found.limited_by == "nothing"
    assert len(asked) <= 16


@pytest.mark.parametrize("predicted", [350.0, 500.0, 700.0])
def test_stalls_cost_little(predicted: float) -> None:
    """Every tenth run fails whatever the rate, and near the capacity a run is a matter of luck."""
    rates = []
    for seed in range(200):
        rng = np.random.default_rng(seed)

        def judge(ask: Ask, rng: np.random.Generator = rng) -> Verdict:
            chance = 1.0 / (1.0 + np.exp((ask.rate_per_s - 500.0) / 5.0))
            return "sustained" if rng.random() < chance and rng.random() > 0.1 else "overloaded"

        found, asked = drive(search(predicted), judge)
        assert len(asked) <= 22
        rates.append(found.rate_per_s or 0.0)
    assert 465 <= np.median(rates) <= 505
    assert np.quantile(rates, 0.05) >= 400
    assert max(rates) <= 540, "a rate that is out of reach must not be confirmed"


@pytest.mark.parametrize("start", [350.0, 480.0, 500.0, 505.0, 600.0])
def test_near_a_known_rate_only_long_runs_are_made(start: float) -> None:
    found, asked = drive(search_near(start), up_to(500))
    assert {ask.kind for ask, _ in asked} == {"confirmation"}
    assert found.rate_per_s is not None
    assert found.rate_per_s <= 500
    assert found.rate_per_s >= min(500 / 1.2, start * CONFIRMATION_STEP**3 - 1e-6)
    assert len(asked) <= 8


def test_a_rate_that_the_next_step_missed_stands() -> None:
    found, asked = drive(search_near(495), up_to(500))
    assert (found.rate_per_s, found.limited_by) == (pytest.approx(495), "system")
    assert len(asked) == 2
