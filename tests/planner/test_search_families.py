"""Search on predictions that real models made, read from where the project keeps data that is never committed."""

from __future__ import annotations

import csv
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest

from planner.front import pareto_front
from planner.ladder import ladder
from planner.records import ModelAnswers, SearchRecords
from planner.search import Candidate, evaluate, reference_model, search

if TYPE_CHECKING:
    from numpy.typing import NDArray

PREDICTIONS = Path(__file__).parents[3] / "shared" / "data" / "predictions"
pytestmark = pytest.mark.skipif(not PREDICTIONS.is_dir(), reason="the real predictions lie beside the checkout only")

Family = tuple[SearchRecords, dict[str, float]]


def answers(probability: NDArray[np.float32]) -> ModelAnswers:
    best_two = np.sort(probability, axis=1)[:, -2:]
    margin = (best_two[:, 1] - best_two[:, 0]).astype(np.float32)
    return ModelAnswers(probability.argmax(axis=1).astype(np.int64), margin)


def records(family: str, models: dict[str, ModelAnswers], truth: NDArray[np.int64]) -> SearchRecords:
    return SearchRecords(family, models, truth.reshape(-1).astype(np.int64), np.arange(len(truth)))


def cifar10() -> Family:
    files = {"lenet": "lenet-5-cifar-10.npz", "wideresnet": "wideresnet-16-4-cifar-10.npz"}
    stored = {name: np.load(PREDICTIONS / "cifar10" / file) for name, file in files.items()}
    models = {name: answers(arrays["predictions"]) for name, arrays in stored.items()}
    return records("cifar10", models, stored["lenet"]["ground_truth"]), {"lenet": 1.0, "wideresnet": 30.0}


def llama2() -> Family:
    stored = np.load(PREDICTIONS / "llama2-mmlu" / "logits.npz")
    models = {}
    for size in ("7b", "13b", "70b"):
        raised = np.exp(stored[f"llama2_{size}"] - stored[f"llama2_{size}"].max(axis=1, keepdims=True))
        models[size] = answers(raised / raised.sum(axis=1, keepdims=True))
    return records("llama2", models, stored["label"]), {"7b": 7.0, "13b": 13.0, "70b": 70.0}


def command_speech() -> Family:
    with (PREDICTIONS / "command-speech" / "samples.csv").open(newline="") as file:
        head, *rows = csv.reader(file)
    table = {name: np.array(column, np.float64) for name, column in zip(head, zip(*rows, strict=True), strict=True)}
    price = {"deepspeech": ("101", 0.02), "ibm": ("5", 25.0), "microsoft": ("2", 41.0), "google": ("0", 60.0)}
    models = {
        name: ModelAnswers(table[f"Model{i}_pred"].astype(np.int64), table[f"Model{i}_conf"].astype(np.float32))
        for name, (i, _) in price.items()
    }
    return records("command-speech", models, table["true"].astype(np.int64)), {
        name: dear for name, (_, dear) in price.items()
    }


FAMILIES = {"cifar10": cifar10, "llama2": llama2, "command-speech": command_speech}


@cache
def searched(family: str) -> tuple[Family, list[Candidate]]:
    found = FAMILIES[family]()
    return found, search(*found)


def cheapest_within(family: str, loss: float) -> tuple[Candidate, Candidate]:
    """Cheapest candidate that loses at most `loss` of accuracy against the reference, and the reference."""
    (rows, _), candidates = searched(family)
    (reference,) = [c for c in candidates if len(c.stages) == 1 and c.stages[0].model == reference_model(rows)]
    return min((c for c in candidates if c.accuracy >= reference.accuracy - loss), key=lambda c: c.work_s), reference


@pytest.mark.parametrize("family", FAMILIES)
def test_candidates_hold_when_they_are_evaluated_stage_by_stage(family: str) -> None:
    (rows, work_s), candidates = searched(family)
    assert all(c == evaluate(rows, c.stages, work_s) for c in candidates[:: max(1, len(candidates) // 50)])
    assert len({c.stages for c in candidates}) == len(candidates)
    for candidate in candidates:
        for stage in candidate.stages[:-1]:
            assert np.float32(stage.threshold) == stage.threshold
    thresholds = {(stage.model, stage.threshold) for c in candidates for stage in c.stages[:-1]}
    seen = {name: set(answered.certainty.tolist()) for name, answered in rows.models.items()}
    assert not any(threshold in seen[model] for model, threshold in thresholds)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_ladder_leads_from_the_reference_to_the_cheapest_model(family: str) -> None:
    (rows, work_s), candidates = searched(family)
    entries = ladder(candidates, reference=reference_model(rows))
    assert 8 <= len(entries) <= 12
    steps = [evaluate(rows, entry.stages, work_s) for entry in entries]
    assert all(a.work_s > b.work_s for a, b in pairwise(steps))
    assert (reference_model(rows),) in [tuple(stage.model for stage in entry.stages) for entry in entries]
    assert entries[-1].name == min(work_s, key=work_s.__getitem__)
    assert [entry.reach for entry in entries] == [step.reach for step in steps]


@pytest.mark.parametrize("family", FAMILIES)
def test_dear_models_first_hardly_move_the_front(family: str) -> None:
    (rows, work_s), candidates = searched(family)

    def area(found: list[Candidate]) -> float:
        kept = [found[i] for i in pareto_front([c.accuracy for c in found], [c.work_s for c in found])]
        logs = np.log([2 * max(work_s.values()), *(c.work_s for c in kept)])
        return float(np.dot([c.accuracy for c in kept], -np.diff(logs)))

    rising, any_order = area(candidates), area(search(rows, work_s, any_order=True))
    assert rising * (1 - 1e-6) <= any_order <= rising * (1 + 1e-4)


def test_a_cascade_stays_within_half_a_point_of_wideresnet_without_sending_it_everything() -> None:
    found, reference = cheapest_within("cifar10", 0.005)
    assert reference.stages[0].model == "wideresnet"
    assert len(found.stages) == 2
    assert found.reach[1] < 0.95
    assert found.work_s < reference.work_s


def test_a_speech_cascade_is_as_good_as_the_best_service_at_less_than_two_thirds_of_its_price() -> None:
    found, reference = cheapest_within("command-speech", 0.0)
    assert reference.stages[0].model == "microsoft"  # the dearest service is not the most accurate
    assert found.work_s < 0.65 * reference.work_s


def test_a_llama_cascade_saves_work_at_one_point_of_accuracy() -> None:
    found, reference = cheapest_within("llama2", 0.01)
    assert reference.stages[0].model == "70b"
    assert found.work_s < 0.95 * reference.work_s


def test_stepped_confidences_have_thresholds_only_between_steps() -> None:
    (rows, _), candidates = searched("command-speech")
    steps = np.unique(rows.models["ibm"].certainty)
    assert len(steps) < 110  # in hundredths
    stages = {stage for candidate in candidates for stage in candidate.stages if stage.model == "ibm"}
    thresholds = [stage.threshold for stage in stages if stage.threshold is not None]
    assert all(np.abs(steps - threshold).min() > 0.004 for threshold in thresholds)
