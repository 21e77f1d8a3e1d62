"""Two families for the same devices: those of `tests.fakes.planned`, the second under other names."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec

from planner.records import SearchRecords
from tests.fakes.planned import inputs, profile, records

if TYPE_CHECKING:
    from planner.inputs import Inputs
    from planner.profile import Profile
    from planner.records import Records

FAMILIES = ("tiny", "other")
OTHER_MODELS = {"small": "little", "large": "big"}


def other_records(kind: type[Records] = SearchRecords, rows: int = 6000, seed: int = 2) -> Any:
    """Records of the second family."""
    found = records(kind, rows, seed)
    models = {OTHER_MODELS[name]: answers for name, answers in found.models.items()}
    return replace(found, family="other", models=models)


def both_profile(**changes: Any) -> Profile:
    """A profile that holds the models of both."""
    one = profile()
    models = one.models | {OTHER_MODELS[name]: model for name, model in one.models.items()}
    return msgspec.structs.replace(one, **({"models": models} | changes))


def both_inputs(tiny: dict[str, Any], other: dict[str, Any], **shared: Any) -> list[Inputs]:
    """Inputs of both, with changes of the goal of each, and of what they share."""
    first = inputs(profiles={"cpu": both_profile()}, **shared)
    second = replace(
        first, family="other", search=other_records(), largest_batch=dict.fromkeys(OTHER_MODELS.values(), 32)
    )
    return [
        replace(each, goal=msgspec.structs.replace(each.goal, **changes))
        for each, changes in ((first, tiny), (second, other))
    ]
