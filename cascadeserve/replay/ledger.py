"""The records of a run: what became of every request and row, and live counts for people watching."""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from cascadeserve.replay.client import SECOND_ANSWER, Outcome, Reply

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from cascadeserve.replay.rows import RequestRows

_OTHER_ERRORS = "other errors"
_MAX_ERROR_TEXTS = 50
# Latencies are counted in bins that are 2 % wide, from 10 microseconds up.
_BIN_WIDTH = math.log(1.02)
_FIRST_BIN_S = 1e-5
_BINS = 1000


class LiveCounts:
    """What is known while the run goes on."""

    def __init__(self) -> None:
        self.sent = 0
        self.duplicated = 0
        self.by_outcome = dict.fromkeys(Outcome, 0)
        self._bins = np.zeros(_BINS, dtype=np.int64)

    def count(self, reply: Reply, latency_s: float) -> None:
        """Count a reply."""
        self.by_outcome[reply.outcome] += 1
        self.duplicated += reply.duplicated
        if reply.outcome is Outcome.ANSWERED:
            place = int(math.log(max(latency_s, _FIRST_BIN_S) / _FIRST_BIN_S) / _BIN_WIDTH)
            self._bins[min(place, _BINS - 1)] += 1

    def quantile_s(self, share: float) -> float | None:
        """Latency quantile of all answers so far, in seconds, to within 2 %; None before the first answer."""
        total = self._bins.sum()
        if not total:
            return None
        place = int(np.searchsorted(np.cumsum(self._bins), share * total))
        return float(_FIRST_BIN_S * math.exp((place + 1) * _BIN_WIDTH))


class Records:
    """Arrays over requests and over sent rows, filled as replies come in; times in seconds from the run's start.

    Per request: scheduled_s, sent_s, done_s, outcome, gear, plan and error (indices into `gears`, `plans` and
    `error_texts`, -1: none), certified (-1: not said). Per row, at `rows.offset`: label, stage, certainty
    (-1 and NaN where there is none; label only means something where the request was answered).
    """

    def __init__(self, scheduled_s: NDArray[np.float64], rows: RequestRows) -> None:
        requests, sent_rows = len(scheduled_s), len(rows.row_index)
        self.scheduled_s = scheduled_s
        self.rows = rows
        self.sent_s = np.full(requests, np.nan)
        self.done_s = np.full(requests, np.nan)
        self.outcome = np.full(requests, Outcome.UNSENT, dtype=np.int8)
        self.gear = np.full(requests, -1, dtype=np.int32)
        self.plan = np.full(requests, -1, dtype=np.int32)
        self.certified = np.full(requests, -1, dtype=np.int8)
        self.error = np.full(requests, -1, dtype=np.int32)
        self.label = np.full(sent_rows, -1, dtype=np.int64)
        self.stage = np.full(sent_rows, -1, dtype=np.int32)
        self.certainty = np.full(sent_rows, np.nan, dtype=np.float32)
        self.gears: list[str] = []
        self.plans: list[str] = []
        self.error_texts: list[str] = []
        # when the run started, on the clock that all processes of the machine share
        self.start_s = math.nan
        self.errors: Counter[str] = Counter()
        self.live = LiveCounts()
        # processor time of the generator over the run
        self.cpu_s = 0.0
        # of the machine's time over the run; None where it does not say
        self.stolen_frac: float | None = None

    def store(self, index: int, sent_s: float, reply: Reply) -> None:
        """Store how request `index` ended; `sent_s` and `reply.done_s` count from the run's start."""
        self.sent_s[index] = sent_s
        self.done_s[index] = reply.done_s
        self.outcome[index] = reply.outcome
        self.live.count(reply, reply.done_s - float(self.scheduled_s[index]))
        if reply.error:
            known = reply.error in self.errors or len(self.errors) < _MAX_ERROR_TEXTS
            text = reply.error if known else _OTHER_ERRORS
            self.errors[text] += 1
            self.error[index] = _place_of(text, self.error_texts)
        answer = reply.answer
        if answer is None:
            return
        place = slice(self.rows.offset[index], self.rows.offset[index + 1])
        self.label[place] = answer.label
        if answer.stage is not None:
            self.stage[place] = answer.stage
        if answer.certainty is not None:
            self.certainty[place] = answer.certainty
        self.gear[index] = _place_of(answer.gear, self.gears)
        self.plan[index] = _place_of(answer.plan, self.plans)
        if answer.certified is not None:
            self.certified[index] = answer.certified

    def add_unasked(self, answers: int) -> None:
        """Count answers that came while no request waited for them."""
        if answers:
            self.live.duplicated += answers
            self.errors[SECOND_ANSWER] += answers

    def write(self, path: Path) -> None:
        """Write all arrays as .npz, for analyses that pair runs row by row."""
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            np.savez_compressed(
                file,
                scheduled_s=self.scheduled_s,
                sent_s=self.sent_s,
                done_s=self.done_s,
                outcome=self.outcome,
                outcome_names=np.array([outcome.name.lower() for outcome in Outcome]),
                gear=self.gear,
                gear_names=np.array(self.gears, dtype=np.str_),
                plan=self.plan,
                plan_names=np.array(self.plans, dtype=np.str_),
                certified=self.certified,
                error=self.error,
                error_texts=np.array(self.error_texts, dtype=np.str_),
                start_s=self.start_s,
                row_offset=self.rows.offset,
                row_index=self.rows.row_index,
                label=self.label,
                stage=self.stage,
                certainty=self.certainty,
            )


def _place_of(name: str | None, names: list[str]) -> int:
    """Index of a name in a list that takes it in if need be; -1 for none."""
    if name is None:
        return -1
    if name not in names:
        names.append(name)
    return names.index(name)
