from __future__ import annotations

import math
import re
from itertools import combinations, pairwise

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascadeserve.errors import UsageError
from cascadeserve.gear_plan import LadderEntry, Stage
from planner.front import pareto_front
from planner.ladder import entry_names, ladder
from planner.search import Candidate

NAME = re.compile(r"\A[A-Za-z0-9_][A-Za-z0-9_.-]*\Z")


def single(model: str, accuracy: float, work_s: float) -> Candidate:
    return Candidate((Stage(model=model),), accuracy, work_s, (1.0,), (1.0,))


def cascade(threshold: float, accuracy: float, work_s: float) -> Candidate:
    stages = (Stage(model="small", threshold=threshold), Stage(model="large"))
    return Candidate(stages, accuracy, work_s, (1.0, 0.5), (0.5, 0.5))


@st.composite
def candidate_lists(draw: st.DrawFn) -> list[Candidate]:
    """Cascades dearer than the cheapest model; the reference, the better of two models, may be beaten by some."""
    points = draw(
        st.lists(st.tuples(st.integers(300, 999), st.integers(11, 5000)), max_size=8, unique_by=lambda point: point[1])
    )
    reference = draw(st.tuples(st.integers(300, 999), st.integers(11, 5000)))
    return [
        single("small", 0.3, 10.0),
        single("large", reference[0] / 1000, float(reference[1])),
        *(cascade(index + 0.5, accuracy / 1000, float(work)) for index, (accuracy, work) in enumerate(points)),
    ]


def chosen_from(candidates: list[Candidate], entries: tuple[LadderEntry, ...]) -> list[Candidate]:
    by_stages = {candidate.stages: candidate for candidate in candidates}
    return [by_stages[entry.stages] for entry in entries]


def objective(path: list[Candidate]) -> float:
    at = [(math.log(c.work_s), math.log(1 - c.accuracy + 1e-3)) for c in path]
    return sum(math.dist(a, b) ** 2 + math.log(1.05) ** 2 / 2 for a, b in pairwise(at))


@settings(max_examples=150, deadline=None)
@given(candidate_lists(), st.integers(3, 7))
def test_the_ladder_is_the_best_list_through_its_ends_and_the_reference(candidates: list[Candidate], size: int) -> None:
    entries = ladder(candidates, reference="large", size=size)
    chosen = chosen_from(candidates, entries)
    assert len(chosen) <= size
    assert all(a.work_s >= b.work_s for a, b in pairwise(chosen))
    assert max(chosen, key=lambda c: c.accuracy).accuracy == max(c.accuracy for c in candidates)
    assert chosen[-1] == candidates[0]
    assert candidates[1] in chosen
    assert len({entry.name for entry in entries}) == len(entries)

    front = [candidates[i] for i in pareto_front([c.accuracy for c in candidates], [c.work_s for c in candidates])]
    others = [c for c in chosen if c != candidates[1]]
    assert all(c in front for c in others)
    assert all(a.accuracy > b.accuracy for a, b in pairwise(others))

    must = {front[0], candidates[0], candidates[1]}
    optional = [c for c in front if c not in must]
    lists = (
        sorted({*must, *some}, key=lambda c: (-c.work_s, -c.accuracy))
        for count in range(size - len(must) + 1)
        for some in combinations(optional, count)
    )
    assert objective(chosen) == pytest.approx(min(map(objective, lists)))


def curve(num_points: int) -> list[Candidate]:
    """A smooth front from the cheapest model to a reference that costs 100 times as much."""
    work = np.geomspace(1.0, 100.0, num_points)
    accuracy = 0.95 - 0.3 * (1 - np.log10(work) / 2) ** 2
    inner = [
        cascade(0.1 + index / num_points / 2, float(a), float(w))
        for index, (a, w) in enumerate(zip(accuracy[1:-1], work[1:-1], strict=True))
    ]
    return [single("small", float(accuracy[0]), 1.0), *inner, single("large", float(accuracy[-1]), 100.0)]


def test_a_long_front_becomes_a_ladder_of_even_steps() -> None:
    candidates = curve(3000)
    entries = ladder(candidates, reference="large")
    chosen = chosen_from(candidates, entries)
    steps = [math.sqrt(objective([a, b])) for a, b in pairwise(chosen)]
    assert len(entries) == 12
    assert max(steps) < 1.15 * min(steps)
    assert (entries[0].name, entries[-1].name) == ("large", "small")
    assert entries == ladder(candidates[::-1], reference="large")


def test_places_go_above_the_floor_where_one_is_known() -> None:
    candidates = curve(3000)
    chosen = chosen_from(candidates, ladder(candidates, reference="large", floor=0.9))
    assert len(chosen) == 12
    assert all(c.accuracy >= 0.9 for c in chosen[:-1])
    assert chosen[-1] == candidates[0]
    nothing_above = ladder(candidates, reference="large", floor=1.0)
    assert [entry.name for entry in nothing_above] == ["large", "small"]


def test_a_front_with_little_on_it_gets_a_short_ladder() -> None:
    inner = [cascade(index / 10, 0.9 - index / 1e4, 1.1 - index / 100) for index in range(1, 10)]
    entries = ladder([single("large", 0.9, 1.1), *inner, single("small", 0.899, 1.0)], reference="large")
    assert len(entries) < 5


def test_a_beaten_reference_keeps_its_place_as_the_dearer_one() -> None:
    candidates = [single("small", 0.5, 1.0), cascade(0.5, 0.95, 5.0), single("large", 0.9, 10.0)]
    assert [entry.name for entry in ladder(candidates, reference="large")] == ["large", "small0.50-large", "small"]


def test_one_model_is_a_ladder_of_one() -> None:
    assert [entry.name for entry in ladder([single("only", 0.9, 1.0)], reference="only")] == ["only"]


def test_a_ladder_survives_the_gear_plan() -> None:
    entries = ladder(curve(100), reference="large")
    assert msgspec.json.decode(msgspec.json.encode(entries), type=tuple[LadderEntry, ...]) == entries


def test_what_cannot_be_a_ladder_is_refused() -> None:
    with pytest.raises(UsageError, match="needs room for 3"):
        ladder(curve(10), reference="large", size=2)
    with pytest.raises(UsageError, match="'huge' alone is not among"):
        ladder(curve(10), reference="huge")


def test_names_say_models_and_thresholds() -> None:
    def stages(*pairs: tuple[str, float | None]) -> tuple[Stage, ...]:
        return tuple(Stage(model=model, threshold=threshold) for model, threshold in pairs)

    names = entry_names([stages(("cnn", 0.6172), ("resnet", None)), stages(("resnet", None))])
    assert names == ["cnn0.62-resnet", "resnet"]
    # with as many decimals as it takes to tell entries apart, and 1 from almost 1
    close = entry_names([stages(("m7", t), ("m13", None)) for t in (0.6172, 0.6177, 0.99996, 0.00004, 2.0, -3.25)])
    assert len(set(close)) == 6
    assert [name.partition("-m13")[0] for name in close[:4]] == ["m7_0.617", "m7_0.618", "m7_0.99996", "m7_0.00004"]
    assert all(NAME.match(name) for name in close)
    # and still names when no decimals do
    tiny = entry_names([stages(("m", t), ("n", None)) for t in (1e-12, 2e-12)])
    assert tiny == ["cascade-0", "cascade-1"]
    assert max(map(len, entry_names([stages(("a" * 128, 0.5), ("b" * 128, None))]))) <= 128


def test_what_must_be_on_the_ladder_is_there_though_a_cascade_beats_it() -> None:
    beaten = single("beaten", 0.8, 500.0)
    candidates = [single("small", 0.3, 10.0), single("large", 0.9, 1000.0), cascade(0.5, 0.85, 100.0), beaten]
    names = [entry.name for entry in ladder(candidates, reference="large", also=[beaten.stages])]
    assert names == ["large", "beaten", "small0.50-large", "small"]
    assert "beaten" not in {entry.name for entry in ladder(candidates, reference="large")}


def test_a_ladder_that_is_too_short_for_what_must_be_in_it_is_refused() -> None:
    candidates = [single("small", 0.3, 10.0), single("middle", 0.6, 100.0), single("large", 0.9, 1000.0)]
    also = [(Stage(model="middle"),)]
    also += [(Stage(model=candidate.stages[0].model),) for candidate in candidates]
    assert len(ladder(candidates, reference="large", size=3, also=also)) == 3
    more = [*candidates, single("other", 0.5, 50.0)]
    with pytest.raises(UsageError, match="has no room for the 4"):
        ladder(more, reference="large", size=3, also=[*also, (Stage(model="other"),)])
