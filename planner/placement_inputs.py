"""What a placement is made from: the room that endpoints have, the memory and the work that models take.

A **part** is a model as Triton loads it: it has instances, which hold memory. A **model** is what rows go to: one part,
or the parts of a Triton ensemble, which stand together and may belong to several ensembles. Instances belong to parts,
work belongs to models. A **load** is what a gear makes of the rows that enter; one placement may have to carry several,
one at a time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

# of parts, by endpoint and part; what is not named does not stand
Instances = Mapping[str, Mapping[str, int]]


@dataclass(frozen=True, kw_only=True)
class EndpointRoom:
    """An endpoint: its kind of device, the batches it runs at full speed, the memory for instances (None: no limit)."""

    name: str
    kind: str
    slots: int = 1
    memory_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Part:
    """What one instance holds, in bytes, and how long it loads, in seconds, by kind of device.

    It cannot stand on a kind that `memory_bytes` leaves out. A load time that is left out counts as none.
    """

    name: str
    memory_bytes: Mapping[str, int]
    load_s: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ModelLoad:
    """A model and what comes to it: `reach` rows for each row that enters.

    row_busy_s is what one row keeps a slot busy, in slot-seconds by kind of device, in batches of the size and at the
    concurrency that are really met; of an ensemble the sum over its parts. Rows cannot go to a kind that is left out.
    The model stands on at least `min_hosts` endpoints, even where no row reaches it.
    """

    name: str
    parts: tuple[Part, ...]
    row_busy_s: Mapping[str, float]
    reach: float = 1.0
    min_hosts: int = 1

    def stands(self, counts: Mapping[str, int], kind: str) -> bool:
        """Whether rows can go to an endpoint with these instances."""
        return kind in self.row_busy_s and all(counts.get(part.name, 0) > 0 for part in self.parts)

    def one_bytes(self, kind: str) -> int | None:
        """Memory of one instance of each part on a kind of device; None: it cannot stand there."""
        if kind not in self.row_busy_s or any(kind not in part.memory_bytes for part in self.parts):
            return None
        return sum(part.memory_bytes[kind] for part in self.parts)


@dataclass(frozen=True)
class Load:
    """Rows per second that enter, and what comes to each model: that of one gear at its highest rate, say."""

    rate_per_s: float
    models: tuple[ModelLoad, ...]


@dataclass(frozen=True)
class Problem:
    """Endpoints and the loads that they have to carry, one at a time.

    Raises:
        ValueError: a name is used twice, or for two different things.

    """

    endpoints: tuple[EndpointRoom, ...]
    loads: tuple[Load, ...]

    def __post_init__(self) -> None:
        """Check the names."""
        for names in ([each.name for each in self.endpoints], *([m.name for m in load.models] for load in self.loads)):
            if len(set(names)) != len(names):
                raise ValueError(f"a name is used twice in {', '.join(names)}")
        for model in (model for load in self.loads for model in load.models):
            first = next(each for each in self.models if each.name == model.name)
            if (model.parts, model.min_hosts, set(model.row_busy_s)) != (
                first.parts, first.min_hosts, set(first.row_busy_s),
            ):  # fmt: skip
                raise ValueError(f"model {model.name!r} has other parts, hosts or kinds of device in another load")

    @cached_property
    def models(self) -> tuple[ModelLoad, ...]:
        """All models, each once, as the first load with it has it."""
        known: dict[str, ModelLoad] = {}
        for load in self.loads:
            for model in load.models:
                known.setdefault(model.name, model)
        return tuple(known.values())

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        """All parts, each once."""
        return distinct_parts(part for load in self.loads for model in load.models for part in model.parts)


def distinct_parts(parts: Iterable[Part]) -> tuple[Part, ...]:
    """Each part once, in the order of first mention.

    Raises:
        ValueError: two different parts have one name.

    """
    known: dict[str, Part] = {}
    for part in parts:
        if known.setdefault(part.name, part) != part:
            raise ValueError(f"part {part.name!r} is given twice, with other memory or load times")
    return tuple(known.values())
