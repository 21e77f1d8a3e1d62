"""Do certificates come true? `python -m benchmarks.coverage` resamples real predictions and counts.

The rows of a family stand for a finite population, in which the gap of every cascade is known. One resample draws
search rows and calibration rows from it, independently and with replacement; a search chooses a ladder on the former,
and claims about its entries are held against the population:

- *certified*: the certificate of the frozen ladder from the calibration rows, all entries at once at 1 - delta;
- *in-sample*: plain selection on all rows of the resample: a ladder is chosen on search and calibration rows together,
  and each entry is said to lose what it lost there;
- *reused*: the certificate of that second ladder from the very rows on which it was chosen. For the reader: it may hold
  by the slack of the bounds, but nothing says that it does.

A claim is violated when any entry loses more in the population than it says. The certificate passes when the one-sided
99 % lower bound of its violation rate is at most delta; the in-sample claim must fail the same test, or the test could
not tell.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import click
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from cascadeserve.artefacts import Artefact, write_json
from cascadeserve.gear_plan import LadderEntry, Stage
from planner.bounds import rate_lower
from planner.certificate import FrozenLadder, certify, freeze, gaps
from planner.importing import Column, ImportedModel, ImportFile, gather
from planner.records import CalibrationRecords, HeldOutRecords, ModelAnswers, Records, SearchRecords

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from numpy.typing import NDArray

    Rows = NDArray[np.int64]

ROOT = Path(__file__).parents[1]
PREDICTIONS = ROOT.parent / "shared" / "data" / "predictions"
RESULT = ROOT / "benchmarks" / "results" / "local" / "coverage.json"
CONFIDENCE = 0.99
# Gaps are differences of rounded means: equal ones may differ in the last digits.
_ROUNDING = 1e-12


class Search(Protocol):
    """What is put to the test: chooses a reference model and a ladder on search rows; cost by model in any unit."""

    def __call__(self, records: SearchRecords, cost: Mapping[str, float]) -> tuple[str, Sequence[LadderEntry]]:
        """Choose."""


class ClaimResult(Artefact, frozen=True, kw_only=True):
    """How often a claim was violated; `rate_lower_99` is the one-sided 99 % lower bound of the violation rate."""

    violations: int
    rate: float
    rate_lower_99: float
    within_delta: bool


class FamilyResult(Artefact, frozen=True, kw_only=True):
    """One family: rows of its population and of each split, and the claims; medians over resamples."""

    population_rows: int
    split_rows: int
    models: tuple[str, ...]
    resamples: int
    mean_ladder_entries: float
    median_max_epsilon: float
    median_max_gap: float
    certified: ClaimResult
    in_sample: ClaimResult
    reused: ClaimResult
    wall_s: float


class CoverageResult(Artefact, frozen=True, kw_only=True):
    """The whole run."""

    date: str
    search: str
    delta: float
    seed: int
    families: dict[str, FamilyResult]
    all_certified_within_delta: bool
    all_in_sample_beyond_delta: bool


@dataclass(frozen=True)
class Population:
    """The rows of a family as a population, and what a row costs by model, relative to each other."""

    records: Records
    cost: Mapping[str, float]


def grid_search(records: SearchRecords, cost: Mapping[str, float]) -> tuple[str, Sequence[LadderEntry]]:
    """Choose the cheapest cascade for each of a few losses against the best single model, all measured on `records`.

    Candidates: every single model, and every pair of models, the cheaper one first, with every distinct threshold.
    """
    right = {name: answers.label == records.truth for name, answers in records.models.items()}
    count = {name: int(ok.sum()) for name, ok in right.items()}
    reference = max(count, key=count.__getitem__)
    rows = len(records)
    found: list[tuple[float, float, tuple[Stage, ...]]] = [
        (count[name] / rows, cost[name], (Stage(model=name),)) for name in right
    ]
    found_accuracy = [np.array([accuracy for accuracy, _, _ in found])]
    found_cost = [np.array([work for _, work, _ in found])]
    pairs: list[tuple[str, str, NDArray[np.float32]]] = []
    for small, large in combinations(sorted(right, key=cost.__getitem__), 2):
        order = np.argsort(records.models[small].certainty)
        certainty = records.models[small].certainty[order]
        # Cutting before position k sends rows 0..k-1 on; only between distinct values.
        cuts = np.flatnonzero(certainty[1:] > certainty[:-1]) + 1
        gained = np.cumsum(right[large][order].astype(np.int64) - right[small][order])
        found_accuracy.append((count[small] + gained[cuts - 1]) / rows)
        found_cost.append(cost[small] + cost[large] * cuts / rows)
        middle = 0.5 * (certainty[cuts - 1].astype(np.float64) + certainty[cuts])
        pairs.append((small, large, middle.astype(np.float32)))
    accuracy, work = np.concatenate(found_accuracy), np.concatenate(found_cost)
    starts = np.cumsum([len(found), *(len(pair[2]) for pair in pairs)])
    chosen = {int(np.argmin(work + np.where(accuracy >= accuracy.max(), 0.0, np.inf)))}
    for loss in (0.0, 0.005, 0.01, 0.02, 0.05, 0.1):
        chosen.add(int(np.argmin(work + np.where(accuracy >= count[reference] / rows - loss, 0.0, np.inf))))
    ladder = []
    for index in sorted(chosen, key=lambda i: -work[i]):
        if index < len(found):
            stages = found[index][2]
        else:
            pair = int(np.searchsorted(starts, index, side="right")) - 1
            small, large, thresholds = pairs[pair]
            threshold = float(thresholds[index - starts[pair]])
            stages = (Stage(model=small, threshold=threshold), Stage(model=large))
        ladder.append(LadderEntry(name=f"entry-{index}", stages=stages, reach=(1.0,) * len(stages)))
    return reference, ladder


def planner_search(records: SearchRecords, cost: Mapping[str, float]) -> tuple[str, Sequence[LadderEntry]]:
    """Choose as `cascadeserve plan` does."""
    from planner.ladder import ladder  # noqa: PLC0415 - the other search needs none of it
    from planner.search import reference_model, search  # noqa: PLC0415

    reference = reference_model(records)
    return reference, ladder(search(records, cost), reference=reference)


SEARCHES: dict[str, Search] = {"grid": grid_search, "planner": planner_search}


def measure(
    population: Population, search: Search, *, split_rows: int, resamples: int, delta: float, seed: int
) -> FamilyResult:
    """Resample one family `resamples` times, with `split_rows` rows in each of the two splits."""
    started_s = time.perf_counter()
    records, rng = population.records, np.random.default_rng(seed)
    violations = {"certified": 0, "in_sample": 0, "reused": 0}
    entries, epsilons, largest_gaps = [], [], []
    for _ in track(range(resamples), description=records.family, console=Console(stderr=True), transient=True):
        chosen_rows, fresh_rows = rng.integers(len(records), size=(2, split_rows))
        frozen, epsilon = _claimed(population, search, chosen_rows, fresh_rows, delta)
        truth = _population_gaps(frozen, records)
        violations["certified"] += _violated(epsilon, truth)
        entries.append(len(frozen.ladder))
        epsilons.append(max(epsilon.values()))
        largest_gaps.append(max(truth.values()))

        all_rows = np.concatenate([chosen_rows, fresh_rows])
        frozen, epsilon = _claimed(population, search, all_rows, all_rows, delta)
        truth = _population_gaps(frozen, records)
        violations["reused"] += _violated(epsilon, truth)
        violations["in_sample"] += _violated(_population_gaps(frozen, records.take(all_rows)), truth)
    claims = {name: _claim(count, resamples, delta) for name, count in violations.items()}
    return FamilyResult(
        population_rows=len(records),
        split_rows=split_rows,
        models=tuple(records.models),
        resamples=resamples,
        mean_ladder_entries=float(np.mean(entries)),
        median_max_epsilon=float(np.median(epsilons)),
        median_max_gap=float(np.median(largest_gaps)),
        certified=claims["certified"],
        in_sample=claims["in_sample"],
        reused=claims["reused"],
        wall_s=time.perf_counter() - started_s,
    )


def _claimed(
    population: Population, search: Search, search_rows: Rows, calibration_rows: Rows, delta: float
) -> tuple[FrozenLadder, dict[str, float]]:
    """Ladder from some rows of the population and epsilon per entry from others."""
    records = population.records
    chosen = SearchRecords(**vars(_drawn(records, search_rows)))
    reference, ladder = search(chosen, population.cost)
    frozen = freeze(ladder, reference, chosen)
    certificate = certify(frozen, CalibrationRecords(**vars(_drawn(records, calibration_rows))), delta=delta)
    return frozen, {found.name: found.epsilon for found in certificate.entries if found.epsilon is not None}


def _drawn(records: Records, rows: Rows) -> Records:
    """Rows drawn one by one: each is a group of its own, though it may come twice."""
    return replace(records.take(rows), group_id=np.arange(len(rows)))


def _population_gaps(frozen: FrozenLadder, records: Records) -> dict[str, float]:
    return gaps(frozen, HeldOutRecords(**vars(records)))


def _violated(claim: Mapping[str, float], truth: Mapping[str, float]) -> bool:
    return any(truth[name] > said + _ROUNDING for name, said in claim.items())


def _claim(violations: int, resamples: int, delta: float) -> ClaimResult:
    lower = rate_lower(violations, resamples, 1.0 - CONFIDENCE)
    return ClaimResult(
        violations=violations, rate=violations / resamples, rate_lower_99=lower, within_delta=lower <= delta
    )


def _llama() -> Population:
    def scores(name: str) -> ImportedModel:
        return ImportedModel(name=name, scores=Column(file="logits.npz", name=name), scale="logits")

    # billions of parameters
    cost = {"llama2_7b": 7.0, "llama2_13b": 13.0, "llama2_70b": 70.0}
    truth = Column(file="logits.npz", name="label")
    wanted = ImportFile(schema_version=1, family="llama2-mmlu", truth=truth, models=tuple(map(scores, cost)))
    return Population(gather(wanted, PREDICTIONS / "llama2-mmlu"), cost)


def _speech() -> Population:
    def column(name: str) -> Column:
        return Column(file="samples.csv", name=name)

    def answers(name: str, number: int) -> ImportedModel:
        certainty = column(f"Model{number}_conf")
        return ImportedModel(name=name, label=column(f"Model{number}_pred"), certainty=certainty)

    # price of 10,000 samples
    cost = {"deepspeech": 0.02, "ibm": 25.0, "microsoft": 41.0, "google": 60.0}
    models = tuple(map(answers, cost, (101, 5, 2, 0)))
    wanted = ImportFile(schema_version=1, family="command-speech", truth=column("true"), models=models)
    return Population(gather(wanted, PREDICTIONS / "command-speech"), cost)


def _cifar() -> Population:
    def scores(name: str, file: str) -> ImportedModel:
        truth = Column(file=file, name="ground_truth")
        predictions = Column(file=file, name="predictions")
        return ImportedModel(name=name, scores=predictions, scale="probabilities", truth=truth)

    models = (scores("lenet", "lenet-5-cifar-10.npz"), scores("wideresnet", "wideresnet-16-4-cifar-10.npz"))
    assert models[0].truth is not None
    wanted = ImportFile(schema_version=1, family="cifar10", truth=models[0].truth, models=models)
    # multiplications per row, roughly
    return Population(gather(wanted, PREDICTIONS / "cifar10"), {"lenet": 1.0, "wideresnet": 1000.0})


def _digits(num_rows: int = 10_000) -> Population:
    """Answers of the exported models to rows of the replay split."""
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    import onnxruntime as ort  # noqa: PLC0415 - the other families do without

    from examples.digits.data import rows  # noqa: PLC0415

    # milliseconds per row, roughly
    cost = {"digits_linear": 0.008, "digits_mlp": 0.009, "digits_cnn": 0.02, "digits_resnet": 1.7}
    drawn = rows("replay", num_rows)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    models = {}
    for name in cost:
        file = ROOT / "model_repository" / name / "1" / "model.onnx"
        session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        parts = [
            session.run(["label", "certainty"], {"image": drawn.inputs[start : start + 64]})
            for start in range(0, num_rows, 64)
        ]
        label, certainty = (np.concatenate(column)[:, 0] for column in zip(*parts, strict=True))
        models[name] = ModelAnswers(label=label, certainty=certainty)
    records = Records(family="digits", models=models, truth=drawn.labels, group_id=np.arange(num_rows))
    return Population(records, cost)


FAMILIES: dict[str, Callable[[], Population]] = {
    "llama2-mmlu": _llama,
    "command-speech": _speech,
    "cifar10": _cifar,
    "digits": _digits,
}


@click.command()
@click.option("--family", "families", multiple=True, type=click.Choice(list(FAMILIES)), help="Default: all of them.")
@click.option("--search", "search_name", type=click.Choice(list(SEARCHES)), default="grid", show_default=True)
@click.option("--resamples", type=click.IntRange(min=1), default=2000, show_default=True)
@click.option("--split-rows", type=click.IntRange(min=10), default=1000, show_default=True)
@click.option("--delta", type=click.FloatRange(0, 1, min_open=True, max_open=True), default=0.05, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--result", type=click.Path(path_type=Path), default=RESULT)
def main(
    families: tuple[str, ...], search_name: str, resamples: int, split_rows: int, delta: float, seed: int, result: Path
) -> None:
    """Count how often certificates are violated, and write it down."""
    found = {}
    for name in families or FAMILIES:
        population = FAMILIES[name]()
        found[name] = measure(
            population, SEARCHES[search_name], split_rows=split_rows, resamples=resamples, delta=delta, seed=seed
        )
    table = Table("family", "violated", "99 % lower bound", "in-sample", "reused", "max epsilon", "max gap", "s")
    for name, family in found.items():
        table.add_row(
            name,
            f"{family.certified.rate:.2%}",
            f"{family.certified.rate_lower_99:.2%}",
            f"{family.in_sample.rate:.1%}",
            f"{family.reused.rate:.1%}",
            f"{family.median_max_epsilon:.2%}",
            f"{family.median_max_gap:.2%}",
            f"{family.wall_s:.0f}",
        )
    Console().print(table)
    document = CoverageResult(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        search=search_name,
        delta=delta,
        seed=seed,
        families=found,
        all_certified_within_delta=all(family.certified.within_delta for family in found.values()),
        all_in_sample_beyond_delta=not any(family.in_sample.within_delta for family in found.values()),
    )
    write_json(result, document)


if __name__ == "__main__":
    main()
