from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import pytest

from cascadeserve.errors import UsageError
from cascadeserve.gear_plan import LadderEntry, PlannedModel, Stage, Trigger
from planner.gears import Option, Span, build_gears, least_width_per_s, tile
from planner.triggers import Tuned
from tests.fakes.planned import FormulaPredictor, goal

if TYPE_CHECKING:
    from planner.goal import FamilyGoal

WIDE = goal(headroom=1.0)
GREEDY = Trigger(min_batch=1, max_batch=32, max_wait_s=0.0)
EAGER = Trigger(min_batch=16, max_batch=32, max_wait_s=0.01)


def option(name: str, accuracy: float, *sustained_per_s: float) -> Option:
    """One ladder entry with greedy triggers, and eager ones if two rates are given."""
    entry = LadderEntry(name=name, stages=(Stage(model=name),), reach=(1.0,), accuracy=accuracy)
    triggers = ({name: GREEDY}, {name: EAGER})
    return Option(tuple(Tuned(entry, t, rate) for t, rate in zip(triggers, sustained_per_s, strict=False)))


def ranges(spans: list[Span]) -> list[tuple[str, int, int]]:
    return [(span.tuned.entry.name, round(span.low), round(span.high)) for span in spans]


BEST, GOOD, FAST = option("best", 0.99, 2_000.0), option("good", 0.98, 10_000.0), option("fast", 0.95, 50_000.0)


def test_each_rate_gets_the_most_accurate_entry_that_sustains_it() -> None:
    assert ranges(tile([FAST, BEST, GOOD], WIDE, None)) == [
        ("best", 0, 2_000),
        ("good", 2_000, 10_000),
        ("fast", 10_000, 50_000),
    ]


def test_ranges_end_at_the_headroom() -> None:
    assert ranges(tile([BEST, FAST], goal(headroom=0.5), None)) == [("best", 0, 1_000), ("fast", 1_000, 25_000)]


def test_what_is_beaten_in_rate_and_accuracy_serves_nothing() -> None:
    assert ranges(tile([FAST, option("slow", 0.94, 9_000.0)], WIDE, None)) == [("fast", 0, 50_000)]


def test_gains_that_are_not_worth_a_gear_get_none() -> None:
    assert ranges(tile([FAST, option("hardly", 0.9501, 30_000.0)], WIDE, None)) == [("fast", 0, 50_000)]


def test_a_gear_is_wider_than_the_noise_of_the_rate() -> None:
    neighbour = option("neighbour", 0.97, 49_000.0)
    spans = tile([BEST, neighbour, FAST], WIDE, None)
    # the neighbour ends earlier than it would have to, so that there is room for the top
    assert ranges(spans)[-1][0] == "fast"
    for span in spans:
        assert span.high - span.low >= least_width_per_s(span.high, WIDE) * (1.0 - 1e-9)
    for low, high in pairwise(spans):
        assert low.high == high.low


@pytest.mark.parametrize("top_per_s", [1000.0 + 97.3 * step for step in range(20)])
def test_a_range_that_is_just_wide_enough_is_not_lost_to_rounding(top_per_s: float) -> None:
    """The upper range is as wide as it must be, to the last bit or but for it, whatever the rate."""
    options = [option("fast", 0.90, top_per_s), option("exact", 0.97, 0.9 * top_per_s)]
    prior = ((0.3 * top_per_s, 1.0),)
    assert [name for name, _, _ in ranges(tile(options, WIDE, prior))] == ["exact", "fast"]


def test_burstier_arrivals_and_larger_requests_need_wider_gears() -> None:
    plain = least_width_per_s(200_000.0, WIDE)
    assert least_width_per_s(200_000.0, goal(dispersion=9.0)) == pytest.approx(3 * plain)
    assert least_width_per_s(200_000.0, goal(min_rows_per_request=64, max_rows_per_request=64)) > 4 * plain


def test_a_slow_family_has_one_gear_however_narrow() -> None:
    assert ranges(tile([option("slow", 0.9, 5.0)], WIDE, None)) == [("slow", 0, 5)]


def test_the_rates_of_the_prior_decide_which_gears_are_worth_it() -> None:
    low_only, high_only = ((1_500.0, 1.0),), ((9_000.0, 1.0),)
    assert ("best", 0, 2_000) in ranges(tile([BEST, GOOD, FAST], WIDE, low_only))
    assert [name for name, _, _ in ranges(tile([BEST, GOOD, FAST], WIDE, high_only))] == ["good", "fast"]


def test_the_rate_that_is_asked_for_is_enough() -> None:
    assert ranges(tile([BEST, GOOD, FAST], goal(headroom=1.0, max_rate_per_s=8_000.0), None))[-1] == (
        "good", 2_000, 8_000,
    )  # fmt: skip


def test_a_rate_beyond_all_entries_is_refused_naming_what_is_there() -> None:
    with pytest.raises(UsageError, match="'fast', the fastest entry that is accurate enough, serves only 50000"):
        tile([BEST, GOOD, FAST], goal(headroom=1.0, max_rate_per_s=60_000.0), None)


def test_greedy_triggers_serve_what_they_can_and_eager_ones_the_rest() -> None:
    spans = tile([option("twin", 0.9, 20_000.0, 40_000.0)], WIDE, None)
    assert ranges(spans) == [("twin", 0, 20_000), ("twin", 20_000, 40_000)]
    assert [span.tuned.triggers["twin"] for span in spans] == [GREEDY, EAGER]
    # no room for two gears: only the eager ones reach the top
    spans = tile([option("twin", 0.9, 39_000.0, 40_000.0)], WIDE, None)
    assert [span.tuned.triggers["twin"] for span in spans] == [EAGER]


def formula(*options: Option) -> FormulaPredictor:
    """A predictor under which each option sustains far more than it claims."""
    models = {o.name: PlannedModel(max_batch=32, busy_s=((1, 1e-7), (32, 1e-6))) for o in options}
    return FormulaPredictor(models, [o.tuned[0].entry for o in options], 0.1)


def test_gears_carry_predictions_and_end_in_a_degraded_one() -> None:
    gears = build_gears([BEST, FAST], WIDE, None, formula(BEST, FAST), layout="all")
    assert [gear.name for gear in gears] == ["best", "fast", "overload"]
    assert [gear.degraded for gear in gears] == [False, False, True]
    assert gears[2].ladder_entry == "fast"
    assert gears[2].min_rate_per_s == gears[1].max_rate_per_s
    predicted = gears[0].predicted
    assert predicted is not None
    assert (predicted.accuracy, predicted.sustained_rate_per_s) == (0.99, 2_000.0)
    assert predicted.p99_s >= predicted.p95_s >= predicted.p50_s


def test_a_gear_says_what_ends_its_range() -> None:
    def ends(options: list[Option], wanted: FamilyGoal) -> list[str | None]:
        gears = build_gears(options, wanted, None, formula(*options), layout="all")
        return [gear.predicted.ended_by for gear in gears if gear.predicted is not None]

    assert ends([BEST, FAST], goal(headroom=0.5)) == ["sustained", "sustained"]
    assert ends([BEST, GOOD, FAST], goal(headroom=1.0, max_rate_per_s=8_000.0)) == ["sustained", "goal"]
    # the neighbour could serve more, but the top would be too narrow
    neighbours = [option("neighbour", 0.97, 49_027.4), option("fast", 0.95, 50_027.4)]
    assert ends(neighbours, WIDE) == ["next_gear", "sustained"]


def test_twin_gears_have_two_names() -> None:
    twin = option("twin", 0.9, 20_000.0, 40_000.0)
    gears = build_gears([twin], WIDE, None, formula(twin), layout="all", overload=FAST.tuned[0])
    assert [gear.name for gear in gears] == ["twin", "twin.eager", "overload"]
    assert gears[2].ladder_entry == "fast"


def test_a_range_shrinks_until_its_check_passes() -> None:
    predictor = formula(BEST, FAST)
    predictor.fails_from_per_s["fast"] = 45_000.0
    gears = build_gears([BEST, FAST], WIDE, None, predictor, layout="all")
    assert gears[1].upper_rate_per_s == pytest.approx(50_000.0 * 0.95**3)


def test_a_plan_that_fails_all_checks_is_refused() -> None:
    predictor = formula(FAST)
    predictor.fails_from_per_s["fast"] = 0.0
    with pytest.raises(UsageError, match="no gear keeps the SLO"):
        build_gears([FAST], WIDE, None, predictor, layout="all")


def test_a_restless_gear_gets_more_room() -> None:
    predictor = formula(BEST, GOOD, FAST)
    predictor.restless.add("fast")
    gears = build_gears([BEST, GOOD, FAST], WIDE, None, predictor, layout="all")
    calm = build_gears([BEST, GOOD, FAST], WIDE, None, formula(BEST, GOOD, FAST), layout="all")
    assert gears[-1].min_rate_per_s == calm[-1].min_rate_per_s, "the highest rate is kept"
    assert gears[-2].min_rate_per_s <= calm[-2].min_rate_per_s


def test_eager_triggers_that_latch_are_given_up() -> None:
    twin = option("twin", 0.9, 20_000.0, 40_000.0)
    predictor = formula(BEST, twin)
    predictor.latching.add("twin")
    gears = build_gears([BEST, twin], WIDE, None, predictor, layout="all")
    assert [gear.name for gear in gears] == ["best", "twin", "overload"]
    assert gears[1].upper_rate_per_s == 20_000.0


def test_a_plan_that_latches_all_the_same_is_refused() -> None:
    stuck = Option((Tuned(FAST.tuned[0].entry, {"fast": EAGER}, 50_000.0),))
    predictor = formula(FAST)
    predictor.latching.add("fast")
    with pytest.raises(UsageError, match="after a surge"):
        build_gears([stuck], WIDE, None, predictor, layout="all")
