from __future__ import annotations

import math

import pytest

from planner.load_split import capacity_per_s, least_utilisation, split_load
from tests.fakes.placements import load, model, part, room


def test_alike_endpoints_get_alike() -> None:
    endpoints = [room("x"), room("y")]
    split = split_load({"x": {"a": 1}, "y": {"a": 1}}, endpoints, load(2.0, model("a", 0.5)))
    assert split is not None
    assert split.load == {"a": {"x": 0.5, "y": 0.5}}
    assert split.utilisation == {"x": 0.5, "y": 0.5}


def test_a_faster_device_gets_more_rows_until_both_are_as_busy() -> None:
    endpoints = [room("fast"), room("slow", kind="cpu")]
    split = split_load({"fast": {"a": 1}, "slow": {"a": 1}}, endpoints, load(4.0, model("a", 0.1, cpu_work=0.3)))
    assert split is not None
    assert split.load["a"] == pytest.approx({"fast": 0.75, "slow": 0.25})
    assert split.utilisation == pytest.approx({"fast": 0.3, "slow": 0.3})


def test_the_others_are_even_where_one_is_bound_to_be_busy() -> None:
    endpoints = [room("x"), room("y"), room("z", slots=2)]
    instances = {"x": {"large": 1}, "y": {"small": 1}, "z": {"small": 2}}
    split = split_load(instances, endpoints, load(1.0, model("large", 0.9), model("small", 0.6)))
    assert split is not None
    assert split.utilisation == pytest.approx({"x": 0.9, "y": 0.2, "z": 0.2})


def test_a_model_goes_to_all_its_endpoints_where_nothing_speaks_against_it() -> None:
    endpoints = [room("x"), room("y", slots=2)]
    instances = {"x": {"a": 1, "b": 1}, "y": {"a": 2, "b": 2}}
    split = split_load(instances, endpoints, load(1.0, model("a", 0.3), model("b", 0.6)))
    assert split is not None
    for shares in split.load.values():
        assert shares == pytest.approx({"x": 1 / 3, "y": 2 / 3})


def test_a_model_without_rows_is_spread_over_its_hosts() -> None:
    endpoints = [room("x"), room("y")]
    instances = {"x": {"a": 1, "idle": 1}, "y": {"idle": 1}}
    split = split_load(instances, endpoints, load(1.0, model("a", 0.5), model("idle", 0.0)))
    assert split is not None
    assert split.load["idle"] == {"x": 0.5, "y": 0.5}
    nothing = split_load({"x": {"a": 1}}, endpoints[:1], load(0.0, model("a", 0.5)))
    assert nothing is not None
    assert (nothing.load, nothing.utilisation) == ({"a": {"x": 1.0}}, {"x": 0.0})


def test_few_instances_do_less_than_the_device_could() -> None:
    endpoints = [room("x", slots=4)]
    assert least_utilisation({"x": {"a": 2}}, endpoints, load(1.6, model("a", 1.0))) == pytest.approx(0.4)
    assert least_utilisation({"x": {"a": 1}}, endpoints, load(1.6, model("a", 1.0))) == math.inf
    assert split_load({"x": {"a": 1}}, endpoints, load(1.6, model("a", 1.0))) is None
    assert capacity_per_s({"x": {"a": 1}}, endpoints, [model("a", 1.0)]) == pytest.approx(1.0)
    assert capacity_per_s({"x": {"a": 3}}, endpoints, [model("a", 1.0)]) == pytest.approx(3.0)
    assert capacity_per_s({"x": {"a": 4}}, endpoints, [model("a", 1.0)], most_utilisation=0.5) == pytest.approx(2.0)


def test_ensembles_share_the_instances_of_a_part() -> None:
    pre = part("pre")
    models = [model("one", 1.0, parts=(pre, part("a"))), model("two", 1.0, parts=(pre, part("b")))]
    endpoints = [room("x", slots=2)]
    assert capacity_per_s({"x": {"pre": 2, "a": 2, "b": 2}}, endpoints, models) == pytest.approx(1.0)
    assert capacity_per_s({"x": {"pre": 1, "a": 2, "b": 2}}, endpoints, models) == pytest.approx(0.5)
    assert capacity_per_s({"x": {"a": 2, "b": 2}}, endpoints, models) == 0.0


def test_capacity_is_that_of_the_endpoints_that_are_up() -> None:
    endpoints = [room("x"), room("y"), room("z")]
    instances = {"x": {"small": 1}, "y": {"small": 1, "large": 1}, "z": {"large": 1}}
    models = [model("small", 0.01), model("large", 0.02)]
    assert capacity_per_s(instances, endpoints, models) == pytest.approx(100.0)
    assert capacity_per_s(instances, endpoints[:2], models) == pytest.approx(50.0)
    assert capacity_per_s(instances, endpoints[1:], models) == pytest.approx(2 / 0.03)
    assert capacity_per_s(instances, endpoints[::2], models) == pytest.approx(50.0)
    assert capacity_per_s(instances, endpoints[:1], models) == 0.0
    assert capacity_per_s(instances, [], models) == 0.0
    assert capacity_per_s(instances, endpoints, []) == math.inf


def test_the_smallest_and_the_largest_work_are_split_alike() -> None:
    endpoints, instances = [room("x", slots=2), room("y")], {"x": {"a": 1, "b": 2}, "y": {"a": 1}}
    for unit in (1e-12, 1e-3, 1e6):
        models = (model("a", 3.0 * unit), model("b", unit))
        assert capacity_per_s(instances, endpoints, models) * unit == pytest.approx(2 / 3)
        split = split_load(instances, endpoints, load(0.5 / unit, *models))
        assert split is not None
        assert split.utilisation == pytest.approx({"x": 2 / 3, "y": 2 / 3}, rel=1e-5)
        idle = split_load(instances, endpoints, load(1e-9 / unit, *models))
        assert idle is not None
        assert idle.utilisation["x"] == pytest.approx(4e-9 / 3, rel=1e-5)
    free = (model("a", 0.1, cpu_work=0.0),)
    assert capacity_per_s({"x": {"a": 1}}, [room("x", kind="cpu")], free) == math.inf
