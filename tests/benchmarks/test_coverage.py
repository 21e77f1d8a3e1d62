from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

from benchmarks import coverage, populations
from benchmarks.coverage import judged, measure
from benchmarks.populations import AbsentError, Population, exceeded
from planner.records import ModelAnswers, Records

if TYPE_CHECKING:
    from pathlib import Path


def family(num_rows: int = 3000) -> Population:
    """Two models, of which the cheap one is right in 70 % and the dear one in 90 % of the rows."""
    rng = np.random.default_rng(5)
    truth = rng.integers(0, 4, num_rows)
    models = {}
    for name, accuracy in {"small": 0.7, "large": 0.9}.items():
        right = rng.random(num_rows) < accuracy
        certainty = np.clip(0.5 + 0.3 * right + 0.2 * rng.normal(size=num_rows), 0, 1).astype(np.float32)
        models[name] = ModelAnswers(np.where(right, truth, (truth + 1) % 4), certainty)
    return Population(Records("made-up", models, truth, np.arange(num_rows)), {"small": 1.0, "large": 10.0})


@pytest.mark.parametrize(
    ("claims", "losses", "violated"),
    [
        ({"a": 0.01}, {"a": 0.01}, False),
        ({"a": 0.01}, {"a": 0.01 + 1e-15}, False),
        ({"a": 0.01}, {"a": 0.011}, True),
        ({"a": 0.01, "b": 0.2}, {"a": 0.0, "b": 0.3}, True),
        ({"a": 0.01}, {"a": 0.0, "b": 0.3}, False),
        ({"a": -0.01}, {"a": 0.0}, True),
    ],
)
def test_a_claim_is_exceeded_when_any_of_its_entries_loses_more(
    claims: dict[str, float], losses: dict[str, float], violated: bool
) -> None:
    assert exceeded(claims, losses) is violated


def test_a_claim_is_judged_by_the_lower_bound_of_its_rate() -> None:
    # the 99 % lower bound passes 5 % between these two
    assert judged(123, 2000, 0.05).within_delta
    assert not judged(124, 2000, 0.05).within_delta
    assert judged(0, 2000, 0.05).rate_lower_99 == 0.0
    assert judged(50, 2000, 0.05).rate == 0.025


def test_certificates_come_true_where_plain_selection_does_not() -> None:
    found = measure(family(), split_rows=300, resamples=40, delta=0.05, seed=1)
    assert found.certified.violations <= 4
    assert found.in_sample.violations >= 20
    assert not found.in_sample.within_delta
    assert found.median_max_epsilon > found.median_max_gap


def test_the_seed_decides() -> None:
    runs = [measure(family(), split_rows=100, resamples=3, delta=0.05, seed=seed) for seed in (1, 1, 2)]
    same, again, other = (replaced(run) for run in runs)
    assert same == again != other


def replaced(run: Any) -> dict[str, Any]:
    return {name: getattr(run, name) for name in run.__struct_fields__ if name != "wall_s"}


def test_drawn_rows_are_groups_of_their_own_and_gaps_are_those_of_the_rows() -> None:
    made = family()
    frozen = made.choose(np.array([3, 3, 7] * 50))
    assert frozen.method == "clopper_pearson"
    whole = made.gaps(frozen)
    assert whole == made.gaps(frozen, np.arange(len(made.records)))
    dropped = replace(made, records=made.records.take(np.arange(10)))
    assert dropped.gaps(frozen) == made.gaps(frozen, np.arange(10))


def absent() -> Population:
    raise AbsentError("there is no folder")


def run(tmp_path: Path, *arguments: str) -> tuple[Result, dict[str, Any]]:
    result = tmp_path / "coverage.json"
    done = CliRunner().invoke(
        coverage.main, ["--resamples", "3", "--split-rows", "50", "--result", str(result), *arguments]
    )
    return done, json.loads(result.read_text())


def test_a_family_that_is_absent_leaves_the_summaries_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in populations.FAMILIES:
        monkeypatch.setitem(populations.FAMILIES, name, absent if name == "cifar10" else family)
    done, document = run(tmp_path)
    assert done.exit_code == 0
    assert "cifar10: not run, there is no folder" in done.output
    assert set(document["families"]) == set(populations.FAMILIES) - {"cifar10"}
    assert document["largest_certified_rate_lower_99"] is None
    assert document["smallest_in_sample_rate_lower_99"] is None

    done, document = run(tmp_path, "--family", "digits")
    assert document["largest_certified_rate_lower_99"] == 0.0
    assert document["smallest_in_sample_rate_lower_99"] > 0.0


def test_without_the_shared_data_its_families_are_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(populations, "PREDICTIONS", tmp_path / "nowhere")
    said: list[str] = []
    assert list(populations.present(["llama2-mmlu", "command-speech", "cifar10"], said.append)) == []
    assert len(said) == 3
