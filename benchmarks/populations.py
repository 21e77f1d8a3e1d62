"""Real predictions as finite populations, in which what a certificate claims can be checked.

Three families are files in ../shared/data/predictions, beside the checkout; the fourth are the answers of
model_repository's digits models to rows of examples/digits, made when asked for (half a minute).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from planner.certificate import FrozenLadder, certify, freeze, gaps
from planner.importing import Column, ImportedModel, ImportFile, gather
from planner.ladder import ladder
from planner.records import CalibrationRecords, HeldOutRecords, ModelAnswers, Records, SearchRecords
from planner.search import reference_model, search

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from numpy.typing import NDArray

    from examples.digits.data import Split

    Rows = NDArray[np.int64]

ROOT = Path(__file__).parents[1]
PREDICTIONS = ROOT.parent / "shared" / "data" / "predictions"
_DIGITS_ROWS = 10_000
_BATCH = 64
# Gaps are differences of rounded means: equal ones may differ in the last digits.
_ROUNDING = 1e-12


class AbsentError(Exception):
    """A family's data, or a package that reads it, is not on this machine."""


@dataclass(frozen=True)
class Population:
    """The rows of a family as a population, and what a row costs by model, relative to each other."""

    records: Records
    cost: Mapping[str, float]

    def choose(self, rows: Rows) -> FrozenLadder:
        """Search on these rows (indices, repeats allowed), take a ladder of what was found, freeze it."""
        chosen = SearchRecords(**vars(self.drawn(rows)))
        reference = reference_model(chosen)
        return freeze(ladder(search(chosen, self.cost), reference=reference), reference, chosen)

    def epsilons(self, frozen: FrozenLadder, rows: Rows, delta: float) -> dict[str, float]:
        """Certified epsilon of every entry from these calibration rows."""
        certificate = certify(frozen, CalibrationRecords(**vars(self.drawn(rows))), delta=delta)
        return {entry.name: entry.epsilon for entry in certificate.entries if entry.epsilon is not None}

    def gaps(self, frozen: FrozenLadder, rows: Rows | None = None) -> dict[str, float]:
        """Accuracy that every entry loses against the reference model on these rows, or on all of the population."""
        records = self.records if rows is None else self.records.take(rows)
        return gaps(frozen, HeldOutRecords(**vars(records)))

    def drawn(self, rows: Rows) -> Records:
        """Rows drawn one by one: each is a group of its own, though it may come twice."""
        return replace(self.records.take(rows), group_id=np.arange(len(rows)))


def exceeded(claims: Mapping[str, float], losses: Mapping[str, float]) -> bool:
    """Whether any entry that something is claimed of loses more than that."""
    return any(losses[name] > claim + _ROUNDING for name, claim in claims.items())


def present(names: Iterable[str], say: Callable[[str], None]) -> Iterator[tuple[str, Population]]:
    """Populations of the families that this machine has; of the others `say` is told why not."""
    for name in names:
        try:
            yield name, FAMILIES[name]()
        except AbsentError as error:
            say(f"{name}: not run, {error}")


def _gathered(wanted: ImportFile, cost: Mapping[str, float]) -> Population:
    folder = PREDICTIONS / wanted.family
    if not folder.is_dir():
        raise AbsentError(f"there is no folder {folder}")
    return Population(gather(wanted, folder), cost)


def _llama() -> Population:
    def scores(name: str) -> ImportedModel:
        return ImportedModel(name=name, scores=Column(file="logits.npz", name=name), scale="logits")

    # billions of parameters
    cost = {"llama2_7b": 7.0, "llama2_13b": 13.0, "llama2_70b": 70.0}
    truth = Column(file="logits.npz", name="label")
    return _gathered(
        ImportFile(
            schema_version=1, family="llama2-mmlu", truth=truth, models=tuple(map(scores, cost)), keep_scores=True
        ),
        cost,
    )


def _speech() -> Population:
    def column(name: str) -> Column:
        return Column(file="samples.csv", name=name)

    def answers(name: str, number: int) -> ImportedModel:
        certainty = column(f"Model{number}_conf")
        return ImportedModel(name=name, label=column(f"Model{number}_pred"), certainty=certainty)

    # price of 10,000 samples
    cost = {"deepspeech": 0.02, "ibm": 25.0, "microsoft": 41.0, "google": 60.0}
    models = tuple(map(answers, cost, (101, 5, 2, 0)))
    return _gathered(ImportFile(schema_version=1, family="command-speech", truth=column("true"), models=models), cost)


def _cifar() -> Population:
    def scores(name: str, file: str) -> ImportedModel:
        truth = Column(file=file, name="ground_truth")
        predictions = Column(file=file, name="predictions")
        return ImportedModel(name=name, scores=predictions, scale="probabilities", truth=truth)

    models = (scores("lenet", "lenet-5-cifar-10.npz"), scores("wideresnet", "wideresnet-16-4-cifar-10.npz"))
    truth = Column(file="lenet-5-cifar-10.npz", name="ground_truth")
    # multiplications per row, roughly
    cost = {"lenet": 1.0, "wideresnet": 1000.0}
    return _gathered(ImportFile(schema_version=1, family="cifar10", truth=truth, models=models, keep_scores=True), cost)


def _digits() -> Population:
    # milliseconds per row, roughly
    cost = {"digits_linear": 0.008, "digits_mlp": 0.009, "digits_cnn": 0.02, "digits_resnet": 1.7}
    return Population(digits_records("replay", _DIGITS_ROWS, tuple(cost), outputs=("label", "certainty")), cost)


def digits_records(split: Split, num_rows: int, names: tuple[str, ...], *, outputs: tuple[str, ...]) -> Records:
    """Answers of the exported models to rows of examples/digits, each row a group of its own.

    `outputs` are label and certainty, and the scores where they are wanted.

    Raises:
        AbsentError: a model or a package is missing.

    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    try:
        import onnxruntime as ort  # noqa: PLC0415 - the other families do without

        from examples.digits.data import rows  # noqa: PLC0415 - needs scikit-learn
    except ImportError as error:
        raise AbsentError(f"{error}; install the extras [local] and [examples]") from error
    drawn = rows(split, num_rows)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    models = {}
    for name in names:
        file = ROOT / "model_repository" / name / "1" / "model.onnx"
        if not file.exists():
            raise AbsentError(f"there is no file {file}")
        session = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        parts = [
            session.run(list(outputs), {"image": drawn.inputs[start : start + _BATCH]})
            for start in range(0, num_rows, _BATCH)
        ]
        label, certainty, *scores = (np.concatenate(column) for column in zip(*parts, strict=True))
        models[name] = ModelAnswers(
            label=label[:, 0], certainty=certainty[:, 0], scores=scores[0].astype(np.float16) if scores else None
        )
    return Records(family="digits", models=models, truth=drawn.labels, group_id=np.arange(num_rows))


FAMILIES: dict[str, Callable[[], Population]] = {
    "llama2-mmlu": _llama,
    "command-speech": _speech,
    "cifar10": _cifar,
    "digits": _digits,
}
