from __future__ import annotations

import os

import pytest

from benchmarks.fronts import _children, _divided, _summary


def test_cores_are_divided_between_triton_orchestrator_and_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(2, 16)))
    cores = _divided(5)
    assert cores.triton == [2, 3, 4, 5, 6]
    assert cores.orchestrator == [7, 8, 9, 10, 11, 12, 13]
    assert cores.wrk == [14, 15]
    with pytest.raises(SystemExit, match="NOT RUN: 15 cores are needed, here are 14"):
        _divided(11)


def test_runs_are_compared_with_those_of_their_round() -> None:
    alone = [{"answers_per_s": 100.0}, {"answers_per_s": 200.0}, {"answers_per_s": 100.0}]
    runs = [{"answers_per_s": 150.0}, {"answers_per_s": 400.0}, {"answers_per_s": 180.0}]
    assert _summary(runs, alone) == {"answers_per_s": 180.0, "ratio": 1.8, "ratio_range": [1.5, 2.0]}


def test_fronts_are_found_as_children() -> None:
    assert _children(os.getpid()) == []
