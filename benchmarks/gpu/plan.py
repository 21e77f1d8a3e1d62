"""From measured busy times to the two gear plans that are compared, made by the same rules."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from benchmarks.gpu.client import BenchmarkFailed
from benchmarks.gpu.family import CLASSES, INPUT
from cascadeserve.gear_plan import (
    Gear,
    GearPlan,
    LadderEntry,
    Layout,
    PlannedFamily,
    PlannedModel,
    Stage,
    TensorSpec,
    Trigger,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from benchmarks.gpu.family import Family
    from benchmarks.gpu.result import BusyTime

# A batch may take this share of the SLO, and wait this share of it for company.
_BATCH_SHARE_OF_SLO = 1 / 4
_WAIT_SHARE_OF_SLO = 1 / 10
# A batch is worth sending at once when its rows cost at most this much more than in the largest batch.
_WORTHWHILE = 1.2


def choose_threshold(certainties: NDArray[np.float32], reach: float) -> float:
    """Threshold below which about the share `reach` of these certainties lies: a midpoint between two of them.

    Raises:
        BenchmarkFailed: the certainties are (nearly) all alike.

    """
    ordered = np.sort(certainties.astype(np.float64))
    gaps = np.flatnonzero(np.diff(ordered) > 0.0)
    if not len(gaps):
        raise BenchmarkFailed("the first stage is equally certain of all rows, so no threshold parts them")
    below = gaps[np.argmin(np.abs(gaps + 1 - reach * len(ordered)))]
    return float((ordered[below] + ordered[below + 1]) / 2)


def choose_trigger(busy: BusyTime, slo_s: float) -> Trigger:
    """Largest batch: the largest measured one within its share of the SLO. Least: the smallest nearly as cheap."""
    fitting = [point for point in busy.busy_s if point[1] <= _BATCH_SHARE_OF_SLO * slo_s] or [busy.busy_s[0]]
    max_batch, batch_s = fitting[-1]
    worthwhile = _WORTHWHILE * batch_s / max_batch
    # the largest itself always is
    min_batch = next(rows for rows, seconds in fitting if seconds / rows <= worthwhile)
    return Trigger(min_batch=min_batch, max_batch=max_batch, max_wait_s=_WAIT_SHARE_OF_SLO * slo_s)


def predicted_rate_per_s(stages: list[str], reach: list[float], busy: dict[str, BusyTime], slo_s: float) -> float:
    """Rows per second at which the device would be busy all the time, in largest batches."""
    per_row_s = 0.0
    for model, share in zip(stages, reach, strict=True):
        max_batch = choose_trigger(busy[model], slo_s).max_batch
        per_row_s += share * dict(busy[model].busy_s)[max_batch] / max_batch
    return 1.0 / per_row_s


def make_plan(
    name: str,
    family: Family,
    stages: list[tuple[str, float | None]],
    reach: list[float],
    *,
    endpoint: str,
    busy: dict[str, BusyTime],
    slo_s: float,
) -> GearPlan:
    """Make a plan of one cascade of (model, threshold) stages, in one gear, on one endpoint."""
    models = [model for model, _ in stages]
    rate_per_s = predicted_rate_per_s(models, reach, busy, slo_s)
    entry = LadderEntry(
        name="only",
        stages=tuple(Stage(model=model, threshold=threshold) for model, threshold in stages),
        reach=tuple(reach),
    )
    # One gear for all rates: what is compared is the cascade with the model, not the shifting of gears.
    gear = Gear(
        name="only",
        layout="only",
        min_rate_per_s=0.0,
        max_rate_per_s=2.0 * rate_per_s,
        ladder_entry="only",
        triggers={model: choose_trigger(busy[model], slo_s) for model in models},
    )
    planned = PlannedFamily(
        inputs=(TensorSpec(name=INPUT, datatype="FP32", shape=family.shape),),
        num_classes=CLASSES,
        models={model: PlannedModel(max_batch=family.max_batch, busy_s=busy[model].busy_s) for model in models},
        reference_model=models[-1],
        slo_s=slo_s,
        max_rows_per_request=family.max_batch,
        ladder=(entry,),
        gears=(gear,),
    )
    layout = Layout(name="only", instances={endpoint: dict.fromkeys(models, 1)})
    return GearPlan(schema_version=1, name=name, families={name: planned}, layouts=(layout,))
