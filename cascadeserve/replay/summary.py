"""From the records of a run to its serving report."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cascadeserve.replay.client import Outcome
from cascadeserve.report import GearSpan, Ledger, ServingReport, StageShare

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from cascadeserve.replay.ledger import Records

MAX_LAG_SHARE_OF_SLO = 0.05


def _quantile(values: NDArray[np.float64], share: float) -> float | None:
    return float(np.quantile(values, share)) if len(values) else None


def _gear_spans(records: Records, named: NDArray[np.bool_]) -> list[GearSpan]:
    """Stretches of one gear, by scheduled time: a row keeps its gear, so only arrivals part sharply at a shift."""
    if not named.any():
        return []
    gear = records.gear[named]
    begins = np.flatnonzero(np.diff(gear, prepend=-1))
    start_s = records.scheduled_s[named][begins]
    end_s = np.append(start_s[1:], np.max(records.done_s[named]))
    return [
        GearSpan(start_s=float(start), end_s=float(end), gear=records.gears[which])
        for start, end, which in zip(start_s, end_s, gear[begins], strict=True)
    ]


def _stage_shares(stages: NDArray[np.int32]) -> list[StageShare]:
    known = stages[stages >= 0]
    numbers, rows = np.unique(known, return_counts=True)
    return [
        StageShare(stage=int(stage), rows=int(count), share=float(count / len(stages)))
        for stage, count in zip(numbers, rows, strict=True)
    ]


def _correct_requests(records: Records, right: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Whether all rows of a request are right, [requests]."""
    wrong_so_far = np.concatenate([[0], np.cumsum(~right)])
    offset = records.rows.offset
    correct: NDArray[np.bool_] = wrong_so_far[offset[1:]] == wrong_so_far[offset[:-1]]
    return correct


def summarise(
    records: Records, *, labels: NDArray[np.int64] | None, duration_s: float, slo_s: float | None
) -> ServingReport:
    """Make the report of a run whose load was planned over `duration_s` seconds.

    Only requests whose end is known count as sent, so a run that was stopped early still adds up; its rates refer to
    the time until the last request that was sent. Rates are in rows per second: offered ones over the duration,
    answered ones until the last answer where that is later. A request is correct when all its rows are; without
    `labels` every answer counts as correct and accuracy is None.
    """
    sent = records.outcome != Outcome.UNSENT
    answered = records.outcome == Outcome.ANSWERED
    sizes = np.diff(records.rows.offset)
    answered_rows = np.repeat(answered, sizes)
    complete = bool(sent.all())
    if not complete:
        duration_s = float(np.max(records.scheduled_s[sent], initial=0.0))
    busy_s = max(duration_s, float(np.max(records.done_s[answered], initial=0.0)))
    latency_s = (records.done_s - records.scheduled_s)[answered]
    right = np.ones(len(records.label), dtype=np.bool_)
    if labels is not None:
        right = records.label == labels[records.rows.row_index]
    correct = _correct_requests(records, right) & answered
    rows_sent, rows_answered, num_sent = int(sizes[sent].sum()), int(answered_rows.sum()), int(sent.sum())
    return ServingReport(
        schema_version=1,
        source="replay",
        complete=complete,
        duration_s=duration_s,
        offered_rate_per_s=rows_sent / duration_s if duration_s else 0.0,
        answered_rate_per_s=rows_answered / busy_s if busy_s else 0.0,
        p50_s=_quantile(latency_s, 0.50),
        p95_s=_quantile(latency_s, 0.95),
        p99_s=_quantile(latency_s, 0.99),
        slo_s=slo_s,
        goodput=None if slo_s is None or not num_sent else float((latency_s <= slo_s).sum() / num_sent),
        accuracy=None if labels is None or not rows_answered else float(right[answered_rows].mean()),
        rows_sent=rows_sent,
        stages=_stage_shares(records.stage[answered_rows]),
        gears=_gear_spans(records, answered & (records.gear >= 0)),
        ledger=Ledger(
            sent=num_sent,
            answered_correct=int(correct.sum()),
            answered_wrong=int(answered.sum() - correct.sum()),
            refused=int((records.outcome == Outcome.REFUSED).sum()),
            failed=int((records.outcome == Outcome.FAILED).sum()),
            lost=int((records.outcome == Outcome.LOST).sum()),
            duplicated=records.live.duplicated,
        ),
        uncertified=int((answered & (records.certified == 0)).sum()),
        generator_lag_p99_s=_quantile((records.sent_s - records.scheduled_s)[sent], 0.99) or 0.0,
        generator_cpu_s=records.cpu_s,
        stolen_frac=records.stolen_frac,
        errors=dict(records.errors.most_common()),
    )


def is_void(report: ServingReport) -> bool:
    """Whether the generator was too late for the figures to say anything about the server."""
    return report.slo_s is not None and report.generator_lag_p99_s > MAX_LAG_SHARE_OF_SLO * report.slo_s
