"""From measurements to a gear plan: search, ladder, gears, certificate.

Everything is chosen on the search split: the reference model, the cascades, the triggers and the gears. Then what the
gears use is frozen and certified on the calibration split, once. An entry that turns out worse than the goal allows is
left out and the gears are tiled again over the entries that remain. That needs no second look, since all the bounds
hold at once; a few spare entries are certified for the case.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from itertools import chain
from typing import TYPE_CHECKING

import msgspec

from cascadeserve.errors import UsageError
from cascadeserve.gear_plan import Layout, Stage
from planner.assemble import assemble
from planner.at_share import planned_model, slowed
from planner.certificate import certify_file, freeze
from planner.checkpoint import RememberedPredictions
from planner.choose_layouts import ALL, choose_layouts
from planner.expected import DOWN_FRAC, top_rate_per_s
from planner.fits import check_fit
from planner.gears import Option, tile
from planner.infeasible import Infeasible, certify_by
from planner.layouts import LayoutSearch
from planner.likely import likely_epsilon
from planner.lower_gears import lower_gears, spare_gears
from planner.policies import WITH_ONE_ENTRY, policy_gears, policy_ladder
from planner.predict import SimulatedGears
from planner.quickest import quickest
from planner.rank_layouts import Wanted
from planner.row_work import one_row_s, row_work_s
from planner.search import evaluate, reference_model
from planner.time_limit import TimeLimit, spread
from planner.triggers import Device, most_per_s, tune

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from pathlib import Path

    from cascadeserve.gear_plan import Gear, GearPlan, LadderEntry
    from planner.certificate import Certificate, FrozenLadder
    from planner.checkpoint import Checkpoint
    from planner.choose_layouts import Chosen
    from planner.goal import FamilyGoal
    from planner.inputs import Inputs
    from planner.predict import MakePredictor, Predictor
    from planner.profile import Profile
    from planner.triggers import Tuned

LADDER_SIZE = 12

Options = dict[str, list[Option]]
# the layouts that look best are simulated, then those that do in view of that, up to so many times
_ROUNDS = 4
# models side by side may get this much more out of a device than full batches one after the other
_SHARING = 1.25


def no_progress(done: int, total: int) -> None:
    """Show nothing."""


def plan_family(
    inputs: Inputs,
    calibration: Path | None,
    *,
    spend: bool = False,
    predict: MakePredictor | None = None,
    on_progress: Callable[[int, int], None] = no_progress,
    limit: TimeLimit | None = None,
    checkpoint: Checkpoint | None = None,
) -> GearPlan:
    """Make the plan; without `calibration` it is a draft, in which nothing is certified.

    `spend` is for `certify_file`; `predict` None asks the simulator; `on_progress` gets ladder entries done and all.
    Past the `limit` only what a plan needs is done; `checkpoint` keeps what the predictor said for the next run.

    Raises:
        UsageError: the inputs do not fit each other.
        Infeasible: nothing keeps the goal.

    """
    models = inputs.search.models
    devices = check_fit(inputs.search, inputs.profiles, inputs.cluster, family=inputs.family, models=models)
    draft = Draft(inputs, devices, predict, limit or TimeLimit(None), checkpoint)
    options = draft.options(on_progress)
    overload = draft.overload() if inputs.goal.uncertified_overload else {}
    chosen = draft.gears(options, overload)
    frozen = draft.freeze(options, chosen)
    # An entry that only answers with the reference model loses nothing by definition: that spends no rows.
    certificate = None
    if calibration is not None and frozen.tested:
        certificate = certify_file(
            frozen,
            calibration,
            delta=inputs.goal.delta,
            spend=spend,
            wanted_epsilon=inputs.goal.max_epsilon,
        )
    epsilons = {entry.name: 0.0 for entry in frozen.ladder if frozen.is_reference(entry)}
    if certificate is not None:
        epsilons |= {e.name: e.epsilon for e in certificate.entries if e.epsilon is not None}
        good = {name for name, epsilon in epsilons.items() if epsilon <= inputs.goal.max_epsilon}
        if not good.issuperset(gear.ladder_entry for gear in chosen.gears if not gear.degraded):
            left = {name: [option for option in here if option.name in good] for name, here in options.items()}
            chosen = draft.gears({name: here for name, here in left.items() if here}, overload, certificate)
    return draft.finish(chosen, epsilons, certificate)


def slo_of(inputs: Inputs, devices: Mapping[str, Profile]) -> float:
    """SLO in seconds; as a multiple of a batch of the reference model it is that of the fastest kind of device."""
    goal = inputs.goal
    return goal.slo_s or (goal.slo_per_reference_batch or 0.0) * one_row_s(reference_model(inputs.search), devices)


class Draft:
    """A plan on its way."""

    def __init__(
        self,
        inputs: Inputs,
        devices: Mapping[str, Profile],
        predict: MakePredictor | None,
        limit: TimeLimit,
        checkpoint: Checkpoint | None,
    ) -> None:
        """`devices` is the profile of every endpoint, as it was measured."""
        self._inputs = inputs
        self._measured = devices
        self._devices = {name: slowed(profile, inputs.share) for name, profile in devices.items()}
        self._limit = limit
        self._one_entry = WITH_ONE_ENTRY[inputs.policy] == inputs.policy
        goal, search_records = inputs.goal, inputs.search
        self._reference = reference_model(search_records)
        self._slo_s = slo_of(inputs, devices)
        names = [self._reference] if inputs.policy == "reference" else list(search_records.models)
        models = {name: planned_model(name, self._devices, inputs.largest_batch[name]) for name in names}
        slots = {endpoint: profile.slots for endpoint, profile in devices.items()}
        self._device = Device(models=models, slots=slots, slo_s=self._slo_s, layout=ALL)
        work_s = row_work_s(self._device, self._devices, self._reference)
        reference_accuracy = evaluate(search_records, [Stage(model=self._reference)], work_s).accuracy
        self._floor = goal.accuracy_floor(reference_accuracy)
        if self._floor > reference_accuracy:
            raise Infeasible(
                f"the goal wants an accuracy of {self._floor:.2%}, but the most accurate model, {self._reference!r}, "
                f"reaches {reference_accuracy:.2%} on the search rows; lower min_accuracy, or add a better model",
                "accuracy",
            )
        self._ladder = self._make_ladder(work_s)
        self._search = self._find_layouts()
        self._sites = self._search.sites
        self._candidates = [
            Layout(name=f"layout-{number}" if len(self._search.found) > 1 else ALL, instances=instances)
            for number, instances in enumerate(self._search.found, 1)
        ]
        # those that are simulated
        self._layouts: dict[str, Layout] = {}
        self.predictor: Predictor = (predict or SimulatedGears)(
            assemble(
                inputs, slo_s=self._slo_s, reference=self._reference, layouts=self._candidates, gears=(),
                entries=self._ladder, models=models,
            ),
            inputs.family, goal, search_records, self._devices, seed=inputs.seed,
        )  # fmt: skip
        file = None if checkpoint is None else checkpoint.file(inputs.content())
        self.predictor = RememberedPredictions(self.predictor, file)

    def may_serve(self) -> list[LadderEntry]:
        """Entries that may serve without being degraded, if they keep the SLO."""
        return [entry for entry in self._ladder if self._may_be_certified(entry)]

    def at_share(self, share: float) -> Device:
        """What the family has of the device time."""
        devices = {name: slowed(profile, share) for name, profile in self._measured.items()}
        models = {name: planned_model(name, devices, self._inputs.largest_batch[name]) for name in self._device.models}
        return replace(self._device, models=models)

    def _find_layouts(self) -> LayoutSearch:
        inputs = self._inputs
        may = self.may_serve() or self._ladder
        wanted = Wanted(
            self._slo_s, inputs.goal.headroom, inputs.goal.max_rate_per_s, inputs.prior, DOWN_FRAC, inputs.max_layouts
        )
        return LayoutSearch(inputs.cluster, self._devices, self._device.models, may, wanted, one_entry=self._one_entry)

    def options(self, on_progress: Callable[[int, int], None]) -> Options:
        """Entries that may serve without being degraded, with their triggers, by layout."""
        certain = self.may_serve()
        if self._one_entry:
            certain = self._that_may_reach(certain)
        found: dict[int, list[Option]] = {}
        done, rows = 0, self._search.first()
        for _ in range(_ROUNDS):
            places = [place for place in dict.fromkeys(chain(*rows)) if place not in found]
            here = {place: [e for e in certain if self._sites.runs(e, self._search.found[place])] for place in places}
            if not here or (found and self._limit.reached):
                break
            all_told = done + sum(map(len, here.values()))
            for place, entries in here.items():
                name = self._candidates[place].name
                if self._limit.reached and any(self._reaches(options) for options in found.values()):
                    self._limit.leave_out(f"the layout {name}")
                else:
                    self._layouts[name] = self._candidates[place]
                    found[place] = self._tuned(name, entries, on_progress, done, all_told)
                done += len(entries)
            on_progress(all_told, all_told)
            rows = self._search.next(
                {place: {option.name: self._upper_per_s(option) for option in here} for place, here in found.items()}
            )
        if not any(found.values()):
            raise Infeasible(
                f"no ladder entry answers within the SLO of {self._slo_s * 1e3:.3g} ms at any rate; relax the SLO, "
                "or add a faster model or endpoint",
                "latency",
            )
        return {self._candidates[place].name: options for place, options in found.items() if options}

    def _tuned(
        self,
        layout: str,
        entries: Sequence[LadderEntry],
        on_progress: Callable[[int, int], None],
        before: int,
        all_told: int,
    ) -> list[Option]:
        device = replace(self._device, layout=layout)
        found: dict[str, Option] = {}
        for done, entry in enumerate(spread(entries)):
            on_progress(before + done, all_told)
            if self._limit.reached and self._reaches(found.values()):
                self._limit.leave_out(f"the ladder entry {entry.name}")
            elif tuned := tune(entry, device, self.predictor):
                found[entry.name] = Option(tuple(tuned))
        return [found[entry.name] for entry in entries if entry.name in found]

    def _that_may_reach(self, entries: Sequence[LadderEntry]) -> list[LadderEntry]:
        """Entries that need not be ruled out for the rate of the goal, where one of them has to serve it alone."""
        goal = self._inputs.goal
        wanted_per_s = (goal.max_rate_per_s or 0.0) / goal.headroom / _SHARING
        most_per_s_of = {entry.name: most_per_s(entry, self._device) for entry in entries}
        kept = [entry for entry in entries if most_per_s_of[entry.name] >= wanted_per_s]
        if not kept:
            fastest = max(most_per_s_of, key=most_per_s_of.__getitem__)
            raise Infeasible(
                f"the goal asks for {goal.max_rate_per_s:g} rows/s, but full batches of {fastest!r}, the fastest entry "
                f"that is accurate enough, make only {most_per_s_of[fastest]:.0f}; lower max_rate_per_s, or relax the "
                "SLO or the accuracy",
                "rate",
            )
        return kept

    def _reaches(self, options: Iterable[Option]) -> bool:
        """Whether some option serves the rate that the goal asks for."""
        goal = self._inputs.goal
        return any(self._upper_per_s(option) >= (goal.max_rate_per_s or 0.0) for option in options)

    def _upper_per_s(self, option: Option) -> float:
        return self._inputs.goal.headroom * option.sustained_per_s

    def overload(self) -> dict[str, Tuned]:
        """Triggers of the cheapest entry of each layout, for what is above all ranges."""
        found: dict[str, Tuned] = {}
        for name, layout in self._layouts.items():
            cheapest = next(entry for entry in reversed(self._ladder) if self._sites.runs(entry, layout.instances))
            if tuned := tune(cheapest, replace(self._device, layout=name), self.predictor):
                found[name] = tuned[-1]
        return found

    def gears(self, options: Options, overload: Mapping[str, Tuned], certificate: Certificate | None = None) -> Chosen:
        """Layouts with gears of some options, which are by layout; a `certificate` is what left no others."""
        if not options:
            raise UsageError(
                f"no entry that keeps the SLO is certified to lose at most {self._inputs.goal.max_epsilon:g}; "
                f"{certify_by(certificate)}"
            )
        goal = self._inputs.goal
        without_rate = msgspec.structs.replace(goal, max_rate_per_s=None)
        made: dict[str, list[Gear]] = {}
        refused: list[Infeasible] = []
        for name, of_layout in options.items():
            try:
                made[name] = self._built(name, of_layout, overload.get(name), goal)
            except Infeasible as error:
                refused.append(error)
                # a layout for lower rates need not reach the one that is asked for
                if goal.max_rate_per_s is not None and len(self._layouts) > 1 and not self._one_entry:
                    with contextlib.suppress(Infeasible):
                        made[name] = self._built(name, of_layout, overload.get(name), without_rate)
        if not made or max(map(top_rate_per_s, made.values())) < (goal.max_rate_per_s or 0.0):
            raise refused[0]
        reference = self._device.models[self._reference]
        spare = {name: spare_gears(options[name], layout=name) for name in made}
        lower = {
            name: lower_gears(
                options[name], goal, self._inputs.prior, self.predictor, layout=name, overload=overload.get(name)
            )
            for name in made
            if len(made) > 1 and not self._one_entry and not self._inputs.quickest
        }
        return choose_layouts(
            list(self._layouts.values()), made, lower, spare, self._ladder, self._inputs.prior, self._sites,
            family=self._inputs.family, most=self._inputs.max_layouts,
            always={*(reference.composed_of or [self._reference])},
        )  # fmt: skip

    def _built(self, layout: str, options: Sequence[Option], overload: Tuned | None, goal: FamilyGoal) -> list[Gear]:
        if self._inputs.quickest:
            options = quickest(
                options, self.predictor, layout=layout, slo_s=self._slo_s, headroom=goal.headroom,
                top_per_s=goal.max_rate_per_s or 0.0,
            )  # fmt: skip
        return policy_gears(
            self._inputs.policy, options, goal, self._inputs.prior, self.predictor, layout=layout, overload=overload,
            limit=self._limit, compare=not self._inputs.quickest,
        )  # fmt: skip

    def freeze(self, options: Options, chosen: Chosen) -> FrozenLadder:
        """Freeze what the gears use, what they would use without the fastest entry, and the reference model."""
        # a degraded gear also serves while one layout becomes another
        between = {name for each in chosen.transitions for name in each.gears.values()}
        used = {gear.ladder_entry for gear in chosen.gears if not gear.degraded or gear.name in between}
        degraded = {gear.ladder_entry for gear in chosen.gears if gear.degraded} - used
        spare: set[str] = set()
        for layout, source in zip(chosen.layouts, chosen.sources, strict=True):
            here = {gear.ladder_entry for gear in chosen.gears if gear.layout == layout.name and not gear.degraded}
            spare |= self._spare(options[source], here)
        kept = [e for e in self._ladder if e.name in used | spare | degraded or self._is_reference(e)]
        return freeze(kept, self._reference, self._inputs.search, degraded=degraded)

    def _spare(self, options: Sequence[Option], used: set[str]) -> set[str]:
        """Entries that the gears of a layout would use without their fastest one."""
        fastest = max((option for option in options if option.name in used), key=lambda o: o.sustained_per_s)
        slower = [option for option in options if option.sustained_per_s < fastest.sustained_per_s]
        if not slower:
            return set()
        # they may serve lower rates than the goal asks for: that is decided when they are needed
        goal = msgspec.structs.replace(self._inputs.goal, max_rate_per_s=None)
        return {span.tuned.entry.name for span in tile(slower, goal, self._inputs.prior, one_entry=self._one_entry)}

    def finish(self, chosen: Chosen, epsilons: Mapping[str, float], certificate: Certificate | None) -> GearPlan:
        """Put the plan together: entries that gears use and the reference, models that these need."""
        used = {gear.ladder_entry for gear in chosen.gears}
        entries = [
            msgspec.structs.replace(entry, epsilon=epsilons.get(entry.name))
            for entry in self._ladder
            if entry.name in used or self._is_reference(entry)
        ]
        needed = {stage.model for entry in entries for stage in entry.stages}
        return assemble(
            self._inputs, slo_s=self._slo_s, reference=self._reference, layouts=chosen.layouts, gears=chosen.gears,
            entries=entries, certificate=certificate, transitions=chosen.transitions,
            models={
                name: planned_model(name, self._measured, self._inputs.largest_batch[name])
                for name in self._device.models
                if name in needed
            },
        )  # fmt: skip

    def _make_ladder(self, work_s: Mapping[str, float]) -> list[LadderEntry]:
        """Entries from dear to cheap with their accuracy."""
        records = self._inputs.search
        entries = policy_ladder(
            self._inputs.policy, records, work_s, reference=self._reference, size=LADDER_SIZE, floor=self._floor
        )
        return [
            msgspec.structs.replace(entry, accuracy=evaluate(records, entry.stages, work_s).accuracy)
            for entry in entries
        ]

    def _may_be_certified(self, entry: LadderEntry) -> bool:
        """Whether the entry is accurate enough, and would be certified if the calibration rows were like these."""
        if self._is_reference(entry):
            return True
        if (entry.accuracy or 0.0) < self._floor:
            return False
        goal = self._inputs.goal
        loss = likely_epsilon(entry, self._reference, self._inputs.search, goal.delta / LADDER_SIZE)
        return loss <= goal.max_epsilon

    def _is_reference(self, entry: LadderEntry) -> bool:
        return {stage.model for stage in entry.stages} == {self._reference}
