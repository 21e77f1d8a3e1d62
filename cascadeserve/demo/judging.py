"""What one run says: was the rate sustained, who answered, and how right was it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from cascadeserve.artefacts import Artefact
from cascadeserve.replay.summary import MAX_LAG_SHARE_OF_SLO
from cascadeserve.report import Ledger

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray

    from cascadeserve.demo.rate_search import Kind, Verdict
    from cascadeserve.report import ServingReport

# By Little's law a rate at which answers take the SLO has rate x SLO requests in flight; twice that is a queue that
# grows, and so few are none.
_IN_FLIGHT_OF_SLO = 2.0
_FEW_IN_FLIGHT = 8
_BOOTSTRAP_DRAWS = 10_000
_ANSWERED = "answered"


class Probe(Artefact, frozen=True, kw_only=True):
    """One run at one rate and the verdict on it; times in seconds, rates in rows per second.

    last_third_p95_s is of the requests scheduled in the last third of the run, in_flight_at_end counts those without an
    answer when the last one was due. reason is empty where the verdict is "sustained".
    """

    kind: Literal["probe", "confirmation"]
    rate_per_s: float
    duration_s: float
    p50_s: float | None
    p95_s: float | None
    last_third_p95_s: float | None
    in_flight_at_end: int
    generator_lag_p99_s: float
    accuracy: float | None
    ledger: Ledger
    verdict: Literal["sustained", "overloaded", "void"]
    reason: str


def judge(
    report: ServingReport, records: Mapping[str, NDArray[Any]], *, kind: Kind, rate_per_s: float, slo_s: float
) -> Probe:
    """Decide whether a run was sustained: p95 within the SLO, everything answered, no queue that grows."""
    scheduled_s, done_s = records["scheduled_s"], records["done_s"]
    answered = answered_requests(records)
    latency_s = done_s - scheduled_s
    last = answered & (scheduled_s >= report.duration_s * 2 / 3)
    last_third_p95_s = float(np.quantile(latency_s[last], 0.95)) if last.any() else None
    in_flight = int(np.count_nonzero(~(done_s <= report.duration_s)))
    verdict, reason = _verdict(report, last_third_p95_s, in_flight, rate_per_s, slo_s)
    return Probe(
        kind=kind,
        rate_per_s=rate_per_s,
        duration_s=report.duration_s,
        p50_s=report.p50_s,
        p95_s=report.p95_s,
        last_third_p95_s=last_third_p95_s,
        in_flight_at_end=in_flight,
        generator_lag_p99_s=report.generator_lag_p99_s,
        accuracy=report.accuracy,
        ledger=report.ledger,
        verdict=verdict,
        reason=reason,
    )


def _verdict(
    report: ServingReport, last_third_p95_s: float | None, in_flight: int, rate_per_s: float, slo_s: float
) -> tuple[Verdict, str]:
    ledger = report.ledger
    if report.generator_lag_p99_s > MAX_LAG_SHARE_OF_SLO * slo_s:
        return "void", f"the load generator was {report.generator_lag_p99_s * 1e3:.2f} ms late (p99)"
    if unanswered := ledger.refused + ledger.failed + ledger.lost:
        return "overloaded", f"{unanswered} requests were not answered"
    if report.p95_s is None or report.p95_s > slo_s:
        return "overloaded", f"p95 of {_ms(report.p95_s)} exceeds the SLO of {_ms(slo_s)}"
    if last_third_p95_s is None or last_third_p95_s > slo_s:
        return "overloaded", f"the queue grew: p95 of {_ms(last_third_p95_s)} in the last third"
    if in_flight > max(_FEW_IN_FLIGHT, _IN_FLIGHT_OF_SLO * rate_per_s * slo_s):
        return "overloaded", f"the queue grew: {in_flight} requests in flight at the end"
    return "sustained", ""


def _ms(value_s: float | None) -> str:
    return "-" if value_s is None else f"{value_s * 1e3:.1f} ms"


def answered_requests(records: Mapping[str, NDArray[Any]]) -> NDArray[np.bool_]:
    """Whether each request was answered, [requests]."""
    names = [str(name) for name in records["outcome_names"]]
    answered: NDArray[np.bool_] = records["outcome"] == names.index(_ANSWERED)
    return answered


def answered_rows(records: Mapping[str, NDArray[Any]]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Index and answered label of every answered row, two arrays [rows]."""
    mask = np.repeat(answered_requests(records), np.diff(records["row_offset"]))
    return records["row_index"][mask], records["label"][mask]


def known_labels(runs: Iterable[Mapping[str, NDArray[Any]]], num_rows: int) -> NDArray[np.int64]:
    """What one model answered to each row over several runs, int64 [num_rows]; -1 where it was never asked.

    An exported model answers a row alike whatever its batch mates, so any of its answers will do.
    """
    labels = np.full(num_rows, -1, dtype=np.int64)
    for run in runs:
        index, label = answered_rows(run)
        labels[index] = label
    return labels


class Paired(Artefact, frozen=True, kw_only=True):
    """Accuracies on the same answers: those of the cascade to rows that the reference answered too."""

    answers: int
    cascade_accuracy: float
    reference_accuracy: float

    @property
    def drop(self) -> float:
        """How much less accurate the cascade was, as a share of the answers; negative where it was better."""
        return self.reference_accuracy - self.cascade_accuracy


def pair_accuracies(
    runs: Iterable[Mapping[str, NDArray[Any]]], reference: NDArray[np.int64], truth: NDArray[np.int64]
) -> Paired | None:
    """Compare answers in `runs` with the reference's labels by row (-1: unknown); None if no row has both."""
    parts = [answered_rows(run) for run in runs]
    index = np.concatenate([part[0] for part in parts]) if parts else np.empty(0, dtype=np.int64)
    label = np.concatenate([part[1] for part in parts]) if parts else np.empty(0, dtype=np.int64)
    both = reference[index] >= 0
    if not both.any():
        return None
    right = truth[index[both]]
    return Paired(
        answers=int(both.sum()),
        cascade_accuracy=float(np.mean(label[both] == right)),
        reference_accuracy=float(np.mean(reference[index[both]] == right)),
    )


def median_range(values: list[float], *, seed: int = 0) -> tuple[float, float]:
    """Ends of the 95 % bootstrap interval of a median."""
    rng = np.random.default_rng(seed)
    drawn = rng.choice(np.asarray(values, dtype=np.float64), (_BOOTSTRAP_DRAWS, len(values)))
    low, high = np.quantile(np.median(drawn, axis=1), [0.025, 0.975])
    return float(low), float(high)


def add_ledgers(ledgers: Iterable[Ledger]) -> Ledger:
    """Sum of all counts."""
    every = list(ledgers)
    return Ledger(**{name: sum(getattr(one, name) for one in every) for name in Ledger.__struct_fields__})
