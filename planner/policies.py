"""Policies: which ladder entries a plan may use, and how many of them.

| policy | entries | at once |
|---|---|---|
| cascade | the ladder | any number: a gear for every range of rates |
| static-cascade | the ladder | one cascade for all rates |
| switching | single models | any number |
| single | single models | one model for all rates |
| reference | the most accurate model | that one |

Where one entry serves all rates, it is the most accurate one that reaches the rate that the goal asks for; if it asks
for none, the one that goes furthest.

All but the first are what other systems do, made by the same planner from other candidates. The ladder of `cascade`
holds the entries of all the others. And the gears of the others are built beside its own, which are kept only if none
of those go to a higher rate, or as far and answer more rows rightly. So by its own prediction a cascade plan is never
worse than the plan of another policy.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Literal, get_args

from cascadeserve.gear_plan import Stage
from planner.expected import accuracy_over_rows, top_rate_per_s
from planner.gears import build_gears
from planner.infeasible import Infeasible
from planner.ladder import ladder
from planner.search import evaluate, search

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from cascadeserve.gear_plan import Gear, LadderEntry
    from planner.gears import Option
    from planner.goal import FamilyGoal, RatePrior
    from planner.predict import Predictor
    from planner.records import SearchRecords
    from planner.search import Candidate
    from planner.time_limit import TimeLimit
    from planner.triggers import Tuned

Policy = Literal["cascade", "static-cascade", "switching", "single", "reference"]
POLICIES: tuple[Policy, ...] = get_args(Policy)
# the same candidates, of which one serves all rates
WITH_ONE_ENTRY: dict[Policy, Policy] = {
    "cascade": "static-cascade",
    "static-cascade": "static-cascade",
    "switching": "single",
    "single": "single",
    "reference": "reference",
}


def policy_ladder(
    policy: Policy, records: SearchRecords, row_work_s: Mapping[str, float], *, reference: str, size: int, floor: float
) -> tuple[LadderEntry, ...]:
    """Entries that a policy may use, from dear to cheap; `size` and `floor` are for `planner.ladder.ladder`.

    That of the cascades holds those of the single models, also the ones that some cascade beats: where the simulator
    finds more than the work tells, a single model may still be the better one.
    """
    alone = [evaluate(records, [Stage(model=name)], row_work_s) for name in row_work_s]
    if policy == "reference":
        alone = [candidate for candidate in alone if candidate.stages[0].model == reference]
    # one place is left for the most accurate cascade
    singles = ladder(alone, reference=reference, size=size - 1, floor=floor)
    if policy not in {"cascade", "static-cascade"}:
        return singles
    candidates = _searched(records, tuple(row_work_s.items()))
    return ladder(candidates, reference=reference, size=size, floor=floor, also=[entry.stages for entry in singles])


@functools.lru_cache(maxsize=4)
def _searched(records: SearchRecords, row_work_s: tuple[tuple[str, float], ...]) -> list[Candidate]:
    # drafts that differ in their rates or endpoints only have the same candidates
    return search(records, dict(row_work_s))


def policy_gears(
    policy: Policy,
    options: Sequence[Option],
    goal: FamilyGoal,
    prior: RatePrior | None,
    predictor: Predictor,
    *,
    layout: str,
    overload: Tuned | None,
    limit: TimeLimit,
    compare: bool = True,
) -> list[Gear]:
    """Gears of a policy, at least as good as those of every policy with fewer candidates.

    Without `compare` those are not built: where it is not accuracy that the gears are chosen for.

    Raises:
        Infeasible: as in `build_gears`.

    """
    singles = [option for option in options if len(option.tuned[0].entry.stages) == 1]
    tries: list[tuple[Sequence[Option], bool]] = [(options, WITH_ONE_ENTRY[policy] == policy)]
    if compare and policy in {"cascade", "switching"}:
        tries.append((options, True))
    if compare and policy == "cascade":
        tries += [(singles, False), (singles, True)]
    found: list[list[Gear]] = []
    refused: Infeasible | None = None
    for candidates, one_entry in tries:
        if found and limit.reached:
            limit.leave_out("the comparison with plans of fewer candidates")
            break
        if not candidates:
            continue
        try:
            found.append(
                build_gears(candidates, goal, prior, predictor, layout=layout, overload=overload, one_entry=one_entry)
            )
        except Infeasible as error:
            refused = refused or error
    if refused is not None and not found:
        raise refused
    entries = [option.tuned[0].entry for option in options] + ([overload.entry] if overload else [])
    return max(found, key=lambda gears: (top_rate_per_s(gears), accuracy_over_rows(gears, entries, prior)))
