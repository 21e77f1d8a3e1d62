from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from benchmarks.baselines import compare_pairs, search_by_probes
from benchmarks.other_servers import BLS_MODEL, bls_stack, ray_is_missing
from cascadeserve.gear_plan import Stage
from cascadeserve.triton_config import instance_count, read_config

if TYPE_CHECKING:
    from pathlib import Path

    from cascadeserve.demo.rate_search import Found, Verdict


def found_by(true_rate_per_s: float, predicted_per_s: float) -> tuple[Found, list[str]]:
    """What the search finds where every run at up to that rate is sustained, and the kinds of runs it asked for."""
    searching = search_by_probes(predicted_per_s)
    kinds = []
    ask = next(searching)
    try:
        while True:
            kinds.append(ask.kind)
            verdict: Verdict = "sustained" if ask.rate_per_s <= true_rate_per_s else "overloaded"
            ask = searching.send(verdict)
    except StopIteration as end:
        return end.value, kinds


@pytest.mark.parametrize("predicted_per_s", [500.0, 1100.0])
def test_short_runs_find_the_rate(predicted_per_s: float) -> None:
    found, kinds = found_by(800.0, predicted_per_s)
    assert found.rate_per_s is not None
    assert 0.95 * 800.0 <= found.rate_per_s <= 800.0
    assert set(kinds) == {"probe"}


def test_nothing_is_found_where_nothing_works() -> None:
    found, _ = found_by(0.0, 500.0)
    assert found.rate_per_s is None


def test_ratios_are_by_pair() -> None:
    pairs = [{"cascade": 800.0, "bls": 400.0}, {"cascade": 1000.0, "bls": 600.0}, {"cascade": 900.0, "bls": 360.0}]
    found = compare_pairs(pairs, "bls")
    assert found["ratio"] == pytest.approx(0.5)
    assert found["off_by"] == pytest.approx(0.5)
    assert found["range"][0] == pytest.approx(0.4)
    assert found["range"][1] == pytest.approx(0.6)


def test_a_rate_that_was_not_found_leaves_no_ratio() -> None:
    assert compare_pairs([{"cascade": 800.0, "bls": 0.0}], "bls")["ratio"] is None


def test_the_bls_cascade_has_its_instances_and_all_models_are_batched(tmp_path: Path) -> None:
    stages = (Stage(model="digits_mlp", threshold=0.5), Stage(model="digits_cnn"))
    bls_stack(tmp_path, stages, 3)
    repository = tmp_path / "model_repository"
    assert instance_count(read_config(repository / BLS_MODEL / "configs" / "own.pbtxt")) == 3
    for model in ("digits_mlp", "digits_cnn", BLS_MODEL):
        assert read_config(repository / model / "config.pbtxt").HasField("dynamic_batching")
    told = read_config(repository / BLS_MODEL / "config.pbtxt").parameters["stages"].string_value
    assert told == '[["digits_mlp",0.5],["digits_cnn",null]]'


def test_an_interpreter_that_is_not_there_is_told() -> None:
    assert ray_is_missing("/nowhere/python") == "/nowhere/python cannot be run (No such file or directory)"
