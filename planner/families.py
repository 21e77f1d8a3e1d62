"""One plan for several families on the same endpoints.

Each family gets a share of the time of every device (planner.shares) and a part of its memory, and is planned alone on
what it has then: devices slowed by its share (planner.at_share). So its plan holds whatever the others do. What they
leave is the orchestrator's to give away (cascadeserve.policy.shares). Batches are as short as the SLOs of the others
ask for, since none of them is interrupted.

Memory is divided where it binds: in proportion to what the models of each family would take if all of them stood
everywhere. The plan has one layout, since a change of layouts that suits one family need not suit another.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from cascadeserve.errors import UsageError
from cascadeserve.gear_plan import MAX_NAME_LENGTH, GearPlan, Layout
from planner.at_share import planned_model
from planner.choose_layouts import ALL
from planner.fits import check_fit
from planner.infeasible import Infeasible
from planner.layouts import make_sites
from planner.planning import Draft, no_progress, plan_family, slo_of
from planner.policies import WITH_ONE_ENTRY
from planner.shares import PARTS, Claim, choose_shares
from planner.time_limit import TimeLimit
from planner.triggers import fluid_per_s

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from planner.checkpoint import Checkpoint
    from planner.inputs import Inputs
    from planner.profile import Profile

# what is kept of a fluid rate if answers are to come within an SLO, as a rule
_KEPT_FRAC = 0.85
# rates that are looked at where the goal does not say how often each occurs
_RATES = 64
# A batch under way is not interrupted for another family: it keeps a slot for at most this part of the SLOs of the
# others, or it is a single row.
_BATCH_SLO_FRAC = 0.25
# digests of what every family has its own of
_OWN = ("search", "calibration", "trace")


class FamiliesPlanner:
    """Plans several families together."""

    def __init__(
        self,
        families: Sequence[Inputs],
        *,
        limit: TimeLimit | None = None,
        checkpoint: Checkpoint | None = None,
        on_progress: Callable[[int, int], None] = no_progress,
    ) -> None:
        """`families` have one cluster, profiles and seed; the rest is for `plan_family`.

        Raises:
            UsageError: they do not fit together, or a goal names no rate.

        """
        _check_together(families)
        self._families = _with_batches(_with_memory([replace(each, max_layouts=1) for each in families]))
        self._limit = limit or TimeLimit(None)
        self._checkpoint = checkpoint
        self._on_progress = on_progress

    def plan(self, calibrations: Mapping[str, Path], *, spend: bool = False, name: str = "") -> GearPlan:
        """Make the plan; `calibrations` is by family, a family without them has a draft.

        Raises:
            UsageError: as in `plan_family`.
            Infeasible: nothing keeps the goals; it says which family lacks what.

        """
        parts = self._settle()
        # no rows are spent before all families have a draft
        made = {
            each.family: self._plan(each, parts[each.family], calibrations.get(each.family), spend=spend)
            for each in self._families
        }
        return _joined(made, name or "-".join(made)[:MAX_NAME_LENGTH])

    def _settle(self) -> dict[str, int]:
        """Parts of the device time with which every family has a draft."""
        claims = [_claim(each, 1.0 / len(self._families)) for each in self._families]
        least = {claim.family: claim.least() for claim in claims}
        refused: tuple[str, Infeasible] | None = None
        drafted: set[tuple[str, int]] = set()
        while True:
            try:
                parts = choose_shares(claims, least)
            except Infeasible:
                if refused is None:
                    raise
                family, error = refused
                others = sum(parts for name, parts in least.items() if name != family) / PARTS
                raise Infeasible(f"{error}. The others need at least {others:.0%}", error.constraint) from None
            missing = [each for each in self._families if (each.family, parts[each.family]) not in drafted]
            if not missing:
                return parts
            for each in missing:
                mine = parts[each.family]
                try:
                    self._plan(each, mine, None)
                except Infeasible as error:
                    if error.constraint == "accuracy":
                        raise
                    # the fluid figures promised too much
                    refused, least[each.family] = (each.family, error), mine + 1
                    break
                drafted.add((each.family, mine))

    def _plan(self, inputs: Inputs, parts: int, calibration: Path | None, *, spend: bool = False) -> GearPlan:
        share = parts / PARTS
        try:
            return plan_family(
                replace(inputs, share=share), calibration, spend=spend, on_progress=self._on_progress,
                limit=self._limit, checkpoint=self._checkpoint,
            )  # fmt: skip
        except Infeasible as error:
            raise Infeasible(_of_family(inputs.family, share, error), error.constraint) from error
        except UsageError as error:
            raise UsageError(_of_family(inputs.family, share, error)) from error


def _of_family(family: str, share: float, error: UsageError) -> str:
    return f"family {family!r}, with {share:.0%} of the device time: {error}"


def _check_together(families: Sequence[Inputs]) -> None:
    owners: dict[str, str] = {}
    for each in families:
        if each.goal.least is not None:
            raise UsageError(
                f"family {each.family!r} is to have the least {each.goal.least}, which is for one family at a time; "
                "give it an SLO without minimise, or plan it alone with --family"
            )
        for model in each.search.models:
            if model in owners:
                raise UsageError(
                    f"model {model!r} is in the search records of {owners[model]!r} and {each.family!r}, but a model "
                    "has one family; export it under another name for one of them"
                )
            owners[model] = each.family
        _top_per_s(each)


def _top_per_s(inputs: Inputs) -> float:
    """Rate, in rows per second, that a family has to reach."""
    highest = inputs.goal.max_rate_per_s or max((rate for rate, _ in inputs.prior or ()), default=0.0)
    if not highest:
        raise UsageError(
            f"family {inputs.family!r} names no rate, by which families share the devices; give it a max_rate_per_s, "
            "rate_prior, zipf or trace in the goal"
        )
    return highest


def _with_memory(families: Sequence[Inputs]) -> list[Inputs]:
    """Give each family its part of the memory, on endpoints that do not hold all models of all families."""
    first = families[0].cluster
    if all(endpoint.memory_bytes is None for endpoint in first.endpoints):
        return list(families)
    held = [_held_bytes(each) for each in families]
    shared = []
    for each, mine in zip(families, held, strict=True):
        endpoints = []
        for endpoint in first.endpoints:
            wanted = sum(others[endpoint.name] for others in held)
            memory = endpoint.memory_bytes
            if memory is not None and wanted > memory:
                memory = memory * mine[endpoint.name] // wanted
            endpoints.append(msgspec.structs.replace(endpoint, memory_bytes=memory))
        shared.append(replace(each, cluster=msgspec.structs.replace(first, endpoints=tuple(endpoints))))
    return shared


def _with_batches(families: Sequence[Inputs]) -> list[Inputs]:
    """Limit the batches of each family to what the others can wait for."""
    slos_s = {each.family: slo_of(each, _devices(each)) for each in families}
    limited = []
    for each in families:
        limit_s = _BATCH_SLO_FRAC * min(slo_s for family, slo_s in slos_s.items() if family != each.family)
        devices = _devices(each)
        largest = {name: _largest_within(name, each, devices, limit_s) for name in each.search.models}
        limited.append(replace(each, largest_batch=largest))
    return limited


def _largest_within(name: str, inputs: Inputs, devices: Mapping[str, Profile], limit_s: float) -> int:
    model = planned_model(name, devices, inputs.largest_batch[name])
    sizes = {2**power for power in range(model.max_batch.bit_length())} | {model.max_batch}
    within = [size for size in sizes if all(model.batch_busy_s(size, endpoint) <= limit_s for endpoint in devices)]
    return max(within, default=1)


def _devices(inputs: Inputs) -> dict[str, Profile]:
    """Profile of every endpoint."""
    models = inputs.search.models
    return check_fit(inputs.search, inputs.profiles, inputs.cluster, family=inputs.family, models=models)


def _held_bytes(inputs: Inputs) -> dict[str, int]:
    """Memory by endpoint that all models of a family take there, with an instance per slot."""
    devices = _devices(inputs)
    planned = {name: planned_model(name, devices, inputs.largest_batch[name]) for name in inputs.search.models}
    # the SLO says only which rows are slow where
    sites = make_sites(inputs.cluster, devices, planned, 1.0)
    return {
        room.name: room.slots * sum(part.memory_bytes[room.kind] for part in sites.parts)
        if room.memory_bytes is not None
        else 0
        for room in sites.rooms
    }


def _claim(inputs: Inputs, usual_share: float) -> Claim:
    """What a family could do with a share; its ladder is the one that it has with a usual one."""
    try:
        draft = Draft(replace(inputs, share=usual_share), _devices(inputs), None, TimeLimit(None), None)
    except Infeasible as error:
        raise Infeasible(f"family {inputs.family!r}: {error}", error.constraint) from error
    entries = draft.may_serve()
    top_per_s = _top_per_s(inputs)
    # without a prior as many rows at any rate as at any other
    prior = inputs.prior or tuple((top_per_s * (k + 0.5) / _RATES, 1.0 / (k + 0.5)) for k in range(_RATES))
    at_shares = [draft.at_share(parts / PARTS) for parts in range(1, PARTS + 1)]
    fluid = [[fluid_per_s(entry, device) for entry in entries] for device in at_shares]
    return Claim(
        family=inputs.family,
        weight=inputs.goal.weight,
        top_per_s=top_per_s,
        rates_per_s=np.array([rate for rate, _ in prior]),
        rows=np.array([rate * time for rate, time in prior]),
        accuracy=np.array([entry.accuracy or 0.0 for entry in entries]),
        carried_per_s=_KEPT_FRAC * inputs.goal.headroom * np.array(fluid),
        one_entry=WITH_ONE_ENTRY[inputs.policy] == inputs.policy,
    )


def _joined(made: Mapping[str, GearPlan], name: str) -> GearPlan:
    """One plan of the plans of all families, each of which has one layout."""
    families, digests = {}, {}
    instances: dict[str, dict[str, int]] = {}
    first = next(iter(made.values()))
    for family, plan in made.items():
        (layout,) = plan.layouts
        for endpoint, counts in layout.instances.items():
            here = instances.setdefault(endpoint, {})
            for part, count in counts.items():
                here[part] = max(count, here.get(part, 0))
        planned = plan.families[family]
        gears = tuple(msgspec.structs.replace(gear, layout=ALL) for gear in planned.gears)
        families[family] = msgspec.structs.replace(planned, gears=gears)
        for what, digest in plan.made_from.digests.items() if plan.made_from else ():
            digests[f"{what}.{family}" if what in _OWN else what] = digest
    return msgspec.structs.replace(
        first,
        name=name,
        families=families,
        layouts=(Layout(name=ALL, instances=instances),),
        made_from=first.made_from and msgspec.structs.replace(first.made_from, digests=dict(sorted(digests.items()))),
    )
