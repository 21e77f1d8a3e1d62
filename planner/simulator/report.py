"""From a simulated run to its serving report."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cascadeserve.report import GearSpan, Ledger, ServingReport, StageShare

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from cascadeserve.gear_plan import PlannedFamily
    from planner.simulator.run import Simulation


def summarise(simulation: Simulation, family: PlannedFamily) -> ServingReport:
    """Make the report that `replay` would make of the same load.

    Rates are in rows per second: offered ones over the duration of the load, answered ones until the last answer where
    that is later. A request is correct when all its rows are.
    """
    load = simulation.load
    answered = ~np.isnan(simulation.latency_s)
    latency_s = simulation.latency_s[answered]
    done_s = load.times_s[answered] + latency_s
    answered_rows = simulation.stage >= 0
    first_row = np.concatenate(([0], np.cumsum(load.rows)[:-1]))
    correct = np.logical_and.reduceat(simulation.right, first_row) & answered
    sent, rows_sent, rows_answered = len(answered), len(simulation.stage), int(answered_rows.sum())
    return ServingReport(
        schema_version=1,
        source="simulator",
        duration_s=load.duration_s,
        offered_rate_per_s=rows_sent / load.duration_s,
        answered_rate_per_s=rows_answered / max(load.duration_s, float(np.max(done_s, initial=0.0))),
        p50_s=_quantile(latency_s, 0.50),
        p95_s=_quantile(latency_s, 0.95),
        p99_s=_quantile(latency_s, 0.99),
        slo_s=family.slo_s,
        goodput=float((latency_s <= family.slo_s).sum() / sent),
        accuracy=simulation.accuracy,
        rows_sent=rows_sent,
        stages=_stage_shares(simulation.stage[answered_rows]),
        gears=_gear_spans(simulation, family, answered),
        ledger=Ledger(
            sent=sent,
            answered_correct=int(correct.sum()),
            answered_wrong=int(answered.sum() - correct.sum()),
            refused=sent - int(answered.sum()),
            failed=0,
            lost=0,
            duplicated=0,
        ),
        generator_lag_p99_s=0.0,
        errors={},
        uncertified=_uncertified(simulation, family, answered),
    )


def _quantile(values: NDArray[np.float64], share: float) -> float | None:
    return float(np.quantile(values, share)) if len(values) else None


def _stage_shares(stages: NDArray[np.int8]) -> list[StageShare]:
    numbers, rows = np.unique(stages, return_counts=True)
    return [
        StageShare(stage=int(stage), rows=int(count), share=float(count / len(stages)))
        for stage, count in zip(numbers, rows, strict=True)
    ]


def _gear_spans(simulation: Simulation, family: PlannedFamily, answered: NDArray[np.bool_]) -> list[GearSpan]:
    """Stretches of one gear, by scheduled time of the requests that were answered in it."""
    if not answered.any():
        return []
    gear = simulation.gear[answered]
    times_s = simulation.load.times_s[answered]
    begins = np.flatnonzero(np.diff(gear, prepend=-1))
    start_s = times_s[begins]
    end_s = np.append(start_s[1:], np.max(times_s + simulation.latency_s[answered]))
    return [
        GearSpan(start_s=float(start), end_s=float(end), gear=family.gears[which].name)
        for start, end, which in zip(start_s, end_s, gear[begins], strict=True)
    ]


def _uncertified(simulation: Simulation, family: PlannedFamily, answered: NDArray[np.bool_]) -> int:
    """Answered requests that no bound covers: by their gear, or cut short; 0 where the whole plan has none."""
    if family.certificate is None:
        return 0
    bare = np.array([family.entry(gear.ladder_entry).epsilon is None for gear in family.gears])
    first_row = np.concatenate(([0], np.cumsum(simulation.load.rows)[:-1]))
    cut = np.logical_or.reduceat(simulation.cut, first_row)
    return int((bare[simulation.gear] | cut)[answered].sum())
