from __future__ import annotations

import math
from itertools import permutations
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planner.load_split import capacity_per_s
from planner.placement import Placement, place
from planner.transitions import EXACT_DIFFERENCES, NoTransition, Step, Transition, transition
from tests.fakes.placements import load, model, part, room

if TYPE_CHECKING:
    from collections.abc import Sequence

    from planner.placement_inputs import EndpointRoom, Instances, ModelLoad


def found(
    former: Instances,
    target: Instances,
    endpoints: Sequence[EndpointRoom],
    models: Sequence[ModelLoad],
    rate_per_s: float = math.inf,
) -> Transition:
    result = transition(former, target, endpoints, models, rate_per_s=rate_per_s)
    assert isinstance(result, Transition), result
    check(former, target, endpoints, models, result)
    return result


def check(
    former: Instances,
    target: Instances,
    endpoints: Sequence[EndpointRoom],
    models: Sequence[ModelLoad],
    result: Transition,
) -> None:
    """What holds at every moment of every transition."""
    standing = {e.name: dict(former.get(e.name, {})) for e in endpoints}
    sizes = {p.name: p.memory_bytes["gpu"] for m in models for p in m.parts}
    in_use = [m for m in models if any(m.stands(standing[e.name], e.kind) for e in endpoints)]
    weakest = capacity_per_s(standing, endpoints, in_use)
    for step in result.steps:
        there = standing[step.endpoint]
        assert there.pop(step.part, 0) == step.present != step.wanted
        if step.wanted:
            there[step.part] = step.wanted
        for e in endpoints:
            held = sum(count * sizes[name] for name, count in standing[e.name].items())
            assert e.memory_bytes is None or held <= e.memory_bytes
        assert all(any(m.stands(standing[e.name], e.kind) for e in endpoints) for m in in_use)
        weakest = min(weakest, capacity_per_s(standing, endpoints, in_use))
    assert standing == {e.name: dict(target.get(e.name, {})) for e in endpoints}
    assert result.least_capacity_per_s == pytest.approx(weakest)


def shown(result: Transition) -> list[str]:
    return [f"{step.action} {step.part} at {step.endpoint}: {step.present}-{step.wanted}" for step in result.steps]


def test_growth_comes_before_shrinkage_where_memory_allows() -> None:
    endpoints = [room("x", slots=2), room("y", slots=2)]
    models = [model("a", 0.1), model("b", 0.1)]
    result = found({"x": {"a": 2}, "y": {"b": 1}}, {"x": {"b": 1}, "y": {"a": 1, "b": 2}}, endpoints, models)
    assert shown(result) == [
        "load b at x: 0-1",
        "load a at y: 0-1",
        "set count b at y: 1-2",
        "unload a at x: 2-0",
    ]
    assert (result.duration_s, result.exact) == (3.0, True)


def test_nothing_to_do_is_no_step() -> None:
    stands = {"x": {"a": 1}}
    result = found(stands, stands, [room("x", 1)], [model("a", 0.5)])
    assert (result.steps, result.duration_s, result.least_capacity_per_s) == ((), 0.0, pytest.approx(2.0))


def test_growth_waits_for_room() -> None:
    endpoints = [room("x", 2), room("y", 2)]
    models = [model("a", 0.1, 2), model("b", 0.1)]
    result = found({"x": {"a": 1}, "y": {"b": 1}}, {"x": {"b": 1}, "y": {"a": 1}}, [*endpoints, room("z", 2)], models)
    assert (len(result.steps), result.duration_s) == (6, 3.0), "one model needs a detour by z"
    alternating = found(
        {"x": {"a": 1}, "y": {"a": 1}, "z": {"b": 1}}, {"x": {"b": 1}, "y": {"a": 1}, "z": {"b": 1}},
        [*endpoints, room("z", 2)], models,
    )  # fmt: skip
    assert shown(alternating) == ["unload a at x: 1-0", "load b at x: 0-1"]


def test_two_models_that_change_places_go_by_a_third_endpoint() -> None:
    former, target = {"x": {"a": 1}, "y": {"b": 1}}, {"x": {"b": 1}, "y": {"a": 1}}
    slow = part("b", load_s=30.0)
    models = [model("a", 0.1), model("b", 0.1, parts=(slow,))]
    result = found(former, target, [room("x", 1), room("y", 1), room("z", 1)], models)
    assert shown(result) == [
        "load a at z: 0-1",
        "unload a at x: 1-0",
        "load b at x: 0-1",
        "unload b at y: 1-0",
        "load a at y: 0-1",
        "unload a at z: 1-0",
    ]
    assert (result.duration_s, result.exact) == (32.0, True)


def test_without_a_third_endpoint_the_sentence_says_what_would_do() -> None:
    former, target = {"x": {"a": 1}, "y": {"b": 1}}, {"x": {"b": 1}, "y": {"a": 1}}
    models = [model("a", 0.1, 3), model("b", 0.1, 2)]
    result = transition(former, target, [room("x", 4), room("y", 3)], models)
    assert isinstance(result, NoTransition)
    assert str(result).endswith("every model in use stands somewhere; 1 bytes more on endpoint 'x' would do")
    assert len(found(former, target, [room("x", 5), room("y", 3)], models).steps) == 4


def test_single_instances_make_room_for_each_other() -> None:
    endpoints = [room("x", 3, slots=2), room("y", 3, slots=2)]
    models = [model("a", 0.1), model("b", 0.1)]
    result = found({"x": {"a": 2}, "y": {"b": 2}}, {"x": {"b": 2}, "y": {"a": 2}}, endpoints, models)
    assert not {step.endpoint for step in result.steps} - {"x", "y"}
    assert result.least_capacity_per_s >= 10.0 - 1e-6


def test_the_weakest_moment_is_as_strong_as_can_be() -> None:
    # `a` has one endpoint to spare, `b` has none: the change has to begin with `a`
    endpoints = [room(name, 1) for name in "vwxyz"]
    models = [model("a", 0.1), model("b", 0.3)]
    former = {"v": {"a": 1}, "w": {"a": 1}, "x": {"b": 1}, "y": {"b": 1}, "z": {"b": 1}}
    target = {"v": {"b": 1}, "w": {"a": 1}, "x": {"a": 1}, "y": {"b": 1}, "z": {"b": 1}}
    result = found(former, target, endpoints, models)
    assert shown(result)[0] == "unload a at v: 1-0"
    assert result.least_capacity_per_s == pytest.approx(10.0)
    relaxed = found(former, target, endpoints, models, rate_per_s=1.0)
    assert relaxed.least_capacity_per_s >= 1.0


def test_an_ensemble_moves_as_one() -> None:
    pre = part("pre")
    models = [model("one", 0.2, parts=(pre, part("a"))), model("two", 0.2, parts=(part("b"),))]
    former = {"x": {"pre": 1, "a": 1}, "y": {"b": 1}}
    result = found(former, {"x": {"b": 1}, "y": {"pre": 1, "a": 1}}, [room("x", 2), room("y", 3)], models)
    assert shown(result)[:2] == ["load pre at y: 0-1", "load a at y: 0-1"]


def test_models_that_are_not_in_use_come_and_go_freely() -> None:
    endpoints, stays = [room("x", 3)], model("a", 0.5)
    others = [part("old", 2), part("new", 2)]
    result = transition({"x": {"a": 1, "old": 1}}, {"x": {"a": 1, "new": 1}}, endpoints, [stays], others=others)
    assert isinstance(result, Transition)
    assert shown(result) == ["unload old at x: 1-0", "load new at x: 0-1"]
    coming = found({"x": {"a": 1}}, {"x": {"a": 1, "b": 1}}, endpoints, [stays, model("b", 0.5)])
    assert coming.least_capacity_per_s == pytest.approx(2.0), "b is not in use yet"


def test_what_cannot_be_is_refused() -> None:
    endpoints, models = [room("x", 2)], [model("a", 0.5, 2), model("b", 0.5)]
    full = transition({"x": {"a": 1}}, {"x": {"a": 1, "b": 1}}, endpoints, models)
    assert isinstance(full, NoTransition)
    assert str(full) == "the target needs 1 bytes more memory than endpoint 'x' has; place anew"
    gone = transition({"x": {"a": 1}}, {"x": {"b": 1}}, endpoints, models)
    assert isinstance(gone, NoTransition)
    assert "model 'a' is in use, but stands nowhere in the target" in gone.sentence
    with pytest.raises(ValueError, match="'c' is named on endpoint 'x', but is no part"):
        transition({"x": {"c": 1}}, {"x": {"a": 1}}, endpoints, models)


def test_steps_say_what_triton_is_asked_for() -> None:
    assert [Step("x", "a", *counts).action for counts in [(0, 2), (1, 2), (2, 1), (2, 0)]] == [
        "load", "set count", "set count", "unload",
    ]  # fmt: skip


@pytest.mark.parametrize("rooms_per_endpoint", [2, 3])
def test_large_changes_are_made_greedily(rooms_per_endpoint: int) -> None:
    endpoints = [room(f"e{i}", rooms_per_endpoint) for i in range(8)]
    models = [model(name, 0.1) for name in "abcd"]
    former = {e.name: {"a": 1, "b": 1} if i < 4 else {"c": 1, "d": 1} for i, e in enumerate(endpoints)}
    target = {e.name: {"c": 1, "d": 1} if i < 4 else {"a": 1, "b": 1} for i, e in enumerate(endpoints)}
    result = found(former, target, endpoints, models)
    assert not result.exact
    assert len(result.steps) == 32
    assert result == transition(former, target, endpoints, models)


def test_a_large_circle_goes_by_the_free_endpoint() -> None:
    names = "abcdefg"
    endpoints = [*(room(f"e{i}", 1) for i in range(len(names))), room("free", 1)]
    models = [model(name, 0.1) for name in names]
    former = {f"e{i}": {name: 1} for i, name in enumerate(names)}
    target = {f"e{i}": {names[i - 1]: 1} for i in range(len(names))}
    result = found(former, target, endpoints, models)
    assert not result.exact
    assert [step.endpoint for step in (result.steps[0], result.steps[-1])] == ["free", "free"]


@pytest.mark.parametrize("seed", range(8))
def test_brute_force_finds_no_stronger_order(seed: int) -> None:
    rng = np.random.default_rng(seed)
    endpoints = [room(f"e{i}", int(rng.integers(2, 5))) for i in range(4)]
    models = [model(name, float(rng.uniform(0.1, 1.0)), int(rng.integers(1, 3))) for name in "ab"]

    def random_placement() -> dict[str, dict[str, int]]:
        while True:
            placement = {e.name: {m.name: 1 for m in models if rng.random() < 0.6} for e in endpoints}
            held = [sum(m.one_bytes("gpu") or 0 for m in models if m.name in placement[e.name]) for e in endpoints]
            if all(h <= (e.memory_bytes or 0) for h, e in zip(held, endpoints, strict=True)) and (
                capacity_per_s(placement, endpoints, models) > 0
            ):
                return placement

    former, target = random_placement(), random_placement()
    cells = [
        (e.name, m.name) for e in endpoints for m in models if (m.name in former[e.name]) != (m.name in target[e.name])
    ]
    changing = cells[:5]
    target = {
        name: {m.name: 1 for m in models if (m.name in counts) != ((name, m.name) in changing)}
        for name, counts in former.items()
    }
    known: dict[frozenset[tuple[str, str]], float] = {}

    def strength(changed: frozenset[tuple[str, str]]) -> float:
        """Capacity with some cells changed, 0 where that must not be."""
        if changed not in known:
            state = {
                e.name: {m.name: 1 for m in models if (m.name in former[e.name]) != ((e.name, m.name) in changed)}
                for e in endpoints
            }
            fits = all(
                sum(m.one_bytes("gpu") or 0 for m in models if m.name in state[e.name]) <= (e.memory_bytes or 0)
                for e in endpoints
            )
            known[changed] = capacity_per_s(state, endpoints, models) if fits else 0.0
        return known[changed]

    strongest = max(
        min(strength(frozenset(order[:n])) for n in range(len(order) + 1)) for order in permutations(changing)
    )
    result = transition(former, target, endpoints, models)
    if strongest > 0.0:
        assert isinstance(result, Transition)
        assert result.exact
        assert result.least_capacity_per_s == pytest.approx(strongest)


@st.composite
def changes(
    draw: st.DrawFn,
) -> tuple[dict[str, dict[str, int]], dict[str, dict[str, int]], list[EndpointRoom], list[ModelLoad]]:
    """Two random placements within memory; every model stands in both."""
    pre = part("pre")
    models = [
        model(
            name,
            draw(st.integers(1, 9)) / 10,
            parts=(*([pre] if name == "a" else []), part(name, draw(st.integers(1, 3)))),
        )
        for name in "abc"[: draw(st.integers(1, 3))]
    ]
    parts = {p.name: p for m in models for p in m.parts}
    hosts = [f"e{i}" for i in range(draw(st.integers(1, 4)))]
    placements = []
    for _ in range(2):
        drawn = {host: {name: draw(st.integers(0, 2)) for name in parts} for host in hosts}
        for each in models:
            chosen = drawn[draw(st.sampled_from(hosts))]
            for needed in each.parts:
                chosen[needed.name] = max(1, chosen[needed.name])
        placements.append({host: {name: n for name, n in counts.items() if n} for host, counts in drawn.items()})
    endpoints = [
        room(
            host,
            draw(st.integers(0, 4))
            + max(
                sum(n * parts[name].memory_bytes["gpu"] for name, n in placed[host].items()) for placed in placements
            ),
            slots=2,
        )
        for host in hosts
    ]
    return placements[0], placements[1], endpoints, models


@settings(max_examples=12, deadline=None)
@given(changes(), st.sampled_from([0.5, math.inf]))
def test_every_moment_of_every_transition_serves(
    change: tuple[dict[str, dict[str, int]], dict[str, dict[str, int]], list[EndpointRoom], list[ModelLoad]],
    rate: float,
) -> None:
    former, target, endpoints, models = change
    result = transition(former, target, endpoints, models, rate_per_s=rate)
    assert result == transition(former, target, endpoints, models, rate_per_s=rate)
    if isinstance(result, NoTransition):
        ample = [room(e.name, None, slots=e.slots) for e in endpoints]
        result = transition(former, target, ample, models, rate_per_s=rate)
        assert isinstance(result, Transition)
        check(former, target, ample, models, result)
        ends = (capacity_per_s(former, ample, models), capacity_per_s(target, ample, models))
        assert result.least_capacity_per_s == pytest.approx(min(ends))
    else:
        check(former, target, endpoints, models, result)


def test_placements_at_other_rates_are_reached_from_each_other() -> None:
    endpoints = [room(f"e{i}", 4, slots=2) for i in range(6)]
    quiet = [model("small", 0.05), model("large", 0.5, 3)]
    busy = [model("small", 0.1), model("large", 0.1, 3)]
    before = place(endpoints, [load(8.0, *quiet)])
    assert isinstance(before, Placement)
    after = place(endpoints, [load(40.0, *busy)], former=before.instances)
    assert isinstance(after, Placement)
    result = found(before.instances, after.instances, endpoints, quiet, rate_per_s=8.0)
    assert result.exact == (len(result.steps) <= EXACT_DIFFERENCES)
