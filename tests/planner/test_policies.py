from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from planner.expected import accuracy_over_rows, top_rate_per_s
from planner.planning import plan_family
from planner.policies import POLICIES, WITH_ONE_ENTRY, policy_ladder
from planner.profile import BusyEntry, ModelProfile
from planner.records import ModelAnswers, SearchRecords
from planner.search import evaluate
from tests.fakes.planned import FormulaPredictor, goal, inputs, profile

if TYPE_CHECKING:
    from cascadeserve.gear_plan import PlannedFamily
    from planner.goal import RatePrior

BASELINES = [policy for policy in POLICIES if policy != "cascade"]
# time per row, and the share of rows that a model is right on
MODELS = {"tiny": (0.0002, 0.80), "small": (0.0006, 0.90), "middle": (0.002, 0.93), "large": (0.008, 0.95)}


@pytest.fixture(autouse=True)
def _formula(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planner.planning.SimulatedGears", FormulaPredictor.of)


def family_inputs(*, seed: int = 0, certain: float = 0.4, **changes: Any) -> Any:
    """Four models of which a dearer one is right wherever a cheaper one is; `certain` says how well these know."""
    rng = np.random.default_rng(seed)
    rows = 3000
    fate, truth = rng.random(rows), rng.integers(0, 10, rows)
    models = {}
    for name, (_, share) in MODELS.items():
        right = fate < share
        certainty = np.clip(certain * right + rng.random(rows) * (1.0 - certain), 0, 1).astype(np.float32)
        models[name] = ModelAnswers(label=np.where(right, truth, 10), certainty=certainty)
    busy = {
        name: ModelProfile(
            busy=tuple(BusyEntry(batch=n, concurrency=1, busy_s=0.001 + n * row_s) for n in (1, 2, 4, 8, 16, 32))
        )
        for name, (row_s, _) in MODELS.items()
    }
    given = {
        "goal": goal(max_epsilon=0.2, min_accuracy=None),
        "search": SearchRecords(family="tiny4", models=models, truth=truth, group_id=np.arange(rows)),
        "family": "tiny4",
        "profiles": {"cpu": profile(models=busy)},
        "largest_batch": dict.fromkeys(MODELS, 32),
    }
    return inputs(**(given | changes))


def plan(given: Any) -> PlannedFamily:
    return plan_family(given, None).families["tiny4"]


def models_of(family: PlannedFamily, gear: str) -> list[str]:
    entry = family.entry(next(g.ladder_entry for g in family.gears if g.name == gear))
    return [stage.model for stage in entry.stages]


def served(family: PlannedFamily) -> list[list[str]]:
    return [models_of(family, gear.name) for gear in family.gears]


def test_switching_has_gears_of_single_models_only() -> None:
    family = plan(family_inputs(policy="switching"))
    assert len({tuple(models) for models in served(family)}) > 1
    assert all(len(models) == 1 for models in served(family))


def test_a_static_cascade_serves_all_rates() -> None:
    family = plan(family_inputs(policy="static-cascade"))
    assert len({gear.ladder_entry for gear in family.gears}) == 1


def test_single_is_the_best_model_that_keeps_the_goal_and_reference_the_most_accurate_one() -> None:
    fast = plan(family_inputs(policy="single", goal=goal(max_epsilon=0.2)))
    assert set(map(tuple, served(fast))) == {("tiny",)}
    careful = plan(family_inputs(policy="single", goal=goal(max_epsilon=0.2, below_reference=0.03)))
    assert set(map(tuple, served(careful))) == {("middle",)}
    # no faster than it has to be
    slow = plan(family_inputs(policy="single", goal=goal(max_epsilon=0.2, max_rate_per_s=50.0)))
    assert set(map(tuple, served(slow))) == {("large",)}
    reference = plan(family_inputs(policy="reference"))
    assert set(map(tuple, served(reference))) == {("large",)}
    assert list(reference.models) == ["large"]


@pytest.mark.parametrize("policy", ["static-cascade", "single"])
def test_a_rate_that_is_asked_for_gets_the_most_accurate_entry_that_reaches_it(policy: Any) -> None:
    asked = goal(max_epsilon=0.2, max_rate_per_s=200.0)
    family = plan(family_inputs(policy=policy, goal=asked))
    for gear in family.gears:
        assert gear.min_rate_per_s <= 200.0
    ladder_of = {"static-cascade": "cascade", "single": "switching"}[policy]
    several = plan(family_inputs(policy=ladder_of, goal=asked))
    top = next(gear for gear in several.gears if gear.max_rate_per_s == 200.0)
    assert family.entry(family.gears[0].ladder_entry).accuracy == several.entry(top.ladder_entry).accuracy


PRIORS: list[RatePrior | None] = [None, ((20.0, 0.5), (150.0, 0.5)), ((100.0, 0.2), (250.0, 0.8)), ((290.0, 1.0),)]


@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("certain", [0.0, 0.1, 0.4])
@pytest.mark.parametrize("seed", [0, 1])
def test_a_cascade_plan_is_never_worse_than_a_baseline_by_its_own_prediction(
    seed: int, certain: float, prior: RatePrior | None
) -> None:
    def made(policy: Any, **changes: Any) -> PlannedFamily:
        asked = goal(max_epsilon=0.2, **changes)
        return plan(family_inputs(policy=policy, seed=seed, certain=certain, goal=asked, prior=prior))

    def accuracy(family: PlannedFamily) -> float:
        return accuracy_over_rows(family.gears, family.ladder, prior)

    # up to a rate that all are asked for
    cascade = made("cascade", max_rate_per_s=300.0)
    for policy in BASELINES[:-1]:
        other = made(policy, max_rate_per_s=300.0)
        assert top_rate_per_s(cascade.gears) == top_rate_per_s(other.gears) == 300.0
        assert accuracy(cascade) >= accuracy(other)
    # as far as each goes: further, or as far and as accurate
    cascade = made("cascade")
    for policy in BASELINES:
        other = made(policy)
        assert (top_rate_per_s(cascade.gears), accuracy(cascade)) >= (top_rate_per_s(other.gears), accuracy(other))


def test_a_predictor_that_finds_fault_with_cascades_leaves_the_plan_to_single_models(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = FormulaPredictor.gear

    def slow_cascades(self: FormulaPredictor, gear: Any, rate_per_s: float, effort: Any) -> Any:
        found = real(self, gear, rate_per_s, effort)
        many = len(self.entries[gear.ladder_entry].stages) > 1
        return replace(found, keeps=found.keeps and not many)

    monkeypatch.setattr(FormulaPredictor, "gear", slow_cascades)
    family = plan(family_inputs())
    switching = plan(family_inputs(policy="switching"))
    assert served(family) == served(switching)


def test_the_ladder_of_cascades_holds_all_that_switching_has() -> None:
    given = family_inputs()
    work_s = {name: row_s + 0.0001 for name, (row_s, _) in MODELS.items()}
    ladders = {
        policy: {entry.stages for entry in policy_ladder(
            policy, given.search, work_s, reference="large", size=12, floor=0.5
        )}
        for policy in POLICIES
    }  # fmt: skip
    assert ladders["switching"] == ladders["single"] <= ladders["cascade"] == ladders["static-cascade"]
    assert len(ladders["cascade"]) <= 12
    assert ladders["reference"] <= ladders["single"]
    best = max(evaluate(given.search, stages, work_s).accuracy for stages in ladders["cascade"])
    assert best >= 0.95 - 0.02


def test_every_policy_has_one_with_a_single_entry() -> None:
    assert set(WITH_ONE_ENTRY) == set(POLICIES)
    assert {WITH_ONE_ENTRY[one] for one in WITH_ONE_ENTRY.values()} == set(WITH_ONE_ENTRY.values())
