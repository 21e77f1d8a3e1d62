from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from orchestrator.backend import ModelVersion
from orchestrator.reconcile import Step, side_by_side, steps

SMALL, LARGE, OLD = ModelVersion("small", 1), ModelVersion("large", 1), ModelVersion("large", 2)

counts = st.dictionaries(st.sampled_from([SMALL, LARGE, OLD]), st.integers(1, 4))
layouts = st.dictionaries(st.sampled_from(["a", "b", "c"]), counts)


def test_steps_that_add_capacity_are_told_apart_from_those_that_take_it() -> None:
    growing, shrinking = steps({"a": {SMALL: 2, OLD: 1}, "b": {LARGE: 1}}, {"a": {SMALL: 1, LARGE: 1}, "b": {LARGE: 3}})
    assert growing == [Step("a", LARGE, 0, 1), Step("b", LARGE, 1, 3)]
    assert shrinking == [Step("a", OLD, 1, 0), Step("a", SMALL, 2, 1)]


def test_what_stands_as_wanted_needs_no_step() -> None:
    assert steps({"a": {SMALL: 1}}, {"a": {SMALL: 1}}) == ([], [])


def test_an_endpoint_that_is_down_is_left_alone() -> None:
    assert steps({}, {"a": {SMALL: 1}}) == ([], [])


def test_an_endpoint_that_the_layout_does_not_use_is_emptied() -> None:
    assert steps({"a": {SMALL: 2}}, {}) == ([], [Step("a", SMALL, 2, 0)])


@given(layouts, layouts)
def test_all_steps_together_lead_from_what_is_observed_to_what_is_wanted(
    observed: dict[str, dict[ModelVersion, int]], desired: dict[str, dict[ModelVersion, int]]
) -> None:
    growing, shrinking = steps(observed, desired)
    assert all(step.grows for step in growing)
    assert not any(step.grows for step in shrinking)
    state = {endpoint: dict(instances) for endpoint, instances in observed.items()}
    for step in (*growing, *shrinking):
        assert state[step.endpoint].get(step.model, 0) == step.present != step.wanted
        state[step.endpoint][step.model] = step.wanted
    reached = {endpoint: {model: n for model, n in models.items() if n} for endpoint, models in state.items()}
    assert reached == {endpoint: desired.get(endpoint, {}) for endpoint in observed}
    assert steps(reached, desired) == ([], [])


@given(layouts, layouts)
def test_growing_first_never_leaves_a_model_with_fewer_instances_than_before_or_after(
    observed: dict[str, dict[ModelVersion, int]], desired: dict[str, dict[ModelVersion, int]]
) -> None:
    growing, _ = steps(observed, desired)
    grown = {(step.endpoint, step.model): step.wanted for step in growing}
    for endpoint, present in observed.items():
        for model in present.keys() | desired.get(endpoint, {}).keys():
            between = grown.get((endpoint, model), present.get(model, 0))
            assert between == max(present.get(model, 0), desired.get(endpoint, {}).get(model, 0))


def test_two_plans_stand_side_by_side_with_the_larger_count_for_every_version_of_a_model() -> None:
    both = side_by_side({"a": {SMALL: 1, LARGE: 3}}, {"a": {OLD: 1}, "b": {SMALL: 2}})
    assert both == {"a": {SMALL: 1, LARGE: 3, OLD: 3}, "b": {SMALL: 2}}


@given(layouts, layouts)
def test_what_stands_side_by_side_lacks_nothing_of_either(
    first: dict[str, dict[ModelVersion, int]], second: dict[str, dict[ModelVersion, int]]
) -> None:
    both = side_by_side(first, second)
    assert steps(both, first)[0] == steps(both, second)[0] == []
    assert steps(both, side_by_side(second, first)) == ([], [])
