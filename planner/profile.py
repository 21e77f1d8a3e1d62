"""The profile: how long the device of an endpoint is busy with a batch, per model, batch size and concurrency.

Busy time is in *slot-seconds per batch*. Let an endpoint have S slots, a model I instances on it, and let c batches of
b rows be kept in flight without a pause:

    c <= S      busy_s(b, c) = the time Triton counts for the execution of one batch (compute input + infer + output),
                mean over the window. Call overhead (transport, parsing, queueing) is not in it.
    c = S + 1   busy_s(b, c) = min(S, I) x window / batches completed in the window, so that by definition

                    completed batches per second = min(S, I) / busy_s(b, S + 1),

                with S = 1 simply 1 / busy_s. The batch that waits covers the call overhead of the one that is under
                way. busy_s then exceeds busy_s(b, 1) only by what the server itself does on the device's cores; and,
                for batches shorter than their call overhead, by the gaps that S + 1 in flight cannot fill.

So capacity is computed from concurrency S + 1, which is what the orchestrator keeps in flight under load; the latency
of a lone batch is overhead_s + busy_s(b, 1). What two models do to each other is in `pairs`.

A Triton ensemble is measured as a whole: its busy time is that of all the models it is composed of. What one instance
of those holds and how long it takes to load is in `parts`, since it is their instances that a layout counts.

A profile may be written by hand: only `schema_version`, `device_kind` and `models.<name>.busy` are needed, and of
`busy` only concurrency 1; what is missing is taken from the highest concurrency that is there.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Annotated, Literal

from msgspec import Meta, field

from cascadeserve.artefacts import Artefact, read_json
from cascadeserve.errors import InvalidArtefact
from cascadeserve.gear_plan import Count, Name, Seconds
from cascadeserve.policy.work import batch_work_s

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

Duration = Annotated[float, Meta(gt=0.0, le=1e6)]

# A larger batch may seem this much faster than a smaller one before the profile is refused. Batches of 1 and of 8 rows
# of a small model take the same time but for noise, and on shared cores windows of one cell were seen to differ by a
# factor of two; what is allowed here is smoothed by `busy_points`.
DIP_FRAC = 0.5


class Host(Artefact, frozen=True, kw_only=True):
    """The machine of the endpoint; it has no name."""

    cpu_model: str | None = None
    num_cores: Count | None = None
    memory_bytes: Count | None = None
    os: str | None = None
    python_version: str | None = None
    onnxruntime_version: str | None = None


class BusyEntry(Artefact, frozen=True, kw_only=True):
    """One cell: `concurrency` batches of `batch` rows in flight; `busy_s` as the module defines it.

    compute_s is Triton's execution time of one batch and wall_s the client's time from call to answer (both means over
    a window), which are kept beside it as evidence. busy_s is the median of the windows; spread_frac is half the
    distance of their quartiles as a share of it: near 0 on a machine of one's own.
    """

    batch: Count
    concurrency: Count
    busy_s: Duration
    compute_s: Duration | None = None
    wall_s: Duration | None = None
    spread_frac: Annotated[float, Meta(ge=0.0)] | None = None


class ModelProfile(Artefact, frozen=True, kw_only=True):
    """One model: `busy` ordered by concurrency, then batch.

    overhead_s is what a call costs beside the device: wall_s - busy_s at concurrency 1, median over the batch sizes.
    memory_bytes is what one instance holds on the device after it has run its largest batch; load_s is how long a load
    takes until the model is ready, warm-up included. null: not measured. Of an ensemble, `instances` are the fewest of
    any model that it is composed of; memory and load are those of its parts.
    """

    busy: Annotated[tuple[BusyEntry, ...], Meta(min_length=1)]
    overhead_s: Seconds = 0.0
    memory_bytes: Annotated[int, Meta(ge=0)] | None = None
    load_s: Seconds | None = None
    # instances that stood on the endpoint while this was measured
    instances: Count = 1
    digest: str | None = None
    backend: str | None = None
    # Triton's
    version: Count = 1
    # of an ensemble: its models, by version
    composed_of: dict[Name, Count] = field(default_factory=dict)

    @property
    def max_batch(self) -> int:
        """Largest batch size measured, in rows; nothing is known beyond it."""
        return max(entry.batch for entry in self.busy)

    def entries(self, concurrency: int) -> list[BusyEntry]:
        """Entries of a concurrency, by rising batch; beyond the highest that was measured, those of the highest."""
        highest = max(entry.concurrency for entry in self.busy)
        return [entry for entry in self.busy if entry.concurrency == min(concurrency, highest)]


class PartProfile(Artefact, frozen=True, kw_only=True):
    """A model that ensembles are composed of: memory of one instance and time of a load, as in `ModelProfile`."""

    memory_bytes: Annotated[int, Meta(ge=0)] | None = None
    load_s: Seconds | None = None
    instances: Count = 1
    backend: str | None = None


class PairEntry(Artefact, frozen=True, kw_only=True):
    """Two models side by side: `in_flight[i]` batches of `batches[i]` rows of `models[i]`, without a pause.

    `interval_s[i]` is the time from one completed batch of model i to its next while the other model runs too.
    """

    models: tuple[Name, Name]
    batches: tuple[Count, Count]
    in_flight: tuple[Count, Count] = (1, 1)
    interval_s: tuple[Duration, Duration]


class FrontCost(Artefact, frozen=True, kw_only=True):
    """What the orchestrator itself takes, on cores that are not the device's.

    Of one of its cores: request_s per request that comes in (parsing, queueing), answer_s per request that is answered,
    batch_s per batch sent to an endpoint, row_s per row of a batch. The requests that a batch completes are answered
    one after the other, once the next batch is on its way. path_s is latency that a request has beside that. Where
    load generator and orchestrator share a core, the generator's share of it belongs into request_s and answer_s.
    """

    request_s: Seconds = 0.0
    answer_s: Seconds = 0.0
    batch_s: Seconds = 0.0
    row_s: Seconds = 0.0
    path_s: Seconds = 0.0


class Profile(Artefact, frozen=True, kw_only=True):
    """Models by name from cheap to dear, all measured on one endpoint of a kind, with `slots` slots.

    `host` is null where the endpoint was not on the machine that measured; `repeats` is the number of windows behind
    each value. `front` is null where the orchestrator's own cost was not measured; it then counts as nothing.
    """

    schema_version: Literal[1]
    # the kind of the endpoint; the profile applies to all endpoints of this kind
    device_kind: Name
    slots: Count = 1
    server_version: str | None = None
    repeats: Count = 1
    host: Host | None = None
    models: Annotated[dict[Name, ModelProfile], Meta(min_length=1)]
    parts: dict[Name, PartProfile] = field(default_factory=dict)
    pairs: tuple[PairEntry, ...] = ()
    front: FrontCost | None = None

    def part(self, name: str) -> ModelProfile | PartProfile | None:
        """Find what has instances: a model, or a part of an ensemble."""
        return self.models.get(name) or self.parts.get(name)

    def instance_bytes(self, part: str) -> int | None:
        """Memory of an instance of a model, or of a part of an ensemble; None: not measured, or not in the profile."""
        found = self.part(part)
        return None if found is None else found.memory_bytes


def read_profile(path: Path) -> Profile:
    """Read and check a profile.

    Raises:
        InvalidArtefact: naming the field.

    """
    profile = read_json(path, Profile)
    check_profile(profile, path)
    return profile


def read_profiles(paths: Iterable[Path]) -> dict[str, Profile]:
    """Read and check profiles, one per kind of device; they are returned by kind, in the order given.

    Raises:
        InvalidArtefact: naming the field.

    """
    profiles: dict[str, Profile] = {}
    for path in paths:
        profile = read_profile(path)
        if profile.device_kind in profiles:
            raise InvalidArtefact(
                f"is {profile.device_kind!r}, of which another profile is given; give one per kind of device",
                path=path,
                field="$.device_kind",
            )
        profiles[profile.device_kind] = profile
    return profiles


def check_profile(profile: Profile, path: Path | None = None) -> None:
    """Refuse a profile that cannot be right; `path` is only for the error.

    Raises:
        InvalidArtefact: naming the field.

    """
    for where, problem in _problems(profile):
        raise InvalidArtefact(problem, path=path, field=where)


def _problems(profile: Profile) -> Iterator[tuple[str, str]]:
    for name, model in profile.models.items():
        yield from _busy_problems(model.busy, profile.slots, f"$.models.{name}.busy")
        if both := [part for part in model.composed_of if part in profile.models]:
            yield f"$.models.{name}.composed_of", f"names {both[0]!r}, which is measured as a model of its own"
    seen: set[frozenset[tuple[str, int]]] = set()
    for index, pair in enumerate(profile.pairs):
        at = f"$.pairs[{index}]"
        for model_name in pair.models:
            if model_name not in profile.models:
                yield f"{at}.models", f"names {model_name!r}, which is none of {', '.join(profile.models)}"
        if pair.models[0] == pair.models[1]:
            yield f"{at}.models", "names one model twice; a model beside itself is its own concurrency 2"
        cell = frozenset(zip(pair.models, pair.batches, strict=True))
        if cell in seen:
            yield at, "stands there twice"
        seen.add(cell)


def _busy_problems(busy: Sequence[BusyEntry], slots: int, at: str) -> Iterator[tuple[str, str]]:
    if busy[0].concurrency != 1:
        yield f"{at}[0].concurrency", "must be 1: entries are ordered by concurrency, then by batch size"
    slowest_s = 0.0
    for index, entry in enumerate(busy):
        before = busy[index - 1] if index else None
        if before is not None and (entry.concurrency, entry.batch) <= (before.concurrency, before.batch):
            yield f"{at}[{index}].batch", "must rise within a concurrency; each batch size stands there once"
        if entry.concurrency > slots + 1:
            yield f"{at}[{index}].concurrency", f"exceeds slots + 1 = {slots + 1}, which is all that is kept in flight"
        if before is None or entry.concurrency != before.concurrency:
            slowest_s = 0.0
        if entry.busy_s < slowest_s * (1.0 - DIP_FRAC):
            problem = (
                f"{entry.busy_s:g} s for {entry.batch} rows is more than {DIP_FRAC:.0%} below the {slowest_s:g} s of "
                "a smaller batch; the machine was disturbed: measure again with more repeats"
            )
            yield f"{at}[{index}].busy_s", problem
        slowest_s = max(slowest_s, entry.busy_s)


def busy_points(model: ModelProfile, concurrency: int) -> tuple[tuple[int, float], ...]:
    """(rows, busy_s) by rising rows, with busy times that never fall.

    They are the least-squares fit among sequences that never fall, so that noise moves them neither up nor down.
    """
    entries = model.entries(concurrency)
    smooth = _never_falling([entry.busy_s for entry in entries])
    return tuple((entry.batch, busy_s) for entry, busy_s in zip(entries, smooth, strict=True))


def _never_falling(values: Sequence[float]) -> list[float]:
    """Isotonic regression by pooling adjacent violators."""
    pools: list[tuple[float, int]] = []
    for value in values:
        total, count = value, 1
        while pools and pools[-1][0] / pools[-1][1] > total / count:
            total, count = total + pools[-1][0], count + pools[-1][1]
            pools.pop()
        pools.append((total, count))
    return [total / count for total, count in pools for _ in range(count)]


def batch_busy_s(model: ModelProfile, rows: int, concurrency: int) -> float:
    """Busy time, in slot-seconds, of one batch of `rows` rows: linear between the points, never falling.

    Below the smallest batch it is that one's; beyond the largest, its time per row.
    """
    # interpolated as in a plan, so that planner and orchestrator mean the same
    return batch_work_s(busy_points(model, concurrency), rows)


def planned_busy_points(profile: Profile, model: str) -> tuple[tuple[int, float], ...]:
    """Busy times for a `PlannedModel` of a gear plan: those under load, at concurrency slots + 1."""
    return busy_points(profile.models[model], profile.slots + 1)


def rows_per_s(profile: Profile, model: str, batch: int) -> float:
    """Rows per second that an endpoint completes when it does nothing but full batches of this size of one model."""
    measured = profile.models[model]
    executing = min(profile.slots, measured.instances)
    return executing * batch / batch_busy_s(measured, batch, profile.slots + 1)


def typical_spread_frac(profile: Profile) -> float:
    """Median over all entries of how far repeats of one entry lie apart (`BusyEntry.spread_frac`); 0 if unknown."""
    spreads = [entry.spread_frac for model in profile.models.values() for entry in model.busy]
    return statistics.median([spread for spread in spreads if spread is not None] or [0.0])


def work_rate(profile: Profile, pair: PairEntry) -> float:
    """Slot-seconds of work done per second and slot while two models run side by side.

    1: they share the device without loss; less: they hinder each other; more: one uses what the other leaves idle.
    Work is what the same batches cost each model alone under load.
    """
    alone_s = (
        batch_busy_s(profile.models[name], rows, profile.slots + 1)
        for name, rows in zip(pair.models, pair.batches, strict=True)
    )
    return sum(busy_s / interval_s for busy_s, interval_s in zip(alone_s, pair.interval_s, strict=True)) / profile.slots
