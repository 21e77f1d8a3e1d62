"""How many endpoints does a ladder entry need at a rate? Asked of the simulator, as the planner asks it.

Triggers are climbed once per entry, on a sample of the endpoints that the entry would need if batches left no gaps. A
load of index of dispersion D that is dealt at random to n endpoints reaches k of them with the index 1 + (D - 1) k / n,
and that is what the sample is tuned for. All that counts is then simulated on all endpoints, under the whole load, for
as long as the planner does before it believes a rate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cascadeserve.gear_plan import GearPlan, Layout, PlannedFamily, PlannedModel, TensorSpec
from planner.checkpoint import RememberedPredictions
from planner.goal import FamilyGoal
from planner.predict import ROUGH, THOROUGH, SimulatedGears
from planner.profile import batch_busy_s, planned_busy_points
from planner.search import reference_model
from planner.triggers import Device, Tuned, greedy, most_per_s, trial_gear, tune

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.endpoint_families import Family
    from cascadeserve.gear_plan import Gear, LadderEntry
    from planner.checkpoint import Checkpoint
    from planner.predict import Effort, Prediction, Predictor

# the best single model is to need so many; nobody is followed beyond the second number
ENDPOINTS, MOST_ENDPOINTS = 32, 64
_SAMPLE = 2
_LAYOUT = "all"
# rates are found to this ratio, as `planner.triggers.confirm` finds them
_RATIO = 1.01
_STEP = 1.1
_LEAST_FRAC = 0.01
_ROUNDING = 1e-9


@dataclass(frozen=True)
class Needed:
    """Endpoints of an entry; `at_least`: so many by arithmetic, too many to be simulated."""

    endpoints: int
    entry: LadderEntry
    at_least: bool = False


class _Sampled(RememberedPredictions):
    """The sample only says which triggers are better: what is believed of them is simulated on all endpoints."""

    def gear(self, gear: Gear, rate_per_s: float, effort: Effort) -> Prediction:
        """Predict roughly, however thoroughly it is asked for."""
        del effort
        return super().gear(gear, rate_per_s, ROUGH)


class Trials:
    """Entries of one family under one SLO and one index of dispersion."""

    def __init__(
        self,
        family: Family,
        entries: Sequence[LadderEntry],
        *,
        slo_s: float,
        dispersion: float,
        checkpoint: Checkpoint | None,
    ) -> None:
        """`entries` are all that will be asked about, with names of their own."""
        self._family = family
        self._entries = tuple(entries)
        self._slo_s = slo_s
        self._dispersion = dispersion
        self._checkpoint = checkpoint
        self._one = device(family, slo_s, 1)
        self._predictors: dict[tuple[int, float], Predictor] = {}
        self._tuned: dict[str, list[Tuned]] = {}

    def most_per_s(self, entry: LadderEntry) -> float:
        """Rows per second of one endpoint that is never idle, in the best batches within the SLO."""
        return most_per_s(entry, self._one)

    def sustained_per_s(self, entry: LadderEntry, endpoints: int) -> float:
        """Highest rate, in rows per second, that the endpoints sustain; 0: none above a hundredth of `most_per_s`.

        It is looked for from above. A clump of requests at the end of the load can pass for a queue that grows where
        the rate is low, so that a higher one may keep what a lower one does not.
        """
        most = self.most_per_s(entry) * endpoints
        best = 0.0
        for tuned in self._options(entry, most):
            low = high = most
            while low > _LEAST_FRAC * most and not self._keeps(tuned, endpoints, low):
                low, high = low / _STEP, low
            if low <= _LEAST_FRAC * most:
                continue
            while high > low * _RATIO:
                middle = (low * high) ** 0.5
                low, high = (middle, high) if self._keeps(tuned, endpoints, middle) else (low, middle)
            best = max(best, low)
        return best

    def fewest(self, entries: Sequence[LadderEntry], rate_per_s: float) -> Needed | None:
        """Fewest endpoints with which one of the entries sustains a rate; None: not with as many as are tried.

        An entry is left out where full batches say that it cannot need fewer than one that was found. Of an entry
        alone it is a lower bound where that is more than is tried.
        """
        best: Needed | None = None
        for entry in sorted(entries, key=self.most_per_s, reverse=True):
            least = self._least(entry, rate_per_s)
            most = MOST_ENDPOINTS if best is None or best.at_least else best.endpoints - 1
            if least > most:
                # by arithmetic; the first entry is the one that needs fewest
                best = best or Needed(math.ceil(rate_per_s / self.most_per_s(entry)), entry, at_least=True)
                continue
            found = self._fewest_of(entry, rate_per_s, least, most)
            if found is not None:
                best = Needed(found, entry)
        return best

    def _fewest_of(self, entry: LadderEntry, rate_per_s: float, least: int, most: int) -> int | None:
        options = self._options(entry, rate_per_s)

        def can(endpoints: int) -> bool:
            return any(self._keeps(tuned, endpoints, rate_per_s) for tuned in options)

        per_endpoint = max(*(tuned.sustained_per_s for tuned in options), 0.5 * self.most_per_s(entry))
        count = min(max(math.ceil(rate_per_s / per_endpoint), least), most)
        # so many cannot, so many can, or are one too many
        failed, found = least - 1, most + 1
        step = 1
        while found - failed > 1:
            if can(count):
                found, count = count, count - step
            else:
                failed, count = count, count + step
            step *= 2
            if not failed < count < found:
                count = (failed + found) // 2
        return found if found <= most else None

    def _least(self, entry: LadderEntry, rate_per_s: float) -> int:
        """Number of endpoints below which full batches, one after the other, do not carry a rate."""
        return max(1, math.ceil(rate_per_s / self.most_per_s(entry) * (1.0 - _ROUNDING)))

    def _options(self, entry: LadderEntry, rate_per_s: float) -> list[Tuned]:
        """Triggers to try, each with the rate that one endpoint of the sample sustains."""
        if entry.name not in self._tuned:
            whole = min(max(1, round(rate_per_s / self.most_per_s(entry))), MOST_ENDPOINTS)
            sample = min(_SAMPLE, whole)
            dispersion = 1.0 + (self._dispersion - 1.0) * sample / whole
            on_sample = device(self._family, self._slo_s, sample)
            tuned = tune(entry, on_sample, _Sampled(self._predictor(sample, dispersion), None))
            # what is best for a few endpoints need not be for many, and what these cannot keep many may
            plain = Tuned(entry, greedy(entry, on_sample), 0.5 * sample * self.most_per_s(entry))
            if all(each.triggers != plain.triggers for each in tuned):
                tuned = [*tuned, plain]
            self._tuned[entry.name] = [Tuned(t.entry, t.triggers, t.sustained_per_s / sample) for t in tuned]
        return self._tuned[entry.name]

    def _keeps(self, tuned: Tuned, endpoints: int, rate_per_s: float) -> bool:
        # The simulator ends a load at 200,000 requests. Of the fastest models that is less than an SLO, within which
        # nothing is late; what no device can do is not asked of it.
        if self._least(tuned.entry, rate_per_s) > endpoints:
            return False
        gear = trial_gear(tuned.entry, tuned.triggers, _LAYOUT)
        return self._predictor(endpoints, self._dispersion).gear(gear, rate_per_s, THOROUGH).keeps

    def _predictor(self, endpoints: int, dispersion: float) -> Predictor:
        key = (endpoints, dispersion)
        if key not in self._predictors:
            family, goal = self._family, FamilyGoal(slo_s=self._slo_s, dispersion=dispersion)
            devices = dict.fromkeys(endpoint_names(endpoints), family.profile)
            predictor = SimulatedGears(
                self._plan(endpoints, dispersion), family.models.family, goal, family.with_ensembles, devices, seed=0
            )
            file = None
            if self._checkpoint is not None:
                content = [family.with_ensembles.digest(), family.profile, goal, endpoints, self._entries]
                file = self._checkpoint.file(content)
            self._predictors[key] = RememberedPredictions(predictor, file)
        return self._predictors[key]

    def _plan(self, endpoints: int, dispersion: float) -> GearPlan:
        """Plan of all entries, without gears."""
        models = self._one.models
        planned = PlannedFamily(
            inputs=(TensorSpec(name="x", datatype="FP32", shape=(1,)),),
            num_classes=None,
            models=dict(models),
            reference_model=self._family.largest,
            slo_s=self._slo_s,
            max_rows_per_request=1,
            ladder=self._entries,
            gears=(),
            dispersion=dispersion,
        )
        instances = {name: dict.fromkeys(models, 1) for name in endpoint_names(endpoints)}
        layout = Layout(name=_LAYOUT, instances=instances)
        return GearPlan(
            schema_version=1, name="trial", families={self._family.models.family: planned}, layouts=(layout,)
        )


def endpoint_names(endpoints: int) -> list[str]:
    """Names of alike endpoints."""
    return [f"triton{index}" for index in range(endpoints)]


def device(family: Family, slo_s: float, endpoints: int) -> Device:
    """Alike endpoints of one slot, and the models and ensembles that they run."""
    models = {
        name: PlannedModel(max_batch=model.max_batch, busy_s=planned_busy_points(family.profile, name))
        for name, model in family.profile.models.items()
    }
    return Device(models=models, slots=dict.fromkeys(endpoint_names(endpoints), 1), slo_s=slo_s, layout=_LAYOUT)


def row_work_s(family: Family, slo_s: float) -> dict[str, float]:
    """Device-seconds of one row by model, as planner.planning reckons them."""
    one = device(family, slo_s, 1)
    limit_s = batch_busy_s(family.profile.models[reference_model(family.models)], 1, 1)
    rows = {name: one.largest_within(name, limit_s) for name in family.models.models}
    return {name: one.batch_s(name, size) / size for name, size in rows.items()}
