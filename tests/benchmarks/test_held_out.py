from __future__ import annotations

import json
from typing import TYPE_CHECKING

import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import held_out, populations
from benchmarks.held_out import lower_bounds, measure, thirds
from benchmarks.populations import AbsentError, Population
from cascadeserve.gear_plan import LadderEntry, Stage
from planner.bounds import rate_lower, rate_upper
from planner.certificate import freeze
from planner.records import ModelAnswers, Records, SearchRecords

if TYPE_CHECKING:
    from pathlib import Path


def family(right: dict[str, list[bool]]) -> Population:
    """Models from cheap to dear and the rows that they answer right; certainties tell nothing."""
    num_rows = len(next(iter(right.values())))
    truth = np.zeros(num_rows, np.int64)
    certainty = np.linspace(0, 1, num_rows, dtype=np.float32)
    models = {name: ModelAnswers(np.where(rows, 0, 1).astype(np.int64), certainty) for name, rows in right.items()}
    cost = {name: 10.0**place for place, name in enumerate(right)}
    return Population(Records("made-up", models, truth, np.arange(num_rows)), cost)


def random_family(num_rows: int = 1500) -> Population:
    rng = np.random.default_rng(3)
    return family({"small": list(rng.random(num_rows) < 0.7), "large": list(rng.random(num_rows) < 0.9)})


@pytest.mark.parametrize(("num_rows", "third"), [(9, 3), (10, 3), (11, 3), (12, 4)])
def test_thirds_are_of_one_size_and_share_no_row(num_rows: int, third: int) -> None:
    parts = thirds(num_rows, np.random.default_rng(0))
    assert [len(part) for part in parts] == [third] * 3
    rows = np.concatenate(parts)
    assert len(set(rows.tolist())) == 3 * third
    assert 0 <= rows.min() <= rows.max() < num_rows


def test_lower_bounds_are_exact_and_the_reference_loses_nothing() -> None:
    # 100 rows: 20 harmed (only large right), 5 repaired (only small right), 70 right in both
    made = family({"small": [False] * 20 + [True] * 75 + [False] * 5, "large": [True] * 90 + [False] * 10})
    entries = [LadderEntry(name=name, stages=(Stage(model=name),), reach=(1.0,)) for name in ("large", "small")]
    frozen = freeze(entries, "large", SearchRecords(**vars(made.records)))
    harm, gap = lower_bounds(made, frozen, np.arange(100))
    assert harm == {"large": 0.0, "small": rate_lower(20, 100, 0.05)}
    assert gap["small"] == pytest.approx(rate_lower(20, 100, 0.025) - rate_upper(5, 100, 0.025))
    assert gap["large"] < 0.0
    assert gap["small"] < harm["small"]


def test_certificates_hold_on_test_rows_where_plain_selection_is_caught_more_often() -> None:
    found = measure(random_family(), splits=30, delta=0.05, seed=1)
    assert found.third_rows == 500
    assert max(found.harm.violations, found.gap.violations) <= 2
    assert found.in_sample.violations >= found.gap.violations


@pytest.mark.parametrize("here", [True, False])
def test_a_family_that_is_absent_leaves_the_summary_out(
    here: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent() -> Population:
        raise AbsentError("there is no folder")

    for name in populations.FAMILIES:
        monkeypatch.setitem(populations.FAMILIES, name, random_family if here or name != "digits" else absent)
    result = tmp_path / "held_out.json"
    done = CliRunner().invoke(held_out.main, ["--splits", "2", "--result", str(result)])
    assert done.exit_code == 0
    document = json.loads(result.read_text())
    assert ("digits: not run, there is no folder" in done.output) is not here
    assert (document["worst_share"] is None) is not here
    assert len(document["families"]) == (4 if here else 3)
