from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from cascadeserve.policy.balancing import least_expected_work

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
