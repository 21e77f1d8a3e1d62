from __future__ import annotations

import inspect

from hypothesis import given
from hypothesis import strategies as st

from cascadeserve.policy import (
    admission,
    balancing,
    batching,
    demand,
    escalation,
    gear_switch,
    ordering,
    shares,
    work,
)
from cascadeserve.policy.balancing import (
    BALANCERS,
    choose_endpoint,
    join_shortest_queue,
    least_expected_work,
    power_of_two,
    round_robin,
)

endpoints = st.lists(
    st.tuples(st.floats(0.0, 10.0), st.sampled_from([0.0, 0.5, 1.0, 3.0]), st.booleans(), st.floats(0.0, 1.0)),
    min_size=1,
    max_size=6,
)


def test_a_batch_leaves_for_the_least_work_per_weight() -> None:
    assert least_expected_work([0.3, 0.1, 0.2], [0.0] * 3, [1.0, 1.0, 1.0], [True] * 3, [0.1] * 3) == 1
    assert least_expected_work([0.3, 0.1], [0.0] * 2, [4.0, 1.0], [True] * 2, [0.1] * 2) == 0


def test_the_batch_itself_counts_so_an_idle_slow_endpoint_is_not_always_taken() -> None:
    assert least_expected_work([0.1, 0.0], [0.0] * 2, [4.0, 1.0], [True] * 2, [0.1] * 2) == 0


def test_a_faster_device_takes_a_batch_until_what_is_there_already_outweighs_it() -> None:
    idle_slow = ([0.0] * 2, [1.0] * 2, [True] * 2, [0.1, 0.3])
    assert least_expected_work([0.0, 0.0], *idle_slow) == 0
    assert least_expected_work([0.19, 0.0], *idle_slow) == 0
    assert least_expected_work([0.21, 0.0], *idle_slow) == 1


def test_ties_go_to_the_one_that_was_sent_less_and_then_to_the_first() -> None:
    assert least_expected_work([0.1, 0.1], [7.0, 3.0], [1.0, 1.0], [True, True], [0.1, 0.1]) == 1
    assert least_expected_work([0.1, 0.1], [3.0, 3.0], [1.0, 1.0], [True, True], [0.1, 0.1]) == 0


@given(endpoints)
def test_only_endpoints_with_room_and_weight_are_chosen_and_the_cheapest_of_them(
    state: list[tuple[float, float, bool, float]],
) -> None:
    work, weights, room, batch_s = zip(*state, strict=True)
    costs = {i: (work[i] + batch_s[i]) / weights[i] for i in range(len(state)) if room[i] and weights[i] > 0}
    chosen = least_expected_work(work, [0.0] * len(work), weights, room, batch_s)
    assert chosen == (min(costs, key=costs.__getitem__) if costs else -1)


@given(st.lists(st.sampled_from([1.0, 2.0, 3.0]), min_size=2, max_size=4), st.integers(100, 300))
def test_batches_that_are_never_answered_spread_in_the_proportion_of_the_weights(
    weights: list[float], batches: int
) -> None:
    work = [0.0] * len(weights)
    for _ in range(batches):
        work[least_expected_work(work, work, weights, [True] * len(weights), [1.0] * len(weights))] += 1.0
    shares = [batches * weight / sum(weights) for weight in weights]
    assert all(abs(got - wanted) <= len(weights) for got, wanted in zip(work, shares, strict=True))


def test_round_robin_takes_turns_and_passes_over_what_has_no_room() -> None:
    last, taken = -1, []
    for _ in range(7):
        last = round_robin(last, [1.0, 5.0, 0.0, 1.0], [True] * 4)
        taken.append(last)
    assert taken == [0, 1, 3, 0, 1, 3, 0]
    assert round_robin(0, [1.0] * 3, [True, False, True]) == 2
    assert round_robin(0, [1.0] * 3, [True, False, False]) == 0, "the last one again if no other has room"


def test_the_shortest_queue_is_joined_by_weight_and_of_equals_the_one_that_was_sent_less() -> None:
    assert join_shortest_queue([2, 1, 1], [0.0, 3.0, 2.0], [1.0] * 3, [True] * 3) == 2
    assert join_shortest_queue([1, 0], [0.0, 0.0], [4.0, 1.0], [True] * 2) == 0


def test_two_choices_never_take_the_longest_queue_and_spread_evenly_over_equals() -> None:
    taken = [power_of_two(turn, [0, 0, 0, 0], [1.0] * 4, [True] * 4) for turn in range(8_000)]
    assert all(abs(taken.count(index) - 2_000) < 150 for index in range(4))
    # the longest is never the better of two different ones, the shortest is whenever it is drawn: half of the time
    uneven = [power_of_two(turn, [3, 0, 1, 2], [1.0] * 4, [True] * 4) for turn in range(8_000)]
    assert uneven.count(0) == 0
    assert abs(uneven.count(1) - 4_000) < 200


@given(st.sampled_from(range(len(BALANCERS))), endpoints, st.integers(0, 1 << 40), st.integers(-1, 5), st.data())
def test_every_balancer_chooses_an_endpoint_with_room_and_weight_if_there_is_one(
    balancer: int, state: list[tuple[float, float, bool, float]], turn: int, last: int, data: st.DataObject
) -> None:
    work, weights, room, batch_s = zip(*state, strict=True)
    in_flight = data.draw(st.lists(st.integers(0, 3), min_size=len(state), max_size=len(state)))
    last = min(last, len(state) - 1)
    able = [index for index in range(len(state)) if room[index] and weights[index] > 0]
    chosen = choose_endpoint(balancer, turn, last, in_flight, work, work, weights, room, batch_s)
    assert chosen in able if able else chosen == -1


def test_the_policies_are_short() -> None:
    for module in (admission, balancing, batching, demand, escalation, gear_switch, ordering, shares, work):
        for function in vars(module).values():
            if inspect.isfunction(function):
                assert len(inspect.getsource(function).splitlines()) < 60, function.__name__
