"""Patterns: the ways to fill one endpoint with instances.

Endpoints that are **alike** can be exchanged without a difference. So it is not asked what stands on each of them, but
how many of them take which pattern. Nothing is lost by that: endpoints with one pattern may share their rows evenly,
since what all of them can do on average, each can do. And the size of the question no longer grows with the endpoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cascadeserve.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from planner.placement_inputs import EndpointRoom, Instances, ModelLoad, Part

# of one endpoint; with more, counts between one instance and one per slot are left out
MOST_PATTERNS = 1024


@dataclass(frozen=True)
class Alike:
    """Endpoints of one kind of device, with the same slots and memory, on which the same stands (counts by part)."""

    kind: str
    slots: int
    memory_bytes: int | None
    standing: tuple[int, ...]
    names: tuple[str, ...]


def alike(endpoints: Sequence[EndpointRoom], parts: Sequence[Part], instances: Instances) -> list[Alike]:
    """Endpoints in groups, in the order of their first members."""
    members: dict[tuple[str, int, int | None, tuple[int, ...]], list[str]] = {}
    for endpoint in endpoints:
        there = instances.get(endpoint.name, {})
        standing = tuple(there.get(part.name, 0) for part in parts)
        members.setdefault((endpoint.kind, endpoint.slots, endpoint.memory_bytes, standing), []).append(endpoint.name)
    return [Alike(*key, tuple(names)) for key, names in members.items()]


def patterns(group: Alike, parts: Sequence[Part]) -> NDArray[np.int64]:
    """Instances [patterns, parts] that fit one endpoint, at most one per slot, none of them included.

    Where that is more than MOST_PATTERNS, a part has none, one or one per slot; then, none or one per slot.

    Raises:
        UsageError: even that is too many.

    """
    sizes = [part.memory_bytes.get(group.kind) for part in parts]
    for levels in (range(group.slots + 1), sorted({0, 1, group.slots}), (0, group.slots)):
        counts = _within(sizes, list(levels), group.memory_bytes)
        if counts is not None:
            return counts
    raise UsageError(
        f"{len(parts)} models can stand on endpoint {group.names[0]!r} in more than {MOST_PATTERNS} ways; "
        "place fewer models at once"
    )


def _within(sizes: Sequence[int | None], levels: list[int], limit: int | None) -> NDArray[np.int64] | None:
    """Patterns with these counts within a memory; None: too many."""
    counts, used = np.zeros((1, 0), np.int64), np.zeros(1, np.int64)
    for size in sizes:
        choices = np.array([0] if size is None else levels)
        added = np.tile(choices, len(counts))
        counts = np.column_stack((np.repeat(counts, len(choices), axis=0), added))
        used = np.repeat(used, len(choices)) + added * (size or 0)
        if limit is not None:
            counts, used = counts[used <= limit], used[used <= limit]
        if len(counts) > MOST_PATTERNS:
            return None
    return counts


def fullest(counts: NDArray[np.int64], group: Alike, parts: Sequence[Part]) -> NDArray[np.int64]:
    """Those of all patterns of a group that nothing can be added to: one of them is as good as any for the load."""
    used = used_bytes(counts, group.kind, parts)
    grows = np.zeros(len(counts), bool)
    for column, part in enumerate(parts):
        levels = np.unique(counts[:, column])
        place = np.searchsorted(levels, counts[:, column], side="right")
        more = levels[np.minimum(place, len(levels) - 1)] - counts[:, column]
        after = used + more * part.memory_bytes.get(group.kind, 0)
        grows |= (more > 0) & (True if group.memory_bytes is None else after <= group.memory_bytes)
    return counts[~grows]


def used_bytes(counts: NDArray[np.int64], kind: str, parts: Sequence[Part]) -> NDArray[np.int64]:
    """Memory of each pattern, in bytes [patterns]."""
    return counts @ np.array([part.memory_bytes.get(kind, 0) for part in parts], np.int64)


def hosting(
    counts: NDArray[np.int64], kind: str, models: Sequence[ModelLoad], parts: Sequence[Part]
) -> NDArray[np.bool_]:
    """Whether rows of each model can go to an endpoint with each pattern [patterns, models]."""
    column = {part.name: index for index, part in enumerate(parts)}
    return np.column_stack(
        [
            (counts[:, [column[part.name] for part in model.parts]] > 0).all(axis=1) & (kind in model.row_busy_s)
            for model in models
        ]
    )


def undominated(counts: NDArray[np.int64], costs: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether no other pattern has as many instances of everything for no higher cost [patterns]."""
    keeps = np.ones(len(counts), bool)
    for index in np.argsort(counts.sum(axis=1), kind="stable")[::-1]:
        others = keeps & (costs <= costs[index]) & (counts >= counts[index]).all(axis=1)
        others[index] = False
        keeps[index] = not others.any()
    return keeps
