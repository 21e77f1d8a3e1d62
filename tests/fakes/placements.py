"""Endpoints and models for tests of placement: sizes are small numbers, work is the share of a slot at 1 row/s."""

from __future__ import annotations

from planner.placement_inputs import EndpointRoom, Load, ModelLoad, Part


def room(name: str, memory_bytes: int | None = None, *, slots: int = 1, kind: str = "gpu") -> EndpointRoom:
    return EndpointRoom(name=name, kind=kind, slots=slots, memory_bytes=memory_bytes)


def part(name: str, memory_bytes: int = 1, *, load_s: float = 1.0) -> Part:
    kinds = ("gpu", "cpu")
    return Part(name=name, memory_bytes=dict.fromkeys(kinds, memory_bytes), load_s=dict.fromkeys(kinds, load_s))


def model(
    name: str,
    work: float,
    memory_bytes: int = 1,
    *,
    cpu_work: float | None = None,
    min_hosts: int = 1,
    parts: tuple[Part, ...] = (),
) -> ModelLoad:
    """A model that keeps a slot of a GPU busy for `work` seconds per row that enters (0: none comes); `cpu_work`: it
    runs on CPUs too.
    """
    busy = {"gpu": work} | ({} if cpu_work is None else {"cpu": cpu_work})
    reach = 1.0 if work else 0.0
    return ModelLoad(
        name=name, parts=parts or (part(name, memory_bytes),), row_busy_s=busy, reach=reach, min_hosts=min_hosts
    )


def load(rate_per_s: float, *models: ModelLoad) -> Load:
    return Load(rate_per_s, models)
