from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from planner.front import pareto_front

POINTS = st.lists(st.tuples(st.integers(0, 6), st.integers(1, 6)), max_size=30)


@given(POINTS)
def test_the_front_is_what_no_other_point_beats(points: list[tuple[int, int]]) -> None:
    front = pareto_front([accuracy for accuracy, _ in points], [work for _, work in points])
    unbeaten = {
        (accuracy, work)
        for accuracy, work in points
        if not any(a >= accuracy and w <= work and (a, w) != (accuracy, work) for a, w in points)
    }
    assert [points[i] for i in front] == sorted(unbeaten, reverse=True)
    assert [points.index(points[i]) for i in front] == front.tolist()  # of equal points the first
