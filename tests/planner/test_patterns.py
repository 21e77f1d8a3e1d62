from __future__ import annotations

import numpy as np
import pytest

from cascadeserve.errors import UsageError
from planner.patterns import MOST_PATTERNS, alike, fullest, hosting, patterns, undominated
from tests.fakes.placements import model, part, room


def test_endpoints_are_alike_if_nothing_tells_them_apart() -> None:
    endpoints = [room("v", 4), room("w", 5), room("x", 4), room("y", 4, slots=2), room("z", 4, kind="cpu")]
    groups = alike(endpoints, [part("a")], {})
    assert [group.names for group in groups] == [("v", "x"), ("w",), ("y",), ("z",)]
    standing = alike(endpoints[::2], [part("a")], {"x": {"a": 1, "old": 1}})
    assert [(group.names, group.standing) for group in standing] == [(("v",), (0,)), (("x",), (1,)), (("z",), (0,))]


def test_counts_are_left_out_only_where_there_are_too_many() -> None:
    parts = [part(name) for name in "abcdefgh"]
    (group,) = alike([room("x", slots=3)], parts[:4], {})
    assert len(patterns(group, parts[:4])) == 4**4
    (group,) = alike([room("x", slots=3)], parts[:6], {})
    assert len(patterns(group, parts[:6])) == 3**6
    many = [part(str(number)) for number in range(20)]
    (group,) = alike([room("x")], many, {})
    with pytest.raises(UsageError, match=f"20 models can stand on endpoint 'x' in more than {MOST_PATTERNS} ways"):
        patterns(group, many)


def test_memory_limits_patterns_and_the_fullest_reach_it() -> None:
    parts = [part(name) for name in "abcdefgh"]
    (group,) = alike([room("x", 2, slots=3)], parts, {})
    counts = patterns(group, parts)
    assert len(counts) == 1 + 8 + 8 + 8 * 7 // 2
    assert fullest(counts, group, parts).sum(axis=1).tolist() == [2] * 36


def test_an_ensemble_is_hosted_where_all_its_parts_stand() -> None:
    pre = part("pre")
    models = [model("one", 0.1, parts=(pre, part("a"))), model("b", 0.1, cpu_work=0.1)]
    parts = [pre, part("a"), part("b")]
    counts = np.array([[1, 1, 0], [1, 0, 1], [0, 1, 2]])
    assert hosting(counts, "gpu", models, parts).tolist() == [[True, False], [False, True], [False, True]]
    assert hosting(counts, "cpu", models, parts).tolist() == [[False, False], [False, True], [False, True]]


def test_more_for_less_dominates() -> None:
    counts = np.array([[0, 0], [1, 0], [0, 1], [1, 1], [2, 1]])
    assert undominated(counts, np.array([1.0, 0.0, 0.5, 0.5, 2.0])).tolist() == [False, True, False, True, True]
