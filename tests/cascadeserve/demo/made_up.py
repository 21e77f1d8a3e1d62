"""A report and records that nobody measured."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from cascadeserve.demo.judging import Probe
from cascadeserve.demo.report import (
    Certificate,
    DemoReport,
    LadderLine,
    SloCurve,
    SloGap,
    SloPoint,
    SystemResult,
)
from cascadeserve.demo.timeline import make_timeline
from cascadeserve.gear_plan import Gear, LadderEntry, PlannedFamily, PlannedModel, Stage, TensorSpec
from cascadeserve.replay.client import Answer, Outcome, Reply
from cascadeserve.replay.ledger import Records
from cascadeserve.replay.rows import RequestRows
from cascadeserve.replay.summary import summarise
from cascadeserve.report import Ledger

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from cascadeserve.demo.report import Timeline
    from cascadeserve.report import ServingReport

SLO_S = 0.02
LADDER = (
    LadderEntry(name="large", stages=(Stage(model="large"),), reach=(1.0,)),
    LadderEntry(name="both", stages=(Stage(model="small", threshold=0.5), Stage(model="large")), reach=(1.0, 0.2)),
)


def family() -> PlannedFamily:
    model = PlannedModel(max_batch=8, busy_s=((1, 0.001),))
    return PlannedFamily(
        inputs=(TensorSpec(name="x", datatype="FP32", shape=(1,)),),
        num_classes=2,
        models={"small": model, "large": model},
        reference_model="large",
        slo_s=SLO_S,
        max_rows_per_request=1,
        ladder=LADDER,
        gears=(
            Gear(name="g-large", layout="l", min_rate_per_s=0.0, max_rate_per_s=300.0, ladder_entry="large"),
            Gear(name="g-both", layout="l", min_rate_per_s=300.0, max_rate_per_s=1500.0, ladder_entry="both"),
            Gear(
                name="g-over",
                layout="l",
                min_rate_per_s=1500.0,
                max_rate_per_s=None,
                ladder_entry="both",
                degraded=True,
            ),
        ),
    )


def load() -> tuple[ServingReport, dict[str, NDArray[Any]], NDArray[np.int64]]:
    """Report, records (a dict of one's own) and truth of `_load`."""
    report, records, truth = _load()
    return report, dict(records), truth


@functools.cache
def _load() -> tuple[ServingReport, dict[str, NDArray[Any]], NDArray[np.int64]]:
    """Twelve seconds: 200 rows per second by the large model, then 1,000 of which it answers every fifth."""
    scheduled_s = np.concatenate([np.arange(0, 6, 1 / 200), np.arange(6, 12, 1 / 1000)])
    count = len(scheduled_s)
    truth = np.zeros(count, dtype=np.int64)
    records = Records(scheduled_s, RequestRows(np.arange(count + 1), np.arange(count)))
    rng = np.random.default_rng(0)
    for index, at_s in enumerate(scheduled_s):
        late = at_s >= 6
        answer = Answer(
            label=np.array([int(rng.random() < 0.02)]),
            stage=np.array([int(index % 5 == 0) if late else 0]),
            gear="g-both" if late else "g-large",
        )
        records.store(index, at_s, Reply(Outcome.ANSWERED, at_s + rng.gamma(4, 0.002), answer=answer))
    report = summarise(records, labels=truth, duration_s=12.0, slo_s=SLO_S)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "load.npz"
        records.write(path)
        with np.load(path) as arrays:
            return report, {name: arrays[name] for name in arrays.files}, truth


def timeline() -> Timeline:
    report, records, truth = load()
    return make_timeline(((6.0, 200.0), (6.0, 1000.0)), report, records, truth, family())


LEDGER = Ledger(sent=5000, answered_correct=4900, answered_wrong=100, refused=0, failed=0, lost=0, duplicated=0)


def probe(rate_per_s: float, p95_s: float, *, long: bool = False, void: bool = False) -> Probe:
    met = p95_s <= SLO_S
    return Probe(
        kind="confirmation" if long else "probe",
        rate_per_s=rate_per_s,
        duration_s=20.0 if long else 5.0,
        p50_s=p95_s / 3,
        p95_s=p95_s,
        last_third_p95_s=p95_s,
        in_flight_at_end=3,
        generator_lag_p99_s=0.002 if void else 0.0005,
        accuracy=0.98,
        ledger=LEDGER,
        verdict="void" if void else "sustained" if met else "overloaded",
        reason="the load generator was 2.00 ms late (p99)" if void else "" if met else "p95 of <b>too</b> much",
    )


def result(rate_per_s: float) -> SystemResult:
    probes = (
        probe(rate_per_s * 0.9, 0.011), probe(rate_per_s * 1.1, 0.21), probe(rate_per_s * 1.1, 0.3, void=True),
        probe(rate_per_s, 0.017), probe(rate_per_s, 0.018, long=True),
    )  # fmt: skip
    return SystemResult(
        sustained_rows_per_s=rate_per_s, p95_s=0.018, accuracy=0.98, ledger=LEDGER, limited_by="system", probes=probes
    )


def point(multiple: float, saving: float) -> SloPoint:
    return SloPoint(
        slo_multiple=multiple,
        slo_s=multiple * SLO_S / 10,
        single_rows_per_s=430.0,
        cascade_rows_per_s=430.0 * saving,
        saving=saving,
    )


CURVE = SloCurve(
    simulated=tuple(point(multiple, 4 - 4 / multiple) for multiple in (5.0, 10.0, 20.0, 40.0)),
    measured=(point(10.0, 3.5),),
    left_out=(SloGap(slo_multiple=3.0, of="simulated", reason="no plan of the large model keeps the SLO"),),
)


def report(**changes: Any) -> DemoReport:
    made_up = {
        "tier": "quick",
        "date": "2026-11-22T10:00:00+00:00",
        "host": {"cpu": "Made <up>", "cores": "2", "system": "Linux", "python": "3.11"},
        "reference_model": "large",
        "reference_accuracy": 0.985,
        "accuracy_drop": 0.0031,
        "paired_answers": 20_500,
        "slo_s": SLO_S,
        "best_single_direct": result(380.0),
        "best_single": result(430.0),
        "cascade": result(1700.0),
        "saving": 1700 / 430,
        "saving_range": None,
        "pairs": (),
        "certificate": Certificate(epsilon=0.0072, delta=0.025, rows=25_000),
        "plan": "digits",
        "ladder": (
            LadderLine(entry=LADDER[0], min_rate_per_s=0.0, max_rate_per_s=300.0, degraded=False),
            LadderLine(entry=LADDER[1], min_rate_per_s=300.0, max_rate_per_s=None, degraded=True),
        ),
        "timeline": timeline(),
        "slo_curve": CURVE,
        "ledger": LEDGER,
        "lost": 0,
        "duplicated": 0,
        "wall_s": {"plan": 3.0, "total": 400.0},
    }
    return DemoReport(**(made_up | changes))  # type: ignore[arg-type]


def retimed(report: ServingReport, latency_s: float) -> ServingReport:
    """The same report of a load in which every answer took this long."""
    return msgspec.structs.replace(report, p50_s=latency_s, p95_s=latency_s, p99_s=latency_s)
