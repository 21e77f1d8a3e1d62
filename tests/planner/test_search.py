from __future__ import annotations

from itertools import combinations, pairwise, permutations, product
from typing import TYPE_CHECKING

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cascadeserve.errors import UsageError
from cascadeserve.gear_plan import Stage
from planner.front import pareto_front
from planner.records import HeldOutRecords, ModelAnswers, SearchRecords
from planner.search import Candidate, evaluate, reference_model, search

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import ArrayLike

NUM_LABELS = 3


def family(truth: ArrayLike, **models: tuple[ArrayLike, ArrayLike]) -> SearchRecords:
    answers = {
        name: ModelAnswers(np.array(label, np.int64), np.array(certainty, np.float32))
        for name, (label, certainty) in models.items()
    }
    right = np.array(truth, np.int64)
    return SearchRecords("family", answers, right, np.arange(len(right)))


def synthetic(num_rows: int, num_models: int, seed: int) -> tuple[SearchRecords, dict[str, float]]:
    """Models that get better with cost, with certainties that say something about being right."""
    rng = np.random.default_rng(seed)
    truth, hardness = rng.integers(0, 10, num_rows), rng.normal(size=num_rows)
    models: dict[str, tuple[ArrayLike, ArrayLike]] = {}
    for index in range(num_models):
        margin = 1.0 + 0.8 * index - hardness + 0.7 * rng.normal(size=num_rows)
        certainty = 1 / (1 + np.exp(-np.abs(margin) - 0.3 * rng.normal(size=num_rows)))
        models[f"m{index}"] = (np.where(margin > 0, truth, (truth + 1) % 10), certainty)
    return family(truth, **models), {f"m{index}": 4.0**index for index in range(num_models)}


def front_of(candidates: Sequence[Candidate]) -> list[tuple[float, float]]:
    kept = pareto_front([c.accuracy for c in candidates], [c.work_s for c in candidates])
    return [(candidates[i].accuracy, candidates[i].work_s) for i in kept]


def area_under_front(candidates: Sequence[Candidate]) -> float:
    """Integral of the best accuracy over the logarithm of the work allowed, from the cheapest model to 1000 s a row."""
    front = front_of(candidates)
    works = np.log([1000.0, *(work for _, work in front)])
    return float(np.dot([accuracy for accuracy, _ in front], -np.diff(works)))


def brute_force_front(
    records: SearchRecords, work_s: dict[str, float], depth: int, *, any_order: bool
) -> list[tuple[float, float]]:
    """All midpoint thresholds of all cascades, row by row."""
    names = sorted(records.models, key=work_s.__getitem__)
    thresholds: dict[str, list[np.float32]] = {}
    for name, answers in records.models.items():
        distinct = sorted({float(value) for value in answers.certainty if not np.isnan(value)})
        thresholds[name] = [np.float32((low + high) / 2) for low, high in pairwise(distinct)]
    points = []
    for length in range(1, depth + 1):
        for way in (permutations if any_order else combinations)(names, length):
            for chosen in product(*(thresholds[name] for name in way[:-1])):
                correct, work = 0, 0.0
                for row in range(len(records)):
                    for name, threshold in zip(way, [*chosen, None], strict=True):
                        work += work_s[name]
                        answers = records.models[name]
                        if threshold is None or answers.certainty[row] >= threshold:
                            correct += int(answers.label[row] == records.truth[row])
                            break
                points.append((correct / len(records), work / len(records)))
    unbeaten = {p for p in points if not any(q != p and q[0] >= p[0] and q[1] <= p[1] for q in points)}
    return sorted(unbeaten, reverse=True)


@st.composite
def small_families(draw: st.DrawFn) -> tuple[SearchRecords, dict[str, float]]:
    # Powers of two and whole works: shares and sums are exact, so fronts can be compared for equality.
    num_rows = draw(st.sampled_from([1, 2, 4, 8]))
    labels = st.lists(st.integers(0, NUM_LABELS - 1), min_size=num_rows, max_size=num_rows)
    stepped = st.sampled_from([0.0, 0.25, 0.5, 1.0, float("nan")])
    fine = st.integers(0, 1000).map(lambda thousandths: thousandths / 1000)
    certainties = st.lists(draw(st.sampled_from([stepped, fine])), min_size=num_rows, max_size=num_rows)
    names = [f"m{i}" for i in range(draw(st.integers(1, 3)))]
    records = family(draw(labels), **{name: (draw(labels), draw(certainties)) for name in names})
    return records, {name: float(draw(st.integers(1, 20))) for name in names}


@settings(max_examples=150, deadline=None)
@given(small_families(), st.integers(1, 3), st.booleans())
def test_an_exhaustive_grid_finds_the_brute_force_front(
    case: tuple[SearchRecords, dict[str, float]], depth: int, any_order: bool
) -> None:
    records, work_s = case
    candidates = search(records, work_s, depth=depth, any_order=any_order)
    assert front_of(candidates) == brute_force_front(records, work_s, depth, any_order=any_order)
    # and says of each what plain evaluation says
    for candidate in candidates:
        assert candidate == evaluate(records, candidate.stages, work_s)
        assert len(candidate.stages) == 1 or min(candidate.answered) > 0
    assert len({candidate.stages for candidate in candidates}) == len(candidates)
    assert {c.stages[0].model for c in candidates if len(c.stages) == 1} == set(records.models)


def test_evaluation_sends_every_row_through_the_stages() -> None:
    nan = float("nan")
    records = family([0, 0, 0, 0], small=([0, 1, 1, 0], [0.9, 0.9, 0.1, nan]), large=([1, 0, 0, 0], [1, 1, 1, 1]))
    stages = (Stage(model="small", threshold=0.5), Stage(model="large"))
    assert evaluate(records, stages, {"small": 1.0, "large": 10.0}) == Candidate(
        stages=stages, accuracy=0.75, work_s=6.0, reach=(1.0, 0.5), answered=(0.5, 0.5)
    )
    held_out = HeldOutRecords("family", records.models, records.truth, records.group_id)
    assert evaluate(held_out, stages, {"small": 1.0, "large": 10.0}).accuracy == 0.75


def test_nan_certainty_goes_on() -> None:
    nan = float("nan")
    records = family([0, 0, 0, 0], small=([1, 0, 0, 1], [nan, 0.9, 0.8, 0.1]), large=([0] * 4, [1.0] * 4))
    best = min((c for c in search(records, {"small": 1, "large": 10}) if c.accuracy == 1), key=lambda c: c.work_s)
    assert [stage.model for stage in best.stages] == ["small", "large"]
    assert best.reach == (1.0, 0.5)


@pytest.mark.parametrize("certainty", [0.7, float("nan"), float("inf")])
def test_a_model_of_constant_certainty_can_only_come_last(certainty: float) -> None:
    records, work_s = synthetic(300, 3, seed=3)
    records.models["m1"].certainty[:] = certainty
    candidates = search(records, work_s, any_order=True)
    assert all(stage.model != "m1" for c in candidates for stage in c.stages[:-1])
    assert any(len(c.stages) > 1 and c.stages[-1].model == "m1" for c in candidates)


def test_a_model_that_answers_as_another_does_adds_nothing() -> None:
    records, work_s = synthetic(300, 2, seed=4)
    alone = search(records, work_s)
    twin = SearchRecords("family", records.models | {"twin": records.models["m1"]}, records.truth, records.group_id)
    with_twin = search(twin, work_s | {"twin": work_s["m1"]})
    assert front_of(with_twin) == front_of(alone)
    # which only the name tells apart: the reference is the one that comes first
    assert reference_model(twin) == "m1"


def test_a_useless_model_never_helps() -> None:
    records, work_s = synthetic(300, 2, seed=5)
    wrong = ModelAnswers((records.truth + 1) % 10, records.models["m0"].certainty[::-1].copy())
    more = SearchRecords("family", records.models | {"useless": wrong}, records.truth, records.group_id)
    candidates = search(more, work_s | {"useless": 2.0}, any_order=True)
    assert front_of(candidates) == front_of(search(records, work_s, any_order=True))


def test_no_stage_is_idle_and_no_threshold_unreachable() -> None:
    # every row that reaches m1 is sure there, so a third stage is never reached
    truth = [0] * 8
    m0 = ([0, 0, 0, 0, 1, 1, 1, 1], [0.9] * 4 + [0.1] * 4)
    m1 = ([1, 1, 1, 1, 0, 0, 0, 0], [0.1] * 4 + [0.9] * 4)
    records = family(truth, m0=m0, m1=m1, m2=(truth, [0.5] * 8))
    candidates = search(records, {"m0": 1, "m1": 2, "m2": 50})
    assert [stage.model for stage in candidates[1].stages] == ["m0", "m1"]
    assert candidates[1].accuracy == 1.0
    assert all(len(candidate.stages) < 3 for candidate in candidates)


def test_of_thresholds_that_no_row_tells_apart_the_higher_one_is_kept() -> None:
    # Only rows 3 and 4 reach m1 in the best cascade; 0.1 and 0.9 there. The cuts between lie at 0.2, 0.5 and 0.8.
    truth = [0] * 6
    m0 = ([0, 0, 0, 1, 1, 1], [0.9, 0.9, 0.9, 0.1, 0.1, 0.1])
    m1 = ([1, 1, 1, 0, 1, 0], [0.3, 0.7, 0.7, 0.9, 0.1, 0.9])
    records = family(truth, m0=m0, m1=m1, m2=(truth, [0.5] * 6))
    best = next(c for c in search(records, {"m0": 1, "m1": 2, "m2": 50}) if c.accuracy == 1.0 and len(c.stages) == 3)
    assert best.stages[1].threshold == pytest.approx(0.8)


def test_refinement_comes_close_to_the_exhaustive_front_and_never_above_it() -> None:
    records, work_s = synthetic(400, 3, seed=6)
    exhaustive, refined = (area_under_front(search(records, work_s, grid=grid)) for grid in (400, 8))
    coarse = area_under_front(search(records, work_s, grid=8, rounds=0))
    assert coarse < refined <= exhaustive
    assert exhaustive - refined < 0.1 * (exhaustive - coarse)


def test_four_stages_are_searched_too() -> None:
    records, work_s = synthetic(200, 4, seed=7)
    three, four = search(records, work_s, depth=3), search(records, work_s, depth=4)
    assert any(len(candidate.stages) == 4 for candidate in four)
    assert area_under_front(four) > area_under_front(three)


def test_the_same_records_give_the_same_candidates() -> None:
    records, work_s = synthetic(500, 3, seed=8)
    reordered = SearchRecords("family", dict(reversed(records.models.items())), records.truth, records.group_id)
    assert search(records, work_s) == search(records, work_s) == search(reordered, work_s)


def test_candidates_fall_in_work_with_models_from_cheap_to_dear() -> None:
    records, work_s = synthetic(500, 3, seed=9)
    candidates = search(records, work_s)
    assert all(a.work_s >= b.work_s for a, b in pairwise(candidates))
    assert all(work_s[a.model] <= work_s[b.model] for c in candidates for a, b in pairwise(c.stages))
    assert all(sum(c.answered) == pytest.approx(1.0) for c in candidates)


def test_the_reference_is_the_most_accurate_model_and_of_equals_the_cheapest() -> None:
    none = [0.5, 0.5]
    records = family([0, 0], cheap=([0, 1], none), middle=([0, 0], none), dear=([0, 0], none))
    assert reference_model(records) == "middle"


def test_what_cannot_be_searched_is_refused() -> None:
    records = family([0], m=([0], [0.5]))
    empty = family([], m=([], []))
    with pytest.raises(UsageError, match="are empty"):
        search(empty, {"m": 1.0})
    with pytest.raises(UsageError, match="are empty"):
        search(family([0]), {})
    with pytest.raises(UsageError, match="hold no model"):
        reference_model(family([0]))
    for work_s in ({}, {"m": 0.0}, {"m": float("nan")}, {"m": float("inf")}):
        with pytest.raises(UsageError, match="work per row"):
            search(records, work_s)
    with pytest.raises(UsageError, match="at least 1"):
        search(records, {"m": 1.0}, depth=0)
