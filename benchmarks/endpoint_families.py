"""Families and loads of `benchmarks.endpoints_saved`: records, a profile, and ensembles as if they were models.

Digits is recorded through its own models (a minute, kept in benchmarks/results/local) and was profiled through Triton:
benchmarks/profiles/digits.json is what `cascadeserve demo --tier full` measured. Of the other families there are only
predictions; their busy times are stated in benchmarks/profiles/stated.toml, each with its reason.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated

import msgspec
import numpy as np
from msgspec import Meta

from benchmarks.populations import FAMILIES, ROOT, AbsentError, digits_records
from cascadeserve.artefacts import Artefact, read_toml
from cascadeserve.gear_plan import Count
from cascadeserve.replay.trace import Counts, read_trace
from planner.ensembles import mean_of_scores
from planner.profile import BusyEntry, Duration, ModelProfile, Profile, read_profile
from planner.records import ModelAnswers, SearchRecords
from planner.records_files import read_search, write_records
from planner.trace_facts import trace_facts

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from planner.goal import RatePrior

PROFILES = ROOT / "benchmarks" / "profiles"
TRACES = ROOT.parent / "shared" / "data" / "traces"
NAMES = ("digits", "llama2-mmlu", "command-speech", "cifar10")
LOADS = ("azure", "world-cup")

_DIGITS_ROWS = 12_000
_RECORDED = ROOT / "benchmarks" / "results" / "local" / "digits-search.npz"
_AZURE = TRACES / "azure-llm-2023" / "AzureLLMInferenceTrace_code.csv"
_WORLD_CUP = TRACES / "worldcup-1998" / "invocation_count.csv"
# the days with surges of four and eight times the mean
_WORLD_CUP_DAYS = (("1998-06-30 00:00:00", "1998-07-01 00:00:00"), ("1998-07-07 00:00:00", "1998-07-08 00:00:00"))


class StatedModel(Artefact, frozen=True, kw_only=True):
    """A batch of n rows keeps the device busy for fixed_s + n x row_s, for the reason given."""

    fixed_s: Duration
    row_s: Duration
    reason: Annotated[str, Meta(min_length=1)]


class StatedFamily(Artefact, frozen=True, kw_only=True):
    """Models from cheap to dear; batches are of up to `largest_batch` rows, times are divided for the simulator."""

    largest_batch: Count
    divided_by: Annotated[float, Meta(gt=0.0)] = 1.0
    models: dict[str, StatedModel]


class Stated(Artefact, frozen=True, kw_only=True):
    """The file of stated busy times."""

    families: dict[str, StatedFamily]


@dataclass(frozen=True, eq=False)
class Family:
    """Models by rising work: recorded answers and a profile of both the models and the `ensembles` of them.

    An ensemble is named by its models and stands for a device that runs all of them on every batch.
    """

    models: SearchRecords
    with_ensembles: SearchRecords
    profile: Profile
    ensembles: tuple[str, ...]

    @property
    def largest(self) -> str:
        """The model that costs most per row."""
        return max(self.models.models, key=lambda name: self.profile.models[name].busy[0].busy_s)


@dataclass(frozen=True)
class TraceLoad:
    """Index of dispersion to plan for, and how often each rate occurs: (rate per second, share of time), rising.

    The rates are scaled to each cell.
    """

    name: str
    dispersion: float
    prior: RatePrior

    @property
    def peak_per_s(self) -> float:
        """Highest rate."""
        return self.prior[-1][0]

    @property
    def mean_per_s(self) -> float:
        """Mean rate over time."""
        return sum(rate * share for rate, share in self.prior)


def load_family(name: str) -> Family:
    """Read, or record, a family.

    Raises:
        AbsentError: its data is not on this machine.

    """
    if name == "digits":
        # what the orchestrator itself takes is left out: the question is how many devices
        profile = msgspec.structs.replace(read_profile(PROFILES / "digits.json"), front=None)
        return make_family(_digits(tuple(profile.models)), profile)
    stated = read_toml(PROFILES / "stated.toml", Stated).families[name]
    return make_family(SearchRecords(**vars(FAMILIES[name]().records)), stated_profile(stated))


def _digits(names: tuple[str, ...]) -> SearchRecords:
    if not _RECORDED.exists():
        made = digits_records("search", _DIGITS_ROWS, names, outputs=("label", "certainty", "scores"))
        write_records(_RECORDED, SearchRecords(**vars(made)))
    return read_search(_RECORDED)


def stated_profile(stated: StatedFamily) -> Profile:
    """Profile of one slot with these busy times, at powers of two and the largest batch."""
    sizes = sorted({2**power for power in range(stated.largest_batch.bit_length())} | {stated.largest_batch})
    models = {
        name: ModelProfile(
            busy=tuple(
                BusyEntry(batch=size, concurrency=1, busy_s=(model.fixed_s + size * model.row_s) / stated.divided_by)
                for size in sizes
            )
        )
        for name, model in stated.models.items()
    }
    return Profile(schema_version=1, device_kind="stated", models=models)


def make_family(models: SearchRecords, profile: Profile) -> Family:
    """Add the ensembles worth having, if scores were recorded."""
    if any(answers.scores is None for answers in models.models.values()):
        return Family(models, models, profile, ())
    row_s = {name: _row_s(model) for name, model in profile.models.items()}
    figures = mean_of_scores(models, row_s)
    answers, profiles = dict(models.models), dict(profile.models)
    for figure in figures:
        name = ensemble_name(figure.models)
        answers[name] = ModelAnswers(_voted(models, figure.models), np.zeros(len(models), np.float32))
        profiles[name] = _together([profile.models[each] for each in figure.models])
    return Family(
        models,
        replace(models, models=answers),
        msgspec.structs.replace(profile, models=profiles),
        tuple(ensemble_name(figure.models) for figure in figures),
    )


def ensemble_name(models: tuple[str, ...]) -> str:
    """Name that no model has."""
    return "+".join(models)


def _row_s(model: ModelProfile) -> float:
    """Device-seconds per row at best."""
    return min(entry.busy_s / entry.batch for entry in model.busy)


def _voted(records: SearchRecords, names: tuple[str, ...]) -> NDArray[np.int64]:
    """Classes with the largest mean score, int64 [n]."""
    scores = [records.models[name].scores for name in names]
    return np.argmax(np.sum([each.astype(np.float32) for each in scores if each is not None], axis=0), axis=1)


def _together(parts: list[ModelProfile]) -> ModelProfile:
    """Sum the busy times of models that were measured at the same batch sizes."""
    cells: list[Mapping[tuple[int, int], float]] = [
        {(entry.batch, entry.concurrency): entry.busy_s for entry in part.busy} for part in parts
    ]
    busy = [
        BusyEntry(batch=batch, concurrency=concurrency, busy_s=sum(each[batch, concurrency] for each in cells))
        for batch, concurrency in cells[0]
        if all((batch, concurrency) in each for each in cells)
    ]
    # in one call each, side by side
    return ModelProfile(busy=tuple(busy), overhead_s=max(part.overhead_s for part in parts))


def load_trace(name: str) -> TraceLoad:
    """Read a trace.

    Raises:
        AbsentError: it is not on this machine.

    """
    file = _AZURE if name == "azure" else _WORLD_CUP
    if not file.is_file():
        raise AbsentError(f"there is no file {file}")
    if name == "azure":
        facts = trace_facts(file, column=None, mean_rows=1.0, seed=0)
        return TraceLoad(name, facts.dispersion, facts.prior)
    days = [read_trace(file, start=start, end=end) for start, end in _WORLD_CUP_DAYS]
    rates = np.concatenate([day.counts / day.period_s for day in days if isinstance(day, Counts)])
    values, times = np.unique(rates, return_counts=True)
    prior = tuple(zip(values.tolist(), (times / len(rates)).tolist(), strict=True))
    # counts by the minute say nothing of what is quicker: Poisson arrivals inside a minute
    return TraceLoad(name, 1.0, prior)
