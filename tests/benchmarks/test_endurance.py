from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from benchmarks.endurance_stack import Load
from cascadeserve.replay.client import Outcome

if TYPE_CHECKING:
    from pathlib import Path


def test_what_a_stop_left_unanswered_is_told_by_kind(tmp_path: Path) -> None:
    texts = ["503 the server is shutting down", "connection refused"]
    answered, refused, lost, unsent = Outcome.ANSWERED, Outcome.REFUSED, Outcome.LOST, Outcome.UNSENT
    np.savez(
        tmp_path / "records.npz",
        start_s=100.0,
        sent_s=np.array([0.0, 1.0, 1.5, 2.5, 2.6, 2.7, np.nan]),
        outcome=np.array([answered, refused, lost, refused, refused, answered, unsent]),
        error=np.array([-1, 0, 0, 0, 1, -1, -1]),
        error_texts=np.array(texts),
    )
    load = Load(tmp_path / "report.json", tmp_path / "records.npz")
    assert load.unanswered(102.0) == {
        "sent_before": {texts[0]: 2},
        "sent_after": {texts[0]: 1},
        "not_sent": {texts[1]: 1},
    }
