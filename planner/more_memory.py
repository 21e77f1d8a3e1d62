"""How much memory endpoints may have so that it makes a difference."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import msgspec

from planner.at_share import planned_model
from planner.fits import check_fit
from planner.layouts import make_sites

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from cascadeserve.cluster import Endpoint
    from planner.inputs import Inputs

# sizes are rounded up to so many digits that count; sums of them on the way to more, as there may be very many
_DIGITS = 3
_DIGITS_OF_SUMS = 5


def memory_sizes(inputs: Inputs, endpoints: Sequence[Endpoint]) -> list[int]:
    """Bytes with which one of some endpoints holds what it does not hold now, rising; the last ones hold everything."""
    models = inputs.search.models
    devices = check_fit(inputs.search, inputs.profiles, inputs.cluster, family=inputs.family, models=models)
    planned = {name: planned_model(name, devices, inputs.largest_batch[name]) for name in models}
    # the SLO says only which rows are slow where
    parts = make_sites(inputs.cluster, devices, planned, 1.0).parts
    found: set[int] = set()
    for kind, slots in {(endpoint.kind, endpoint.slots) for endpoint in endpoints}:
        sums = {0}
        for part in parts:
            size = part.memory_bytes.get(kind, 0)
            sums = {_rounded_up(held + count * size, _DIGITS_OF_SUMS) for held in sums for count in range(slots + 1)}
        found |= {_rounded_up(size, _DIGITS) for size in sums}
    least = min(endpoint.memory_bytes or 0 for endpoint in endpoints)
    return sorted(size for size in found if size > least)


def with_memory(endpoints: Sequence[Endpoint], names: Collection[str], least_bytes: int) -> tuple[Endpoint, ...]:
    """Endpoints of which those that are named have at least so much memory."""
    return tuple(
        msgspec.structs.replace(each, memory_bytes=max(each.memory_bytes or 0, least_bytes))
        if each.name in names
        else each
        for each in endpoints
    )


def _rounded_up(size: int, digits: int) -> int:
    place: int = 10 ** max(math.floor(math.log10(size or 1)) - digits + 1, 0)
    return -(-size // place) * place
