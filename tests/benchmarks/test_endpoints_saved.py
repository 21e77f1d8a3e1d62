from __future__ import annotations

import json
from typing import TYPE_CHECKING

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from benchmarks import endpoints_picture, endpoints_saved
from benchmarks.endpoint_families import PROFILES as PROFILE_FILES
from benchmarks.endpoint_families import (
    Family,
    Stated,
    StatedFamily,
    StatedModel,
    TraceLoad,
    load_family,
    make_family,
    stated_profile,
)
from benchmarks.endpoint_trials import ENDPOINTS, Trials
from benchmarks.endpoints_by_planner import CheckResult, planned_endpoints
from benchmarks.endpoints_saved import (
    HEADROOM,
    SLO_MULTIPLES,
    Candidates,
    Cell,
    Count,
    Result,
    floors,
    measure,
    median_saving,
    never_more_violations,
    slo,
)
from benchmarks.populations import ROOT, AbsentError
from cascadeserve.artefacts import read_json, read_toml
from planner.profile import read_profile
from planner.records import ModelAnswers, SearchRecords

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

POISSON = TraceLoad("world-cup", 1.0, ((2.0, 0.9), (10.0, 0.1)))
ROWS = 3000


def family(*, small_s: float = 0.0001, large_s: float = 0.02) -> Family:
    """A small model that is right on three quarters of the rows, and knows which; a large one that is right on 95 %."""
    rng = np.random.default_rng(0)
    truth = rng.integers(0, 4, ROWS)

    def answers(right: NDArray[np.bool_], sure: NDArray[np.float64]) -> ModelAnswers:
        label = np.where(right, truth, (truth + 1) % 4)
        scores = np.full((ROWS, 4), 0.1)
        scores[np.arange(ROWS), label] = 0.7
        return ModelAnswers(label, sure.astype(np.float32), scores.astype(np.float16))

    easy = rng.random(ROWS)
    models = {
        "small": answers(easy < 0.75, np.where(easy < 0.75, 0.5 + rng.random(ROWS) / 2, rng.random(ROWS) / 2)),
        "large": answers(rng.random(ROWS) < 0.95, rng.random(ROWS)),
    }
    stated = StatedFamily(
        largest_batch=8,
        models={
            "small": StatedModel(fixed_s=0.0005, row_s=small_s, reason="made up"),
            "large": StatedModel(fixed_s=0.0005, row_s=large_s, reason="made up"),
        },
    )
    return make_family(SearchRecords("made-up", models, truth, np.arange(ROWS)), stated_profile(stated))


def without_scores(answers: ModelAnswers) -> ModelAnswers:
    return ModelAnswers(answers.label, answers.certainty)


def count(endpoints: int, entry: str) -> Count:
    return Count(endpoints=endpoints, entry=entry, to_last=1.0)


def cell(**changes: object) -> Cell:
    made = Cell(
        family="digits", trace="azure", slo_multiple=8.0, slo_s=1.0, accuracy="1 points below", floor=0.9,
        only_reference=True, feasible=True, saving=4.0,
        counts={"cascade": count(8, "a"), "single": count(32, "b")},
    )  # fmt: skip
    return msgspec.structs.replace(made, **changes)


def test_an_ensemble_costs_what_its_models_cost_and_answers_by_mean_score() -> None:
    made = family()
    assert made.ensembles == ("small+large",)
    assert made.largest == "large"
    at_8 = made.profile.models["small+large"].entries(1)[-1]
    assert at_8.busy_s == pytest.approx(0.001 + 8 * 0.0201)
    assert set(made.models.models) == {"small", "large"}
    # two that are equally sure: the class that comes first
    label = made.with_ensembles.models["small+large"].label
    both = np.stack([made.models.models[name].label for name in ("small", "large")])
    np.testing.assert_array_equal(label, both.min(axis=0))


def test_without_scores_there_are_no_ensembles() -> None:
    made = family()
    bare = {name: without_scores(answers) for name, answers in made.models.models.items()}
    records = SearchRecords("made-up", bare, made.models.truth, made.models.group_id)
    assert make_family(records, made.profile).ensembles == ()


def test_floors_lie_between_the_worst_and_the_best_single_model() -> None:
    found = floors([0.5, 0.9, 0.7])
    assert found["20% of the span"] == pytest.approx(0.58)
    assert found["95% of the span"] == pytest.approx(0.88)
    assert found["0.25 points below"] == pytest.approx(0.8975)
    assert len(found) == 9


def test_a_cascade_saves_endpoints_where_it_keeps_rows_from_the_large_model() -> None:
    made = family()
    candidates = Candidates(made, slo(made, 8.0))
    (found,) = measure(made, POISSON, candidates, multiple=8.0, labels=["1 points below"], checkpoint=None)
    assert found.feasible
    assert found.only_reference
    assert found.slo_s == pytest.approx(8 * 0.0205)
    assert found.counts["single"].endpoints == found.counts["reference"].endpoints == ENDPOINTS
    # the large model does all but a share of the work: between a quarter and twice that is what is left
    assert ENDPOINTS / 8 < found.counts["cascade"].endpoints < ENDPOINTS / 2
    assert found.several == found.counts["cascade"]
    assert found.saving == ENDPOINTS / found.counts["cascade"].endpoints
    assert never_more_violations([found]) == 0


def test_where_the_models_cost_alike_the_cascade_plan_is_the_single_model() -> None:
    made = family(small_s=0.02)
    candidates = Candidates(made, slo(made, 8.0))
    (found,) = measure(made, POISSON, candidates, multiple=8.0, labels=["1 points below"], checkpoint=None)
    assert found.saving == 1.0
    # which by itself a cascade could not do
    assert found.several is None or found.several.endpoints > ENDPOINTS


def test_the_count_is_the_fewest_that_the_simulator_grants() -> None:
    made = family()
    candidates = Candidates(made, slo(made, 8.0))
    trials = Trials(made, candidates.all(), slo_s=slo(made, 8.0), dispersion=1.0, checkpoint=None)
    (large,) = candidates.of("reference", "1 points below")
    rate_per_s = trials.sustained_per_s(large, 5)
    assert 0.5 < rate_per_s / (5 * trials.most_per_s(large)) <= 1.0
    assert trials.fewest([large], rate_per_s) is not None
    assert [trials.fewest([large], share * rate_per_s).endpoints for share in (0.1, 0.5, 1.0)] == [1, 3, 5]  # type: ignore[union-attr]
    beyond = trials.fewest([large], 1000 * rate_per_s)
    assert beyond is not None
    assert beyond.at_least
    assert beyond.endpoints > 1000


def test_the_planner_counts_the_same_by_itself() -> None:
    made = family()
    slo_s = slo(made, 8.0)
    candidates = Candidates(made, slo_s)
    trials = Trials(made, candidates.all(), slo_s=slo_s, dispersion=1.0, checkpoint=None)
    label = "1 points below"
    rate_per_s = trials.sustained_per_s(candidates.of("reference", label)[0], 5)
    counted = {policy: trials.fewest(candidates.of(policy, label), rate_per_s) for policy in ("cascade", "single")}
    planned = {}
    for policy in ("cascade", "single"):
        found = planned_endpoints(
            made, policy=policy, slo_s=slo_s, floor=candidates.floors[label], load=POISSON,
            peak_per_s=HEADROOM * rate_per_s, headroom=HEADROOM, checkpoint=None,
        )  # fmt: skip
        assert found is not None
        planned[policy] = found[0]
    assert counted["single"] is not None
    assert counted["cascade"] is not None
    assert planned["cascade"] == counted["cascade"].endpoints < planned["single"]
    # which stands at the edge
    assert planned["single"] - counted["single"].endpoints in {0, 1}


def test_a_plan_that_needs_more_than_a_baseline_is_a_violation() -> None:
    more = {"cascade": count(9, "a"), "ensemble": count(8, "b")}
    without = {"single": count(32, "b")}
    cells = [cell(), cell(counts=more), cell(counts=without, saving=None), cell(feasible=False, counts={}, saving=None)]
    assert never_more_violations(cells) == 2


def test_the_bar_counts_cells_that_only_the_reference_meets() -> None:
    cells = [
        cell(saving=1.5),
        cell(saving=3.0),
        cell(saving=8.0),
        cell(saving=1.0, only_reference=False),
        cell(saving=1.0, family="cifar10"),
        cell(saving=None, feasible=False),
    ]
    assert median_saving(cells) == 3.0
    assert median_saving([]) is None


def test_what_is_absent_is_skipped_and_leaves_the_bars_undecided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> TraceLoad:
        if name == "azure":
            raise AbsentError("there is no file")
        return POISSON

    monkeypatch.setattr(endpoints_saved, "load_trace", absent)
    monkeypatch.setattr(endpoints_saved, "load_family", lambda _: family())
    monkeypatch.setattr(endpoints_saved, "_KEPT", tmp_path / "kept")
    result = tmp_path / "result.json"
    done = CliRunner().invoke(endpoints_saved.main, ["--quick", "--family", "digits", "--result", str(result)])
    assert done.exit_code == 0, done.output
    assert "azure: not run, there is no file" in done.output
    document = json.loads(result.read_text())
    assert len(document["cells"]) == 2
    assert document["never_more_violations"] is None
    assert document["median_saving"] is None


def test_the_stated_profiles_are_read_and_rise_from_cheap_to_dear() -> None:
    stated = read_toml(PROFILE_FILES / "stated.toml", Stated)
    for each in stated.families.values():
        row_s = [model.row_s for model in each.models.values()]
        assert row_s == sorted(row_s)
        busy = next(iter(stated_profile(each).models.values())).busy
        assert busy[-1].batch == each.largest_batch
    assert list(read_profile(PROFILE_FILES / "digits.json").models)[-1] == "digits_resnet"


def test_a_family_without_its_data_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.populations.PREDICTIONS", tmp_path)
    with pytest.raises(AbsentError, match="there is no folder"):
        load_family("cifar10")


def test_picture_and_page_are_of_the_committed_result() -> None:
    result = read_json(endpoints_picture.RESULT, Result)
    assert endpoints_picture.PICTURE.read_text() == endpoints_picture.draw(result)
    page = (ROOT / "docs" / "explanation" / "where-a-cascade-helps.md").read_text()
    planned = read_json(endpoints_picture.PLANNED, CheckResult)
    assert "\n".join(endpoints_picture.table(result)) in page
    assert "\n".join(endpoints_picture.checks(planned)) in page
    # by construction, and by the planner itself
    assert result.never_more_violations == 0
    assert {each.slo_multiple for each in result.cells} == set(SLO_MULTIPLES)
