"""Why models cannot be placed, and the smallest change after which they can.

Asked in this order, since each answer makes the next pointless: is there a model that has not enough endpoints which
could hold it alone? Would more memory do, and how little? If not even memory without limit would, there is more work
than the devices can do: what rate do they carry, and how many more would carry this one?
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import numpy as np

from planner.patterns import alike, fullest, patterns, used_bytes
from planner.placement_program import Program

if TYPE_CHECKING:
    from collections.abc import Mapping

    from planner.placement_inputs import ModelLoad, Problem


@dataclass(frozen=True, kw_only=True)
class Unplaced:
    """What binds and what would lift it, in words and in figures.

    short_bytes is the least memory that is missing, within a thousandth, by endpoint. feasible_frac is the largest
    share of all rates that could be placed with what there is; None where none could. added is the fewest endpoints
    that would do, by the name of one that they are like.
    """

    binding: Literal["model", "memory", "work"]
    sentence: str
    short_bytes: Mapping[str, int] = field(default_factory=dict)
    feasible_frac: float | None = None
    added: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.sentence


def why_unplaced(problem: Problem, most_utilisation: float) -> Unplaced:
    """Explain a problem that has no placement."""
    for model in problem.models:
        alone = _fits_too_rarely(model, problem)
        if alone is not None:
            return alone
    frac = _feasible_frac(problem, most_utilisation)
    return _memory_short(problem, most_utilisation, frac) or _too_much_work(problem, most_utilisation, frac)


def _fits_too_rarely(model: ModelLoad, problem: Problem) -> Unplaced | None:
    """Whether a model, had it all memory for itself, would stand on too few endpoints."""
    missing: dict[str, int] = {}
    for endpoint in problem.endpoints:
        size = model.one_bytes(endpoint.kind)
        if size is not None:
            missing[endpoint.name] = 0 if endpoint.memory_bytes is None else max(size - endpoint.memory_bytes, 0)
    if len(missing) < model.min_hosts:
        kinds = ", ".join(sorted({endpoint.kind for endpoint in problem.endpoints})) or "none"
        return Unplaced(
            binding="model",
            sentence=f"model {model.name!r} is to stand on {_endpoints(model.min_hosts)}, but it is known how it runs "
            f"on {len(missing)} of the {len(problem.endpoints)}; profile it on their devices ({kinds}), or add some",
        )
    fewest = sorted(missing, key=lambda name: missing[name])[: model.min_hosts]
    short_bytes = {name: missing[name] for name in fewest if missing[name]}
    if not short_bytes:
        return None
    return Unplaced(
        binding="model",
        sentence=f"model {model.name!r} is to stand on {_endpoints(model.min_hosts)}, but fits on "
        f"{model.min_hosts - len(short_bytes)}; give {_bytes(short_bytes)} more memory, or leave the model out",
        short_bytes=short_bytes,
    )


def _feasible_frac(problem: Problem, most_utilisation: float) -> float | None:
    groups = alike(problem.endpoints, problem.parts, {})
    full = [fullest(patterns(group, problem.parts), group, problem.parts) for group in groups]
    choice = Program(problem, groups, full, most_utilisation).solve(free="rate")
    return None if choice is None else choice.scale


def _memory_short(problem: Problem, most_utilisation: float, frac: float | None) -> Unplaced | None:
    """Whether more memory would do."""
    groups = alike(problem.endpoints, problem.parts, {})
    endless = [patterns(replace(group, memory_bytes=None), problem.parts) for group in groups]
    short = [
        np.zeros(len(counts), np.int64)
        if group.memory_bytes is None
        else np.maximum(used_bytes(counts, group.kind, problem.parts) - group.memory_bytes, 0)
        for group, counts in zip(groups, endless, strict=True)
    ]
    unit = max(each.max(initial=1) for each in short)
    choice = Program(problem, groups, endless, most_utilisation).solve([each / unit for each in short])
    if choice is None:
        return None
    short_bytes: dict[str, int] = {}
    for group, taken, each in zip(groups, choice.taken, short, strict=True):
        wants = np.repeat(each, taken)
        short_bytes |= {name: int(want) for name, want in zip(group.names, wants, strict=True) if want}
    if not short_bytes:
        return None
    need = "all models are to stand" if frac is None else f"{_rates(problem)} to be carried"
    lower = "" if frac is None else f", or {_lower(problem, frac)}"
    return Unplaced(
        binding="memory",
        sentence=f"{sum(short_bytes.values()):,} bytes of memory are missing if {need}; "
        f"give {_bytes(short_bytes)} more{lower}",
        short_bytes=short_bytes,
        feasible_frac=frac,
    )


def _too_much_work(problem: Problem, most_utilisation: float, frac: float | None) -> Unplaced:
    groups = alike(problem.endpoints, problem.parts, {})
    full = [fullest(patterns(group, problem.parts), group, problem.parts) for group in groups]
    choice = Program(problem, groups, full, most_utilisation).solve(free="endpoints")
    assert choice is not None, "every model fits somewhere"
    added = {group.names[0]: number for group, number in zip(groups, choice.added, strict=True) if number}
    more = " and ".join(f"{_endpoints(number)} like {name!r}" for name, number in added.items())
    changes = [*([] if frac is None else [_lower(problem, frac)]), *([f"add {more}"] if more else [])]
    return Unplaced(
        binding="work",
        sentence=f"{_rates(problem)} more work than the {_endpoints(len(problem.endpoints))} can do at "
        f"{most_utilisation:.0%} utilisation; {', or '.join(changes)}",
        feasible_frac=frac,
        added=added,
    )


def _rates(problem: Problem) -> str:
    return f"{problem.loads[0].rate_per_s:g} rows/s are" if len(problem.loads) == 1 else "the loads are"


def _lower(problem: Problem, frac: float) -> str:
    if len(problem.loads) == 1:
        return f"lower the rate to {frac * problem.loads[0].rate_per_s:.4g} rows/s"
    return f"lower all rates to {frac:.1%} of theirs"


def _endpoints(number: int) -> str:
    return f"{number} endpoint{'s'[: number != 1]}"


def _bytes(short_bytes: Mapping[str, int]) -> str:
    return " and ".join(f"endpoint {name!r} {size:,} bytes" for name, size in short_bytes.items())
