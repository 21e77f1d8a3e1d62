"""A bursty load against the cascade, seen second by second."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from cascadeserve.demo.judging import answered_requests
from cascadeserve.demo.report import Timeline, TimelineBins

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray

    from cascadeserve.gear_plan import PlannedFamily
    from cascadeserve.report import ServingReport

_BIN_S = 1.0
# Fewer answers than this say nothing about a percentile or an accuracy.
_FEWEST = 10


def choose_steps(single_per_s: float, cascade_per_s: float) -> tuple[tuple[float, float], ...]:
    """Steps of (seconds, rows per second) from what one model manages to nearly all that the cascade does, and back."""
    return (
        (5.0, round(0.6 * single_per_s)),
        (5.0, round(0.5 * cascade_per_s)),
        (5.0, round(0.85 * cascade_per_s)),
        (4.0, round(0.3 * cascade_per_s)),
        (5.0, round(0.9 * cascade_per_s)),
        (6.0, round(0.4 * single_per_s)),
    )


def make_timeline(
    steps: tuple[tuple[float, float], ...],
    report: ServingReport,
    records: Mapping[str, NDArray[Any]],
    truth: NDArray[np.int64],
    family: PlannedFamily,
) -> Timeline:
    """Cut the records of a run of single-row requests into stretches of a second."""
    scheduled_s, done_s = records["scheduled_s"], records["done_s"]
    answered = answered_requests(records)
    right = records["label"] == truth[records["row_index"]]
    edges = np.arange(0.0, report.duration_s + _BIN_S / 2, _BIN_S)
    inside = np.digitize(scheduled_s, edges) - 1
    p50_s, p95_s, accuracy = [], [], []
    for each in range(len(edges) - 1):
        mine = answered & (inside == each)
        enough = np.count_nonzero(mine) >= _FEWEST
        latency_s = (done_s - scheduled_s)[mine]
        p50_s.append(float(np.quantile(latency_s, 0.5)) if enough else None)
        p95_s.append(float(np.quantile(latency_s, 0.95)) if enough else None)
        accuracy.append(float(right[mine].mean()) if enough else None)
    bins = TimelineBins(
        bin_s=_BIN_S,
        offered_rate_per_s=tuple((np.histogram(scheduled_s, edges)[0] / _BIN_S).tolist()),
        answered_rate_per_s=tuple((np.histogram(done_s[answered], edges)[0] / _BIN_S).tolist()),
        p50_s=tuple(p50_s),
        p95_s=tuple(p95_s),
        accuracy=tuple(accuracy),
    )
    return Timeline(steps=steps, report=report, bins=bins, rows_by_model=rows_by_model(records, family))


def rows_by_model(records: Mapping[str, NDArray[Any]], family: PlannedFamily) -> dict[str, float]:
    """Share of the answered rows by model; which model a stage is depends on the gear that the request was in."""
    entries = {gear.name: family.entry(gear.ladder_entry) for gear in family.gears}
    gear_of_row = np.repeat(records["gear"], np.diff(records["row_offset"]))
    answered = np.repeat(answered_requests(records), np.diff(records["row_offset"])) & (gear_of_row >= 0)
    shares = dict.fromkeys(family.models, 0.0)
    pairs, counts = np.unique(np.stack([gear_of_row[answered], records["stage"][answered]]), axis=1, return_counts=True)
    for gear, stage, count in zip(*pairs, counts, strict=True):
        entry = entries[str(records["gear_names"][gear])]
        shares[entry.stages[stage].model] += float(count / answered.sum())
    return shares
