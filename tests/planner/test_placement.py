from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from planner.placement import Placement, place
from planner.unplaced import Unplaced
from tests.fakes.placements import load, model, part, room

if TYPE_CHECKING:
    from collections.abc import Sequence

    from planner.placement_inputs import EndpointRoom, Instances, ModelLoad


def tried(
    endpoints: Sequence[EndpointRoom],
    models: Sequence[ModelLoad],
    rate_per_s: float = 1.0,
    *,
    former: Instances | None = None,
    tolerance: float = 1e-4,
) -> Placement | Unplaced:
    return place(endpoints, [load(rate_per_s, *models)], former=former, tolerance=tolerance)


def placed(
    endpoints: Sequence[EndpointRoom],
    models: Sequence[ModelLoad],
    rate_per_s: float = 1.0,
    *,
    former: Instances | None = None,
    tolerance: float = 1e-4,
) -> Placement:
    result = tried(endpoints, models, rate_per_s, former=former, tolerance=tolerance)
    assert isinstance(result, Placement), result
    return result


def refused(endpoints: Sequence[EndpointRoom], models: Sequence[ModelLoad], rate_per_s: float = 1.0) -> Unplaced:
    result = tried(endpoints, models, rate_per_s)
    assert isinstance(result, Unplaced)
    return result


def test_a_busy_model_gets_more_endpoints_where_memory_is_for_one_each() -> None:
    result = placed([room(name, 1) for name in "xyz"], [model("a", 0.6), model("b", 0.2)])
    assert result.busiest == pytest.approx(0.3)
    assert sorted(map(list, result.instances.values())) == [["a"], ["a"], ["b"]]
    assert sorted(result.splits[0].utilisation.values()) == pytest.approx([0.2, 0.3, 0.3])


def test_nothing_stands_that_is_not_needed() -> None:
    one = placed([room("x", slots=4)], [model("a", 1.2), model("b", 0.5)])
    assert one.instances == {"x": {"a": 2, "b": 1}}
    two = placed([room("x"), room("y")], [model("a", 0.4), model("b", 0.4)])
    assert sum(len(counts) for counts in two.instances.values()) == 2
    assert two.busiest == pytest.approx(0.4)


def test_a_large_instance_counts_for_more_than_a_small_one() -> None:
    endpoints = [room("x", slots=2), room("y", slots=2)]
    result = placed(endpoints, [model("small", 0.9, 1), model("large", 1.0, 100)], tolerance=0.2)
    assert sum(counts.get("large", 0) for counts in result.instances.values()) == 1


def test_rows_go_where_a_model_is_fast() -> None:
    endpoints = [room("gpu"), room("cpu", kind="cpu")]
    models = [model("large", 0.5, cpu_work=900.0), model("small", 0.1, cpu_work=0.2), model("only_gpu", 0.1)]
    result = placed(endpoints, models, tolerance=0.01)
    assert result.splits[0].load["large"] == {"gpu": 1.0}
    assert result.splits[0].load["small"] == {"cpu": 1.0}
    assert result.splits[0].load["only_gpu"] == {"gpu": 1.0}


def test_an_ensemble_stands_with_all_its_parts_which_count_once() -> None:
    pre = part("pre", 2)
    models = [model("one", 0.3, parts=(pre, part("a"))), model("two", 0.3, parts=(pre, part("b")))]
    assert placed([room("x", 4)], models).instances == {"x": {"pre": 1, "a": 1, "b": 1}}
    assert refused([room("x", 3)], models).short_bytes == {"x": 1}
    apart = placed([room("x", 3), room("y", 3)], models)
    assert [set(counts) for counts in apart.instances.values()] in (
        [{"pre", "a"}, {"pre", "b"}],
        [{"pre", "b"}, {"pre", "a"}],
    )


def test_a_model_stands_on_as_many_endpoints_as_it_must_even_without_rows() -> None:
    endpoints = [room(name) for name in "xyz"]
    result = placed(endpoints, [model("a", 0.3, min_hosts=2), model("spare", 0.0, min_hosts=3)])
    assert sum("a" in counts for counts in result.instances.values()) >= 2
    assert all("spare" in counts for counts in result.instances.values())
    assert placed(endpoints, [model("a", 0.3)], 0.0).busiest == 0.0


def test_what_stands_stays_where_that_is_as_good() -> None:
    endpoints = [room(name, 1) for name in "wxyz"]
    models = [model("a", 0.4), model("b", 0.4)]
    former = {"w": {"b": 1}, "x": {"a": 1}, "y": {"b": 1}, "z": {"a": 1}}
    assert placed(endpoints, models, former=former).instances == former
    # one more for `a`: of the endpoints of `b` that lost its rows, one changes
    shifted = placed(endpoints, [model("a", 0.6), model("b", 0.2)], former=former).instances
    assert sum(shifted[name] != former[name] for name in former) == 1
    assert all("a" in shifted[name] for name in "xz")


def test_the_dear_model_is_not_loaded_where_a_cheap_one_can_be() -> None:
    endpoints = [room("x", 1), room("y", 1)]
    light, heavy = part("light", load_s=0.1), part("heavy", load_s=60.0)
    models = [model("light", 0.4, parts=(light,)), model("heavy", 0.5, parts=(heavy,))]
    assert placed(endpoints, models, former={"y": {"heavy": 1}}).instances == {"x": {"light": 1}, "y": {"heavy": 1}}
    gone = placed(endpoints, models, former={"x": {"old": 1}, "elsewhere": {"heavy": 1}, "y": {"heavy": 1}})
    assert gone.instances == {"x": {"light": 1}, "y": {"heavy": 1}}


def test_utilisation_is_given_up_for_fewer_moves_within_the_tolerance_only() -> None:
    endpoints = [room("x", 1), room("y", 1), room("z", 1)]
    models = [model("a", 0.5), model("b", 0.255)]
    former = {"x": {"a": 1}, "y": {"b": 1}, "z": {"b": 1}}
    assert placed(endpoints, models, former=former).busiest == pytest.approx(0.255)
    assert placed(endpoints, models, former=former, tolerance=2.5).instances == former


def test_a_model_that_fits_nowhere_is_named() -> None:
    why = refused([room("x", 5), room("y", 7)], [model("a", 0.1), model("huge", 0.1, 10)])
    assert (why.binding, why.short_bytes) == ("model", {"y": 3})
    assert str(why) == (
        "model 'huge' is to stand on 1 endpoint, but fits on 0; give endpoint 'y' 3 bytes more memory, "
        "or leave the model out"
    )
    twice = refused([room("x", 5), room("y", 12)], [model("huge", 0.1, 10, min_hosts=2)])
    assert twice.short_bytes == {"x": 5}
    unknown = refused([room("x", kind="cpu")], [model("a", 0.1)])
    assert "profile it on their devices (cpu)" in unknown.sentence


def test_memory_that_is_missing_is_counted_by_endpoint() -> None:
    models = [model("a", 0.1, 4), model("b", 0.1, 4), model("c", 0.1, 5)]
    why = refused([room("x", 6), room("y", 5)], models)
    assert (why.binding, why.short_bytes, why.feasible_frac) == ("memory", {"x": 2}, None)
    assert "2 bytes of memory are missing if all models are to stand; give endpoint 'x' 2 bytes more" in str(why)
    lifted = [room("x", 8), room("y", 5)]
    assert isinstance(tried(lifted, models, 1.0), Placement)


def test_memory_may_be_missing_for_a_rate_alone() -> None:
    endpoints, models = [room("x", 1, slots=2), room("y", 1)], [model("a", 1.0), model("b", 0.5)]
    why = refused(endpoints, models, 1.5)
    assert (why.binding, why.short_bytes) == ("memory", {"x": 1})
    assert why.feasible_frac == pytest.approx(2 / 3)
    assert isinstance(tried(endpoints, models, 1.0), Placement)
    assert isinstance(tried([room("x", 2, slots=2), room("y", 1)], models, 1.5), Placement)


def test_work_beyond_all_devices_is_told_with_what_would_do() -> None:
    endpoints, models = [room("x"), room("y")], [model("a", 0.5)]
    why = refused(endpoints, models, 9.0)
    assert (why.binding, why.added) == ("work", {"x": 3})
    assert why.feasible_frac == pytest.approx(4 / 9)
    assert str(why) == (
        "9 rows/s are more work than the 2 endpoints can do at 100% utilisation; lower the rate to 4 rows/s, "
        "or add 3 endpoints like 'x'"
    )
    assert isinstance(tried([*endpoints, room("1"), room("2"), room("3")], models, 9.0), Placement)


def test_one_placement_carries_several_loads_one_at_a_time() -> None:
    endpoints = [room("x", 2), room("y", 2)]
    quiet, busy = (
        load(1.0, model("small", 0.2), model("large", 1.4, 2)),
        load(8.0, model("small", 0.2), model("large", 0.02, 2)),
    )
    why = place(endpoints, [quiet, busy])
    assert isinstance(why, Unplaced)
    assert (why.binding, sum(why.short_bytes.values())) == ("memory", 2)
    assert "2 bytes of memory are missing if the loads are to be carried" in str(why)
    assert "or lower all rates to" in str(why)
    result = place([room("x", 3), room("y", 3)], [quiet, busy])
    assert isinstance(result, Placement)
    assert result.instances == {"x": {"small": 1, "large": 1}, "y": {"small": 1, "large": 1}}
    assert [split.utilisation for split in result.splits] == [
        pytest.approx({"x": level, "y": level}) for level in (0.8, 0.88)
    ]
    assert result.busiest == pytest.approx(0.88)


def test_a_model_is_the_same_under_all_loads() -> None:
    with pytest.raises(ValueError, match=r"model .a. has other parts, hosts or kinds of device in another load"):
        place([room("x")], [load(1.0, model("a", 0.1)), load(1.0, model("a", 0.1, min_hosts=2))])


def test_names_are_used_once() -> None:
    with pytest.raises(ValueError, match="a name is used twice in x, x"):
        tried([room("x"), room("x")], [model("a", 0.1)])
    with pytest.raises(ValueError, match="'a' is given twice"):
        tried([room("x")], [model("one", 0.1, parts=(part("a"),)), model("two", 0.1, parts=(part("a", 2),))], 1.0)


def test_sixty_four_endpoints_of_two_kinds() -> None:
    endpoints = [room(f"g{i}", 4, slots=2) for i in range(48)] + [room(f"c{i}", 3, kind="cpu") for i in range(16)]
    models = [
        model(name, work, memory, cpu_work=8 * work)
        for name, work, memory in [("a", 1.0, 1), ("b", 3.0, 1), ("c", 7.0, 2), ("d", 11.0, 3), ("e", 17.0, 4)]
    ]
    result = placed(endpoints, models, 1.3, tolerance=0.01)
    check(endpoints, models, 1.3, result)
    assert result == placed(endpoints, models, 1.3, tolerance=0.01)
    # all work on all devices alike is a bound that cannot be reached
    assert 39 * 1.3 / (96 + 16 / 8) <= result.busiest <= 1.0


# --- brute force


def fillings(endpoint: EndpointRoom, models: Sequence[ModelLoad]) -> list[dict[str, int]]:
    """All ways to fill an endpoint to which nothing can be added: more instances never carry less."""
    sizes = {each.name: each.memory_bytes[endpoint.kind] for m in models for each in m.parts}
    limit = sum(sizes.values()) * endpoint.slots if endpoint.memory_bytes is None else endpoint.memory_bytes
    ways = [
        dict(zip(sizes, counts, strict=True))
        for counts in product(range(endpoint.slots + 1), repeat=len(sizes))
        if sum(map(int.__mul__, counts, sizes.values())) <= limit
    ]
    return [way for way in ways if not any({**way, name: count + 1} in ways for name, count in way.items())]


def lowest_utilisation(
    endpoints: Sequence[EndpointRoom],
    models: Sequence[ModelLoad],
    rate_per_s: float,
    instances: Sequence[dict[str, int]],
) -> float:
    """By a program of its own: columns are shares by endpoint and model, then the level."""
    num = len(endpoints) * len(models)
    upper, most, highest = [], [], np.full(num + 1, 1.0)
    highest[-1] = 10.0
    for e, (endpoint, counts) in enumerate(zip(endpoints, instances, strict=True)):
        work = np.zeros(num + 1)
        for m, each in enumerate(models):
            flow = e * len(models) + m
            if endpoint.kind not in each.row_busy_s or any(counts[p.name] == 0 for p in each.parts):
                highest[flow] = 0.0
            else:
                work[flow] = rate_per_s * each.reach * each.row_busy_s[endpoint.kind]
        level = np.zeros(num + 1)
        level[-1] = endpoint.slots
        upper.append(work - level)
        most.append(0.0)
        for name, count in counts.items():
            users = np.array([any(p.name == name for p in each.parts) for each in models] * len(endpoints))
            upper.append(work * np.append(users, False))
            most.append(count)
    equal = np.hstack([np.tile(np.eye(len(models)), len(endpoints)), np.zeros((len(models), 1))])
    result = linprog(
        np.append(np.zeros(num), 1.0), upper, most, equal, np.ones(len(models)), np.column_stack((0 * highest, highest))
    )
    return float(result.x[-1]) if result.status == 0 else np.inf


@pytest.mark.parametrize("seed", range(14))
def test_brute_force_finds_nothing_better(seed: int) -> None:
    rng = np.random.default_rng(seed)
    endpoints = [
        room(
            f"e{i}",
            None if rng.random() < 0.1 else int(rng.integers(2, 7)),
            slots=int(rng.integers(1, 3)),
            kind=str(rng.choice(["gpu", "cpu"])),
        )
        for i in range(rng.integers(2, 4))
    ]
    shared = part("pre", 1)
    models = []
    for name in "abc"[: rng.integers(2, 4)]:
        own, (work, slower) = part(name, int(rng.integers(1, 4))), rng.uniform(0.1, 0.8, 2)
        cpu_work = float(work + slower) if rng.random() < 0.8 else None
        with_pre = seed % 4 == 0 and rng.random() < 0.7
        models.append(model(name, float(work), cpu_work=cpu_work, parts=(shared, own) if with_pre else (own,)))
    ways = product(*(fillings(endpoint, models) for endpoint in endpoints))
    best = min(lowest_utilisation(endpoints, models, 1.0, way) for way in ways)
    result = tried(endpoints, models, 1.0, tolerance=1e-4)
    if best > 1.0:
        assert isinstance(result, Unplaced)
    else:
        assert isinstance(result, Placement)
        check(endpoints, models, 1.0, result)
        assert best * (1 - 1e-6) <= result.busiest <= best * (1 + 1.1e-4)


# --- properties


def check(endpoints: Sequence[EndpointRoom], models: Sequence[ModelLoad], rate_per_s: float, result: Placement) -> None:
    """What every placement keeps."""
    (split,) = result.splits
    parts = {each.name: each for m in models for each in m.parts}
    assert set(split.load) == {m.name for m in models}
    for endpoint in endpoints:
        counts = result.instances[endpoint.name]
        assert all(1 <= count <= endpoint.slots for count in counts.values())
        held = sum(count * parts[name].memory_bytes[endpoint.kind] for name, count in counts.items())
        assert endpoint.memory_bytes is None or held <= endpoint.memory_bytes
        work = {
            m.name: rate_per_s * m.reach * m.row_busy_s[endpoint.kind] * split.load[m.name][endpoint.name]
            for m in models
            if endpoint.name in split.load[m.name]
        }
        for name, count in counts.items():
            busy = sum(work.get(m.name, 0.0) for m in models if parts[name] in m.parts)
            assert busy <= count + 1e-5
        assert sum(work.values()) / endpoint.slots == pytest.approx(split.utilisation[endpoint.name], abs=1e-9)
        assert split.utilisation[endpoint.name] <= 1.0 + 1e-5
    for m in models:
        hosts = [e.name for e in endpoints if m.stands(result.instances[e.name], e.kind)]
        assert len(hosts) >= m.min_hosts
        assert set(split.load[m.name]) <= set(hosts)
        assert sum(split.load[m.name].values()) == pytest.approx(1.0)
        assert all(share > 0.0 for share in split.load[m.name].values())


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[EndpointRoom], list[ModelLoad]]:
    kinds = st.sampled_from(["gpu", "gpu", "cpu"])
    memories = st.one_of(st.none(), st.integers(1, 8))
    endpoints = [
        room(f"e{i}", draw(memories), slots=draw(st.integers(1, 3)), kind=draw(kinds))
        for i in range(draw(st.integers(1, 4)))
    ]
    pre = part("pre", 1)
    models = [
        model(
            f"m{i}",
            draw(st.integers(0, 20)) / 20,
            cpu_work=draw(st.one_of(st.none(), st.integers(0, 40).map(lambda n: n / 20))),
            min_hosts=draw(st.integers(1, 2)),
            parts=(*([pre] if draw(st.booleans()) else []), part(f"m{i}", draw(st.integers(0, 4)))),
        )
        for i in range(draw(st.integers(1, 4)))
    ]
    return endpoints, models


@settings(max_examples=15, deadline=None)
@given(problems(), st.sampled_from([0.0, 0.3, 1.0]))
def test_every_placement_keeps_its_limits(problem: tuple[list[EndpointRoom], list[ModelLoad]], rate: float) -> None:
    endpoints, models = problem
    result = tried(endpoints, models, rate)
    assert result == tried(endpoints, models, rate)
    if isinstance(result, Placement):
        check(endpoints, models, rate, result)
        again = tried(endpoints, models, rate, former=result.instances)
        assert isinstance(again, Placement)
        assert again.instances == result.instances
    elif result.binding == "memory":
        more = [
            replace(
                e, memory_bytes=None if e.memory_bytes is None else e.memory_bytes + result.short_bytes.get(e.name, 0)
            )
            for e in endpoints
        ]
        assert isinstance(tried(more, models, rate), Placement)
    elif result.binding == "work":
        named = {e.name: e for e in endpoints}
        added = [replace(named[n], name=f"{n}+{i}") for n, number in result.added.items() for i in range(number)]
        assert isinstance(tried([*endpoints, *added], models, rate), Placement)


@settings(max_examples=15, deadline=None)
@given(problems(), st.integers(0, 3), st.booleans())
def test_more_endpoints_or_memory_make_nothing_worse(
    problem: tuple[list[EndpointRoom], list[ModelLoad]], which: int, add: bool
) -> None:
    endpoints, models = problem
    before = tried(endpoints, models, 0.5, tolerance=1e-3)
    if isinstance(before, Unplaced):
        return
    changed = endpoints[which % len(endpoints)]
    if add:
        more = [*endpoints, replace(changed, name="new")]
    else:
        grown = None if changed.memory_bytes is None else changed.memory_bytes + 2
        more = [replace(e, memory_bytes=grown) if e is changed else e for e in endpoints]
    after = tried(more, models, 0.5, tolerance=1e-3)
    assert isinstance(after, Placement)
    assert after.busiest <= before.busiest * (1 + 1e-3) + 1e-6


def test_work_that_is_free_somewhere_ends_the_search() -> None:
    models = [model("a", 0.4, 2, cpu_work=0.0), model("b", 0.2, 2, cpu_work=0.0)]
    result = placed([room("x"), room("y", 2, kind="cpu")], models)
    assert result.busiest == pytest.approx(0.2)
    assert placed([room("y", kind="cpu")], models).busiest == 0.0
