from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from orchestrator.backend import ModelVersion
from orchestrator.routing import load_weights
from orchestrator.state import Batch, EndpointState, FamilyState
from tests.fakes import tiny

if TYPE_CHECKING:
    from cascadeserve.gear_plan import GearPlan

# device-seconds per row at the largest batch of a gear without triggers: 64 rows
SMALL_ROW_S = 0.002 / 64
LARGE_ROW_S = 0.010 / 64
SMALL, LARGE = ModelVersion("small", 1), ModelVersion("large", 1)


def started(plan: GearPlan, layout: str = "narrow") -> FamilyState:
    return FamilyState.in_gear_for(0.0, "family", plan, layout, {"a": 1, "b": 2})


def family(gear: str = "calm") -> FamilyState:
    state = started(tiny.plan())
    state.shift(next(each for each in state.plan.gears if each.name == gear))
    return state


def endpoint(*, slots: int = 1, up: bool = True, **hosted: int | None) -> EndpointState:
    return EndpointState(
        "a", cast("Any", None), slots, up=up, hosted={ModelVersion(name, 1): limit for name, limit in hosted.items()}
    )


def batch(at: EndpointState, model: str = "small", work_s: float = 0.1) -> Batch:
    return Batch(ModelVersion(model, 1), family(), at, [], 1, work_s)


@pytest.mark.parametrize("slots", [1, 4])
def test_one_batch_more_than_the_slots_is_kept_in_flight(slots: int) -> None:
    at = endpoint(slots=slots, small=None)
    sent = 0
    while at.has_room((SMALL,)):
        at.depart(batch(at))
        sent += 1
    assert sent == slots + 1
    at.arrive(batch(at))
    assert at.has_room((SMALL,))


def test_a_held_model_has_room_up_to_its_limit_and_others_up_to_the_slots() -> None:
    at = endpoint(slots=3, small=1, large=None)
    at.depart(batch(at, "small"))
    assert not at.has_room((SMALL,))
    assert at.has_room((LARGE,))
    at.arrive(batch(at, "small"))
    assert at.has_room((SMALL,))


def test_nothing_is_sent_to_an_endpoint_that_is_down_or_lacks_the_model() -> None:
    assert not endpoint(up=False, small=None).has_room((SMALL,))
    assert not endpoint(small=None).has_room((LARGE,))
    assert not endpoint(small=None).hosts(LARGE)


@given(st.lists(st.tuples(st.sampled_from(["small", "large"]), st.floats(0.0, 1.0)), max_size=10), st.randoms())
def test_when_every_batch_is_answered_nothing_is_in_flight(batches: list[tuple[str, float]], random: Any) -> None:
    at = endpoint(slots=100, small=None, large=None)
    sent = [batch(at, model, work_s) for model, work_s in batches]
    for each in sent:
        at.depart(each)
    assert at.work_s == pytest.approx(sum(work_s for _, work_s in batches))
    random.shuffle(sent)
    for each in sent:
        at.arrive(each)
    assert at.in_flight == 0
    assert not any(at.in_flight_by_model.values())
    assert at.work_s == pytest.approx(0.0, abs=1e-9)


def test_a_family_starts_in_the_gear_for_rate_0_and_shifts_gear_and_cascade_together() -> None:
    state = started(tiny.plan(), "broad")
    assert (state.gear.name, state.entry.name, state.entry_model) == ("wide", "cascade", "small")
    alone = tiny.plan_document()
    alone["families"]["family"]["gears"][0]["ladder_entry"] = "reference"
    state.shift(tiny.plan(alone).families["family"].gears[0])
    assert (state.gear.name, state.entry.name, state.entry_model) == ("calm", "reference", "large")


def test_a_model_without_a_trigger_drains_at_once_up_to_its_own_largest_batch() -> None:
    assert family("calm").trigger("small") == (1, 64, 0.0)
    assert family("busy").trigger("small") == (8, 32, 0.01)
    assert family("busy").trigger("large") == (1, 64, 0.0)


def test_the_work_of_a_row_is_its_share_of_a_full_batch() -> None:
    assert family("calm").row_work_s("small") == pytest.approx(SMALL_ROW_S)
    assert family("busy").row_work_s("small") == pytest.approx((0.001 + 0.001 * 31 / 63) / 32)


def test_a_row_is_expected_to_cost_what_the_stages_it_may_still_reach_cost() -> None:
    state = family("calm")
    assert state.work_per_row_s == pytest.approx(SMALL_ROW_S + 0.3 * LARGE_ROW_S)
    assert state.work_from_s("small") == pytest.approx(state.work_per_row_s)
    assert state.work_from_s("large") == pytest.approx(LARGE_ROW_S)


def test_rows_left_from_another_cascade_cost_their_own_model() -> None:
    document = tiny.plan_document()
    document["families"]["family"]["gears"][0]["ladder_entry"] = "reference"
    state = started(tiny.plan(document))
    assert state.work_from_s("small") == pytest.approx(SMALL_ROW_S)


def test_a_stage_that_no_row_is_expected_to_reach_does_not_divide_by_zero() -> None:
    document = tiny.plan_document()
    document["families"]["family"]["ladder"][1]["reach"] = [1.0, 0.0]
    state = started(tiny.plan(document))
    assert state.work_per_row_s == pytest.approx(SMALL_ROW_S)
    assert state.work_from_s("large") == pytest.approx(LARGE_ROW_S)


@given(st.floats(0.0, 1e5), st.integers(1, 8))
def test_a_queue_that_waits_for_its_trigger_is_no_backlog(rate_per_s: float, slots: int) -> None:
    state = family("busy")
    min_batch, _, max_wait_s = state.trigger("small")
    waiting_rows = max(min_batch, rate_per_s * max_wait_s)
    planned_s = state.planned_work_s(rate_per_s, slots)
    assert waiting_rows * state.work_from_s("small") <= planned_s
    assert planned_s <= state.planned_work_s(rate_per_s * 1.5, slots)
    assert planned_s >= slots * state.plan.slo_s / 2


def test_more_work_than_half_an_slo_and_a_turn_of_all_models_is_backlog() -> None:
    """At 1000 rows/s a turn is one full batch of each model, so 12 ms; half an SLO is 250 ms."""
    state = family("calm")
    assert state.planned_work_s(1000.0, 1) == pytest.approx(0.25)
    assert state.planned_work_s(1000.0, 3) == pytest.approx(0.75)
    # where a turn is longer than that, a turn's rows are no backlog either
    assert state.planned_work_s(1e6, 1) > 0.25


def test_an_ensemble_is_held_to_the_limits_of_what_it_is_composed_of() -> None:
    document = tiny.plan_document()
    document["families"]["family"]["models"]["large"]["composed_of"] = {"tokens": 1, "classifier": 1}
    for layout in document["layouts"]:
        layout["instances"]["a"] = {"small": 1, "tokens": 1, "classifier": 1}
    state = started(tiny.plan(document))
    small, large = (state.queues[name].occupied for name in ("small", "large"))
    assert large == (LARGE, ModelVersion("tokens", 1), ModelVersion("classifier", 1))
    at = endpoint(slots=3, small=None, large=None, tokens=1, classifier=None)
    assert at.has_room(large)
    sent = Batch(LARGE, state, at, [], 1, 0.1)
    at.depart(sent)
    assert at.in_flight_by_model == dict.fromkeys(large, 1)
    assert not at.has_room(large)
    assert at.has_room(small)
    at.arrive(sent)
    assert at.has_room(large)
    assert not any(at.in_flight_by_model.values())


def test_load_weights_are_those_of_slots() -> None:
    state = family()
    queue = state.queues["small"]
    wide = EndpointState("a", cast("Any", None), 4, up=True, hosted={SMALL: None})
    narrow = EndpointState("b", cast("Any", None), 1, 0.25, up=True, hosted={SMALL: None})
    assert load_weights(queue, [wide, narrow]) == [1.0, 0.25]
    state.gear = msgspec.structs.replace(state.gear, load={"small": {"a": 1.0, "b": 2.0}})
    assert load_weights(queue, [wide, narrow]) == [1.0, 0.5]
    state.gear = msgspec.structs.replace(state.gear, load={"small": {"b": 2.0}})
    assert load_weights(queue, [wide, narrow]) == [0.0, 0.5]
    narrow.up = False
    assert load_weights(queue, [wide, narrow]) == [1.0, 0.25]


def test_the_work_of_endpoints_of_several_kinds_is_their_mean() -> None:
    document = tiny.plan_document(("a", "b"))
    for model in document["families"]["family"]["models"].values():
        model["busy_s_on"] = {"b": [[rows, 4 * busy_s] for rows, busy_s in model["busy_s"]]}
    state = started(tiny.plan(document))
    # the two slots of b do half of what the one of a does: all three as much as 1.5 of a
    assert state.row_work_s("small") == pytest.approx(2 * SMALL_ROW_S)
    assert state.work_per_row_s == pytest.approx(2 * (SMALL_ROW_S + 0.3 * LARGE_ROW_S))
