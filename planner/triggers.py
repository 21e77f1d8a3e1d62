"""When each model of a cascade sends a batch, and what rate that sustains.

**Greedy** triggers send whatever waits as soon as there is room (min_batch 1). With slots + 1 batches in flight,
batches grow with the load by themselves, so this is hard to beat; only `max_batch` matters, since others wait for the
device while a large batch runs. But each call also costs the server and the orchestrator something, and where that is
much, it pays at high rates to wait a little for a larger batch. The **eager** ones are the triggers that sustain the
most; they are kept beside the greedy ones only if they sustain clearly more.

The search climbs: one trigger of one model is changed at a time, and stays changed if the gear then sustains more. In
the end `max_batch` grows as far as that costs no rate: what waits for one largest batch of each model is what the
orchestrator takes for normal, so small ones make it see a backlog where there is none. Then both kinds are measured
again, on other random numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from cascadeserve.gear_plan import Gear, Trigger
from cascadeserve.policy.work import mean_work_s
from planner.predict import ROUGH, THOROUGH

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from cascadeserve.gear_plan import LadderEntry, PlannedModel
    from planner.predict import Effort, Predictor

Triggers = dict[str, Trigger]

# a batch of the first guess keeps the device for at most this share of the SLO
BATCH_SLO_FRAC = 0.25
_MIN_BATCHES = (1, 2, 4, 8, 16, 32)
# how long to wait for them, as shares of the SLO
_WAIT_SLO_FRACS = (0.02, 0.05, 0.1, 0.2, 0.3)
# what a change has to gain in rate, and eager triggers over greedy ones
_GAIN = 1.03
_PASSES = 2
# share of the rate that larger batches must keep
_NEARLY = 0.99
# rates are found to these ratios
_ROUGH_RATIO = 1.03
_FINE_RATIO = 1.01
# the slowest rate that is looked at, as a share of what the device could do
_LEAST_FRAC = 1e-3


@dataclass(frozen=True)
class Tuned:
    """A ladder entry with triggers, and the rate in rows per second that they sustain; 0: they never keep the SLO.

    `values`, (rate, worth) by rising rate, are there where more is asked of an answer than to be right.
    """

    entry: LadderEntry
    triggers: Triggers
    sustained_per_s: float
    values: tuple[tuple[float, float], ...] = ()

    def worth(self, rate_per_s: float) -> float:
        """What an answer at a rate is worth: its accuracy on the search split, or what `values` say."""
        if not self.values:
            return self.entry.accuracy or 0.0
        rates, values = zip(*self.values, strict=True)
        return float(np.interp(rate_per_s, rates, values))


def batch_sizes(model: PlannedModel) -> list[int]:
    """Powers of two and the model's largest batch."""
    largest = model.max_batch
    return sorted({2**power for power in range(largest.bit_length())} | {largest})


@dataclass(frozen=True)
class Device:
    """What the triggers are chosen for: all endpoints together; `slots` is by endpoint."""

    models: Mapping[str, PlannedModel]
    slots: Mapping[str, int]
    slo_s: float
    layout: str

    def batch_s(self, model: str, rows: int) -> float:
        """Device-seconds of one batch, mean over the endpoints as in `mean_work_s`."""
        planned = self.models[model]
        return mean_work_s([planned.batch_busy_s(rows, endpoint) for endpoint in self.slots], list(self.slots.values()))

    def sizes(self, model: str) -> list[int]:
        """Batch sizes to choose from."""
        return batch_sizes(self.models[model])

    def largest_within(self, model: str, limit_s: float) -> int:
        """Largest of these sizes that keeps a slot busy for at most this long; 1 at least."""
        return max((size for size in self.sizes(model) if self.batch_s(model, size) <= limit_s), default=1)


def trial_gear(entry: LadderEntry, triggers: Triggers, layout: str) -> Gear:
    """Gear that holds an entry and its triggers, for all rates."""
    return Gear(
        name="trial", layout=layout, min_rate_per_s=0.0, max_rate_per_s=None, ladder_entry=entry.name,
        triggers=triggers, degraded=True,
    )  # fmt: skip


def greedy(entry: LadderEntry, device: Device) -> Triggers:
    """Triggers that never wait, with batches that take a fair share of the SLO at most."""
    return {
        stage.model: Trigger(
            min_batch=1,
            max_batch=device.largest_within(stage.model, BATCH_SLO_FRAC * device.slo_s),
            max_wait_s=0.0,
        )
        for stage in entry.stages
    }


def tune(entry: LadderEntry, device: Device, predictor: Predictor) -> list[Tuned]:
    """Greedy triggers of an entry, then eager ones if these sustain clearly more; empty if it never keeps the SLO."""
    best = _rate(Tuned(entry, greedy(entry, device), 0.0), device, predictor)
    if best.sustained_per_s == 0.0:
        return []
    for _ in range(_PASSES):
        climbed = best
        for stage in reversed(entry.stages):
            for trigger in _variants(climbed.triggers[stage.model], stage.model, device):
                climbed = _try(climbed, stage.model, trigger, device, predictor)
        if climbed is best:
            break
        best = climbed
    best = _with_large_batches(best, device, predictor)
    plain = {name: msgspec.structs.replace(t, min_batch=1, max_wait_s=0.0) for name, t in best.triggers.items()}
    found = confirm(Tuned(entry, plain, best.sustained_per_s), device, predictor)
    if plain == best.triggers:
        return [found] if found.sustained_per_s else []
    eager = confirm(best, device, predictor)
    kept = [found, eager] if eager.sustained_per_s > found.sustained_per_s * _GAIN else [found]
    return [tuned for tuned in kept if tuned.sustained_per_s]


def confirm(tuned: Tuned, device: Device, predictor: Predictor) -> Tuned:
    """Measure the sustained rate again, thoroughly, near the one that is known."""
    gear = trial_gear(tuned.entry, tuned.triggers, device.layout)
    low, high = tuned.sustained_per_s / 1.05, tuned.sustained_per_s * 1.05
    while not predictor.gear(gear, low, THOROUGH).keeps:
        low, high = low / 1.1, low
        if low < _capacity_per_s(tuned, device) * _LEAST_FRAC:
            return Tuned(tuned.entry, tuned.triggers, 0.0)
    return Tuned(tuned.entry, tuned.triggers, _bisect(gear, low, high, _FINE_RATIO, THOROUGH, predictor))


def _variants(trigger: Trigger, model: str, device: Device) -> Iterator[Trigger]:
    """Other triggers for one model."""
    for size in device.sizes(model):
        if size != trigger.max_batch and device.batch_s(model, size) <= device.slo_s:
            yield msgspec.structs.replace(trigger, max_batch=size, min_batch=min(size, trigger.min_batch))
    for min_batch in _MIN_BATCHES[1:]:
        if min_batch <= trigger.max_batch:
            for share in _WAIT_SLO_FRACS:
                yield msgspec.structs.replace(trigger, min_batch=min_batch, max_wait_s=share * device.slo_s)


def _try(best: Tuned, model: str, trigger: Trigger, device: Device, predictor: Predictor) -> Tuned:
    """Return the better of a gear and its variant."""
    triggers = {**best.triggers, model: trigger}
    gear = trial_gear(best.entry, triggers, device.layout)
    aim = best.sustained_per_s * _GAIN
    if not predictor.gear(gear, aim, ROUGH).keeps:
        return best
    rate_per_s = _bisect(gear, aim, 1.3 * aim, _ROUGH_RATIO, ROUGH, predictor)
    return Tuned(best.entry, triggers, rate_per_s)


def _with_large_batches(tuned: Tuned, device: Device, predictor: Predictor) -> Tuned:
    """Raise max_batch, as long as the rate stays."""
    for stage in tuned.entry.stages:
        for size in device.sizes(stage.model):
            trigger = tuned.triggers[stage.model]
            if size <= trigger.max_batch:
                continue
            triggers = {**tuned.triggers, stage.model: msgspec.structs.replace(trigger, max_batch=size)}
            gear = trial_gear(tuned.entry, triggers, device.layout)
            if (
                device.batch_s(stage.model, size) > device.slo_s
                or not predictor.gear(gear, tuned.sustained_per_s * _NEARLY, ROUGH).keeps
            ):
                break
            tuned = Tuned(tuned.entry, triggers, tuned.sustained_per_s)
    return tuned


def _rate(tuned: Tuned, device: Device, predictor: Predictor) -> Tuned:
    """Find the sustained rate from nothing."""
    gear = trial_gear(tuned.entry, tuned.triggers, device.layout)
    high = _capacity_per_s(tuned, device)
    least = high * _LEAST_FRAC
    low = high / 2
    while not predictor.gear(gear, low, ROUGH).keeps:
        low, high = low / 2, low
        if low < least:
            return tuned
    return Tuned(tuned.entry, tuned.triggers, _bisect(gear, low, high, _ROUGH_RATIO, ROUGH, predictor))


def _bisect(gear: Gear, low: float, high: float, ratio: float, effort: Effort, predictor: Predictor) -> float:
    """Largest rate that keeps, between one that does and one that is taken not to."""
    while high > low * ratio:
        middle = (low * high) ** 0.5
        low, high = (middle, high) if predictor.gear(gear, middle, effort).keeps else (low, middle)
    return low


def most_per_s(entry: LadderEntry, device: Device) -> float:
    """Rows per second at which the best batches within the SLO would keep every slot busy, whatever the triggers."""
    work_s = 0.0
    for stage, share in zip(entry.stages, entry.reach, strict=True):
        batches_s = {size: device.batch_s(stage.model, size) for size in device.sizes(stage.model)}
        work_s += share * min(b_s / size for size, b_s in batches_s.items() if size == 1 or b_s <= device.slo_s)
    return sum(device.slots.values()) / work_s


def fluid_per_s(entry: LadderEntry, device: Device) -> float:
    """Rows per second at which batches of a fair share of the SLO would keep every slot busy; 0: a row takes longer."""
    if sum(device.batch_s(stage.model, 1) for stage in entry.stages) > device.slo_s:
        return 0.0
    return _capacity_per_s(Tuned(entry, greedy(entry, device), 0.0), device)


def _capacity_per_s(tuned: Tuned, device: Device) -> float:
    """Rows per second at which full batches would keep every slot busy."""
    work_s = 0.0
    for stage, share in zip(tuned.entry.stages, tuned.entry.reach, strict=True):
        largest = tuned.triggers[stage.model].max_batch
        work_s += share * device.batch_s(stage.model, largest) / largest
    return sum(device.slots.values()) / work_s
