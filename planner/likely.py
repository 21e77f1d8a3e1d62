"""What a certificate would probably say of an entry, judged by the search rows."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from planner.bounds import gap_upper, grouped_gap_upper, harms, repairs
from planner.cascade_rows import cascade_answers
from planner.certificate import REPAIR_SHARE

if TYPE_CHECKING:
    from cascadeserve.gear_plan import LadderEntry
    from planner.records import SearchRecords


def likely_epsilon(entry: LadderEntry, reference: str, records: SearchRecords, delta: float) -> float:
    """Bound at `delta` on what the entry loses against the reference model, if the calibration rows were like these."""
    if {stage.model for stage in entry.stages} == {reference}:
        return 0.0
    label = cascade_answers(entry, records).label
    of_reference = records.models[reference].label
    harmed, repaired = harms(label, of_reference, records.truth), repairs(label, of_reference, records.truth)
    group_of = np.unique(records.group_id, return_inverse=True)[1]
    size = np.bincount(group_of)
    if len(size) == len(records):
        return gap_upper(int(harmed.sum()), int(repaired.sum()), len(records), delta, repair_share=REPAIR_SHARE)
    net_harm = np.bincount(group_of, weights=harmed.astype(np.int64) - repaired).astype(np.int64)
    return grouped_gap_upper(net_harm, size, delta)
