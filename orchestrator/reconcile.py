"""Which steps lead from the instances that stand to those that a layout wants. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class Step:
    """Bring `model` at `endpoint` from `present` to `wanted` instances; 0 means not loaded."""

    endpoint: str
    model: str
    present: int
    wanted: int

    @property
    def grows(self) -> bool:
        """Whether it adds capacity: such steps are awaited before the layout's gears are used."""
        return self.wanted > self.present


def steps(
    observed: Mapping[str, Mapping[str, int]], desired: Mapping[str, Mapping[str, int]]
) -> tuple[list[Step], list[Step]]:
    """(growing, shrinking) steps over the endpoints in `observed`, which leaves out those that are down."""
    growing: list[Step] = []
    shrinking: list[Step] = []
    for endpoint, present in observed.items():
        wanted = desired.get(endpoint, {})
        for model in sorted(present.keys() | wanted.keys()):
            step = Step(endpoint, model, present.get(model, 0), wanted.get(model, 0))
            if step.grows:
                growing.append(step)
            elif step.wanted < step.present:
                shrinking.append(step)
    return growing, shrinking
