"""Layouts where memory binds: what may stand where, and which ways are looked at."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from cascadeserve.errors import UsageError
from cascadeserve.gear_plan import Gear, LadderEntry, PlannedModel, Stage, Trigger
from planner.expected import DOWN_FRAC, expect
from planner.gears import Option
from planner.layouts import LayoutSearch, everywhere, make_sites
from planner.lower_gears import lower_gears
from planner.planning import plan_family
from planner.rank_layouts import Wanted
from planner.triggers import Tuned
from tests.fakes.planned import FormulaPredictor, cluster, goal, inputs, profile

if TYPE_CHECKING:
    from cascadeserve.cluster import Cluster

SMALL = LadderEntry(name="small", stages=(Stage(model="small"),), reach=(1.0,), accuracy=0.85)
BOTH = LadderEntry(
    name="both", stages=(Stage(model="small", threshold=0.5), Stage(model="large")), reach=(1.0, 0.5), accuracy=0.95
)
LARGE = LadderEntry(name="large", stages=(Stage(model="large"),), reach=(1.0,), accuracy=0.95)
MODELS = {
    "small": PlannedModel(max_batch=32, busy_s=((1, 0.0012), (32, 0.0074))),
    "large": PlannedModel(max_batch=32, busy_s=((1, 0.011), (32, 0.321))),
}


def endpoints(*memory_bytes: int | None, kinds: str = "") -> Cluster:
    """Endpoints a, b, ... with so much memory."""
    (one,) = cluster().endpoints
    made = [
        msgspec.structs.replace(
            one, name=name, memory_bytes=held, device_kind=kind,
            grpc=f"127.0.0.1:{i}1", http=f"127.0.0.1:{i}2", metrics=f"127.0.0.1:{i}3",
        )
        for i, (name, held, kind) in enumerate(zip("abcdefgh", memory_bytes, kinds or "c" * 8, strict=False), 1)
    ]  # fmt: skip
    return msgspec.structs.replace(cluster(), endpoints=tuple(made))


def held(small: int | None = 1, large: int | None = 3, kind: str = "c", **changes: Any) -> Any:
    """Profile with what an instance takes."""
    known = profile(device_kind=kind, **changes)
    models = {
        name: msgspec.structs.replace(known.models[name], memory_bytes=size, load_s=2.0)
        for name, size in (("small", small), ("large", large))
    }
    return msgspec.structs.replace(known, models=models)


def sets(made: Cluster, known: Any, entries: Any = (LARGE, BOTH, SMALL), **changes: Any) -> Any:
    """Alternatives, without the sites."""
    asked: dict[str, Any] = {"slo_s": 0.1, "headroom": 0.9, "top_per_s": None, "prior": None, "down_frac": DOWN_FRAC}
    devices = {each.name: known[each.kind] if isinstance(known, dict) else known for each in made.endpoints}
    one_entry = changes.pop("one_entry", False)
    search = LayoutSearch(made, devices, MODELS, entries, Wanted(**(asked | changes)), one_entry=one_entry)
    return [[search.found[place] for place in row] for row in search.first()]


@pytest.mark.parametrize("memory_bytes", [(None, None), (4, 4), (None, 4)])
def test_where_all_fit_there_is_one_layout(memory_bytes: tuple[int | None, ...]) -> None:
    assert sets(endpoints(*memory_bytes), held()) == [[{name: {"small": 1, "large": 1} for name in "ab"}]]


def test_what_takes_no_known_memory_fits_where_there_is_no_limit() -> None:
    assert len(sets(endpoints(None), held(None, None))) == 1


def test_every_layout_is_within_memory_and_runs_an_entry() -> None:
    found = sets(endpoints(3, 3, 3), held())
    assert len(found) > 1
    for row in found:
        for instances in row:
            for counts in instances.values():
                assert counts.get("small", 0) + 3 * counts.get("large", 0) <= 3
            assert any("small" in counts for counts in instances.values()) or any(
                "large" in counts for counts in instances.values()
            )
    assert max(len(row) for row in found) > 1
    # the one for the highest rates has the small model on all of them
    assert found[0][-1] == {name: {"small": 1} for name in "abc"}


def test_with_one_entry_for_all_rates_there_is_one_layout_at_a_time() -> None:
    assert all(len(row) == 1 for row in sets(endpoints(3, 3, 3), held(), one_entry=True))


def test_what_was_simulated_changes_what_is_looked_at_next() -> None:
    wanted = Wanted(0.1, 0.9, None, None, DOWN_FRAC)
    made = endpoints(3, 3, 3)
    devices = dict.fromkeys("abc", held())
    search = LayoutSearch(made, devices, MODELS, (LARGE, BOTH, SMALL), wanted, one_entry=False)
    (first, *_) = search.first()
    fluid = {"small": 1000.0, "large": 100.0, "both": 200.0}
    assert search.next({first[0]: fluid}), "there is always a best one"
    # those that looked best sustain next to nothing, so others do now
    poor = {place: dict.fromkeys(fluid, 1e-3) for place in first}
    unseen = next(place for place in range(len(search.found)) if place not in first)
    assert set(search.next(poor | {unseen: fluid})[0]) != set(first)


def test_gears_of_two_layouts_with_the_same_name_are_not_counted_twice() -> None:
    gears = [
        Gear(
            name="small", layout=layout, min_rate_per_s=0.0, max_rate_per_s=top, ladder_entry="small",
            triggers={},
        )
        for layout, top in (("low", 100.0), ("high", 1000.0))
    ]  # fmt: skip
    found = expect(gears, [SMALL], ((50.0, 0.5), (500.0, 0.5)))
    assert found is not None
    assert found.accuracy == pytest.approx(SMALL.accuracy)


def test_a_lower_layout_gets_gears_of_its_own() -> None:
    """Gears that end with each option, tiled for the rates at which the layout is in force then."""
    options = [
        Option(
            (
                Tuned(
                    entry,
                    {stage.model: Trigger(min_batch=1, max_batch=8, max_wait_s=0.0) for stage in entry.stages},
                    rate,
                ),
            )
        )
        for entry, rate in ((LARGE, 100.0), (SMALL, 1000.0))
    ]
    prior = ((30.0, 0.9), (900.0, 0.1))
    predictor = FormulaPredictor(MODELS, [LARGE, SMALL], 0.1)
    short, whole = lower_gears(options, goal(), prior, predictor, layout="low", overload=None)
    assert [(gear.ladder_entry, gear.upper_rate_per_s) for gear in short.tiled[:-1]] == [("large", 90.0)]
    assert [gear.ladder_entry for gear in whole.tiled] == ["large", "small", "small"]
    built = short.build()
    assert built is None or built[-1].degraded


def test_of_many_endpoints_not_every_way_is_tried() -> None:
    found = sets(endpoints(*([3] * 8)), held())
    assert {"small"} == {model for counts in found[0][-1].values() for model in counts}
    assert all(len(instances) == 8 for row in found for instances in row)


def test_a_device_that_is_too_slow_for_a_model_may_go_without_it() -> None:
    slow = held(kind="s")
    models = {
        name: msgspec.structs.replace(
            model, busy=tuple(msgspec.structs.replace(each, busy_s=each.busy_s * 10) for each in model.busy)
        )
        for name, model in slow.models.items()
    }
    slow = msgspec.structs.replace(slow, models=models)
    made = endpoints(None, None, kinds="cs")
    on_slow = {
        name: {"b": tuple((rows, 10 * busy_s) for rows, busy_s in model.busy_s)} for name, model in MODELS.items()
    }
    models_on = {name: msgspec.structs.replace(model, busy_s_on=on_slow[name]) for name, model in MODELS.items()}
    wanted = Wanted(0.1, 0.9, None, None, DOWN_FRAC)
    search = LayoutSearch(made, {"a": held(), "b": slow}, models_on, (LARGE, BOTH), wanted, one_entry=False)
    assert any("large" not in search.found[row[-1]].get("b", {}) for row in search.first())


def test_it_must_be_known_what_a_model_takes_where_memory_is_limited() -> None:
    with pytest.raises(UsageError, match="does not say what an instance of model 'large' takes; profile it"):
        make_sites(endpoints(3), {"a": held(large=None)}, MODELS, 0.1)


def test_models_that_fit_nowhere_are_said() -> None:
    with pytest.raises(UsageError, match="model 'small' is to stand on 1 endpoint, but fits on 0; give endpoint 'a' 5"):
        sets(endpoints(2), held(7, 9))


def test_an_endpoint_holds_as_many_instances_as_it_has_slots() -> None:
    made = endpoints(8)
    (one,) = made.endpoints
    two = msgspec.structs.replace(made, endpoints=(msgspec.structs.replace(one, slots=2),))
    assert everywhere(make_sites(two, {"a": held()}, MODELS, 0.1)) == {"a": {"small": 2, "large": 2}}
    less = msgspec.structs.replace(made, endpoints=(msgspec.structs.replace(one, slots=2, memory_bytes=7),))
    assert everywhere(make_sites(less, {"a": held()}, MODELS, 0.1)) is None


# the first run compiles the simulator
@pytest.mark.timeout(240)
def test_a_plan_has_several_layouts_where_they_pay_and_transitions_between_them() -> None:
    prior = ((20.0, 0.495), (40.0, 0.495), (1000.0, 0.01))
    given = inputs(goal=goal(max_epsilon=0.2), prior=prior, profiles={"c": held()}, cluster=endpoints(3, 3))
    made = plan_family(given, None)
    assert [layout.name for layout in made.layouts] == ["layout-1", "layout-2"]
    assert {(each.from_layout, each.to_layout) for each in made.transitions} == {
        ("layout-1", "layout-2"), ("layout-2", "layout-1"),
    }  # fmt: skip
    assert {gear.name.partition(".")[0] for gear in made.families["tiny"].gears} == {"layout-1", "layout-2"}
    alone = plan_family(replace(given, max_layouts=1), None)
    # named as where everything fits
    assert [layout.name for layout in alone.layouts] == ["all"]
    assert {gear.layout for gear in alone.families["tiny"].gears} == {"all"}
    assert alone.transitions == ()
    better, worse = (plan.families["tiny"].expected for plan in (made, alone))
    assert better is not None
    assert worse is not None
    assert better.accuracy > worse.accuracy
