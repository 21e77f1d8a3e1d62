"""Profiling: measure, through a running Triton, what `planner.profile` defines.

A *cell* is one model at one batch size and concurrency, or two models side by side. A cell is visited for a short
window in which its batches are kept in flight by closed loops. A *repeat* visits every cell once, in an order of its
own. So a disturbance of some seconds (another tenant of the machine) hits one repeat of many cells instead of all
repeats of one cell. The profile holds the median over the repeats: what a machine does half of the time is what can be
planned with, and a core whose sibling others use now and then has no one speed.

Every finished repeat is kept beside the output; an interrupted run goes on with the next one.
"""

from __future__ import annotations

import asyncio
import itertools
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import msgspec
import numpy as np

from cascadeserve.artefacts import Artefact, digest_bytes, read_json, write_json
from cascadeserve.errors import CascadeServeError, InvalidArtefact, UsageError
from planner.profile import BusyEntry, ModelProfile, PairEntry

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from planner.triton_calls import Executions, ServedModel

# Calls of a cell that take turns, so that not every batch holds the same rows.
VARIANTS = 4
_UNLOAD_TIMEOUT_S = 20.0
_POLL_S = 0.05


class Measurable(Protocol):
    """What profiling needs of a server; `triton_calls.TritonCalls` is the real one."""

    async def send(self, request: bytes) -> bytes:
        """Run one encoded call."""

    async def executions(self, model: str) -> Executions:
        """The server's counters of a model."""

    async def is_gone(self, model: str) -> bool:
        """Whether an unload has come to its end."""

    async def load(self, model: str) -> None:
        """Load a model and wait until it is ready."""

    async def unload(self, model: str) -> None:
        """Begin to unload a model."""


@dataclass(frozen=True)
class Effort:
    """How long to measure: `repeats` windows per cell, each of at least `window_s` and `min_batches` per model.

    After `budget_s` no further repeat is begun (null: all are done); at least one always is.
    """

    repeats: int
    window_s: float
    min_batches: int
    budget_s: float | None = None


THOROUGH = Effort(repeats=5, window_s=0.3, min_batches=8)
# All of four small models in less than a minute.
QUICK = Effort(repeats=5, window_s=0.05, min_batches=3, budget_s=40.0)


class Cell(Artefact, frozen=True, kw_only=True):
    """What is kept in flight: `in_flight[i]` batches of `batches[i]` rows of `models[i]`, for one or two models."""

    models: tuple[str, ...]
    batches: tuple[int, ...]
    in_flight: tuple[int, ...]


class Visit(Artefact, frozen=True, kw_only=True):
    """One window of a cell, per model: seconds per completed batch, Triton's and the client's seconds of one batch."""

    interval_s: tuple[float, ...]
    compute_s: tuple[float, ...]
    wall_s: tuple[float, ...]


class Progress(Artefact, frozen=True, kw_only=True):
    """Finished repeats, each with one visit per cell; `key` digests all that they depend on."""

    key: str
    repeats: list[list[Visit]]


def plan_cells(served: Sequence[ServedModel], batches: Sequence[int], *, slots: int, pair_batches: int) -> list[Cell]:
    """Every model at every batch size it takes and concurrency 1 to slots + 1, then every pair at slots + 1.

    Pairs are measured with the same batch size for both models: the middle one of those that both take, and with
    `pair_batches` 2 also the largest.

    Raises:
        UsageError: a model cannot be profiled, or takes none of the batch sizes.

    """
    sizes = {model.name: _sizes(model, batches) for model in served}
    cells = [
        Cell(models=(model,), batches=(batch,), in_flight=(concurrency,))
        for model, taken in sizes.items()
        for concurrency in range(1, slots + 2)
        for batch in taken
    ]
    for first, second in itertools.combinations(sizes, 2):
        both = [batch for batch in sizes[first] if batch in sizes[second]]
        chosen = {both[(len(both) - 1) * step // 2] for step in range(1, pair_batches + 1)}
        # slots + 1 are in flight together; the cheaper model has the odd one
        flying = (slots + 1 - (slots + 1) // 2, (slots + 1) // 2)
        cells += [Cell(models=(first, second), batches=(b, b), in_flight=flying) for b in sorted(chosen)]
    return cells


def _sizes(model: ServedModel, batches: Sequence[int]) -> list[int]:
    if model.dynamic_batching:
        where = f"a model that {model.name!r} is composed of" if model.composed_of else repr(model.name)
        raise UsageError(
            f"--model: {where} has a dynamic_batching block, so that Triton joins the batches that are to be "
            "measured; take it out of its config.pbtxt (the orchestrator batches)"
        )
    taken = sorted({batch for batch in batches if batch <= model.max_batch})
    if not taken:
        raise UsageError(f"--batches: model {model.name!r} takes at most {model.max_batch} rows, all sizes are larger")
    return taken


@dataclass(frozen=True)
class Profiler:
    """Measures cells on one server; `requests(model, batch)` gives a few encoded calls of that batch size."""

    server: Measurable
    requests: Callable[[str, int], list[bytes]]
    effort: Effort

    async def repeat_all(
        self, cells: Sequence[Cell], *, key: str, checkpoint: Path, on_visit: Callable[[], None]
    ) -> list[list[Visit]]:
        """All repeats of all cells: those of an interrupted run with the same key, then new ones.

        `on_visit` is called once for every visit, old or new.
        """
        repeats = _read_progress(checkpoint, key, len(cells))[: self.effort.repeats]
        for _ in range(len(repeats) * len(cells)):
            on_visit()
        await self._warm_up(cells)
        clock = asyncio.get_running_loop().time
        began_s = clock()
        lasted_s = 0.0
        budget_s = self.effort.budget_s
        while len(repeats) < self.effort.repeats:
            if repeats and budget_s is not None and clock() - began_s + lasted_s > budget_s:
                break
            started_s = clock()
            visits: dict[int, Visit] = {}
            for index in np.random.default_rng(len(repeats)).permutation(len(cells)).tolist():
                visits[index] = await self.visit(cells[index])
                on_visit()
            repeats.append([visits[index] for index in range(len(cells))])
            lasted_s = clock() - started_s
            write_json(checkpoint, Progress(key=key, repeats=repeats))
        return repeats

    async def _warm_up(self, cells: Sequence[Cell]) -> None:
        """Run every shape once: the first batch of a size allocates memory and may choose kernels."""
        for model, batch in sorted({(c.models[0], c.batches[0]) for c in cells if len(c.models) == 1}):
            await self.server.send(self.requests(model, batch)[0])

    async def visit(self, cell: Cell) -> Visit:
        """One window of a cell.

        Raises:
            CascadeServeError: a call failed, or the server counts batches that are not ours.

        """
        streams = [
            _Stream(itertools.cycle(self.requests(model, batch)), in_flight)
            for model, batch, in_flight in zip(cell.models, cell.batches, cell.in_flight, strict=True)
        ]
        for stream in streams:
            # caches hold the last cell's weights; this one's window begins with its own
            await self.server.send(next(stream.requests))
        before = [await self.server.executions(model) for model in cell.models]
        began_s, stopped_s = await self._keep_in_flight(streams)
        after = [await self.server.executions(model) for model in cell.models]
        compute_s = []
        for model, stream, earlier, later in zip(cell.models, streams, before, after, strict=True):
            count = later.count - earlier.count
            # Triton counts a batch a moment after it has answered it, so a few may be missing or left over
            if count <= 0:
                raise CascadeServeError(f"Triton counted no batch of {model!r}: was it reloaded meanwhile? try again")
            if count > len(stream.done) + stream.in_flight + 1:
                raise CascadeServeError(
                    f"Triton ran {count} batches of {model!r} where {len(stream.done)} were sent: something else uses "
                    "the endpoint; stop it and profile again"
                )
            compute_s.append((later.compute_s - earlier.compute_s) / count)
        alone = len(streams) == 1
        return Visit(
            interval_s=tuple(
                stream.interval_drained_s(began_s) if alone else stream.interval_before_s(began_s, stopped_s)
                for stream in streams
            ),
            compute_s=tuple(compute_s),
            wall_s=tuple(statistics.fmean(end - start for start, end in stream.done) for stream in streams),
        )

    async def _keep_in_flight(self, streams: Sequence[_Stream]) -> tuple[float, float]:
        """Keep all streams going for a window; returns when it began and from when on no new batch was sent."""
        clock = asyncio.get_running_loop().time
        began_s = clock()
        # filled by whichever batch completes the window; batches in flight then still end
        stopped_s: list[float] = []

        async def one_in_flight(stream: _Stream) -> None:
            while not stopped_s:
                started_s = clock()
                await self.server.send(next(stream.requests))
                ended_s = clock()
                stream.done.append((started_s, ended_s))
                full = all(len(each.done) >= max(self.effort.min_batches, each.in_flight) for each in streams)
                if full and ended_s - began_s >= self.effort.window_s:
                    stopped_s.append(ended_s)

        tasks = [
            asyncio.create_task(one_in_flight(stream), name="profile")
            for stream in streams
            for _ in range(stream.in_flight)
        ]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return began_s, stopped_s[0]

    async def measure_reload(
        self,
        model: str,
        largest_batch: int,
        resident_bytes: Callable[[], int | None],
        *,
        part: str | None = None,
        ensembles: Sequence[str] = (),
    ) -> tuple[float, int | None]:
        """Unload a model and load it again: (load_s, bytes that were free in between, None where unreadable).

        With `part` it is this part of the ensemble `model` instead. Triton takes every ensemble out of service when a
        part of it is unloaded; `ensembles` are all of these, to be loaded again.
        """
        await self.server.send(self.requests(model, largest_batch)[0])
        model = part or model
        loaded_bytes = resident_bytes()
        clock = asyncio.get_running_loop().time
        await self.server.unload(model)
        try:
            await self._until_gone(model)
            free_bytes = resident_bytes()
        finally:
            # also after Ctrl-C, when it may still be on its way out: the server is left as it was found
            await self._until_gone(model)
            started_s = clock()
            await self.server.load(model)
            load_s = clock() - started_s
            for ensemble in ensembles:
                await self.server.load(ensemble)
        if loaded_bytes is None or free_bytes is None:
            return load_s, None
        return load_s, max(loaded_bytes - free_bytes, 0)

    async def _until_gone(self, model: str) -> None:
        give_up_s = asyncio.get_running_loop().time() + _UNLOAD_TIMEOUT_S
        while not await self.server.is_gone(model):
            if asyncio.get_running_loop().time() > give_up_s:
                raise CascadeServeError(f"{model!r} was not unloaded within {_UNLOAD_TIMEOUT_S:g} s; is it in use?")
            await asyncio.sleep(_POLL_S)


class _Stream:
    """Batches of one model, `in_flight` at a time; `done` holds (start, end) of each in the order of their ends."""

    def __init__(self, requests: itertools.cycle[bytes], in_flight: int) -> None:
        self.requests = requests
        self.in_flight = in_flight
        self.done: list[tuple[float, float]] = []

    def interval_drained_s(self, began_s: float) -> float:
        """Seconds per batch, from the start to the end of the last: no batch is counted in part."""
        return (self.done[-1][1] - began_s) / len(self.done)

    def interval_before_s(self, began_s: float, stopped_s: float) -> float:
        """Seconds per batch, of those that ended while the other model was still being sent batches."""
        ends = [end for _, end in self.done if end <= stopped_s]
        return (ends[-1] - began_s) / len(ends)


def progress_key(*parts: object) -> str:
    """Digest of all that repeats depend on."""
    return digest_bytes(msgspec.json.encode(parts))


def _read_progress(path: Path, key: str, num_cells: int) -> list[list[Visit]]:
    """Repeats of an interrupted run; none if they were of something else or cannot be read."""
    if not path.exists():
        return []
    try:
        progress = read_json(path, Progress)
    except InvalidArtefact:
        return []
    return progress.repeats if progress.key == key and all(len(r) == num_cells for r in progress.repeats) else []


def model_profile(
    served: ServedModel, cells: Sequence[Cell], repeats: Sequence[Sequence[Visit]], *, slots: int
) -> ModelProfile:
    """Busy times and overhead of one model, from its cells."""
    entries = []
    for index, cell in enumerate(cells):
        if cell.models != (served.name,):
            continue
        visits = [repeat[index] for repeat in repeats]
        concurrency = cell.in_flight[0]
        executing = min(slots, served.instances)
        busy_s = [executing * visit.interval_s[0] if concurrency > slots else visit.compute_s[0] for visit in visits]
        typical_s = _typical(busy_s)
        entries.append(
            BusyEntry(
                batch=cell.batches[0],
                concurrency=concurrency,
                busy_s=typical_s,
                compute_s=_typical([visit.compute_s[0] for visit in visits]),
                wall_s=_typical([visit.wall_s[0] for visit in visits]),
                spread_frac=_half_range(busy_s) / typical_s,
            )
        )
    overheads_s = [entry.wall_s - entry.busy_s for entry in entries if entry.concurrency == 1 and entry.wall_s]
    return ModelProfile(
        busy=tuple(entries),
        overhead_s=max(statistics.median(overheads_s), 0.0),
        instances=served.instances,
        backend=served.backend,
        composed_of=dict(served.composed_of),
    )


def _typical(values: Sequence[float]) -> float:
    """Value of a cell from those of its windows."""
    return statistics.median(values)


def _half_range(values: Sequence[float]) -> float:
    """Half the distance of the quartiles."""
    low, high = np.quantile(values, [0.25, 0.75])
    return float(high - low) / 2.0


def pair_entries(cells: Sequence[Cell], repeats: Sequence[Sequence[Visit]]) -> tuple[PairEntry, ...]:
    """What pairs of models do to each other."""
    found = []
    for index, cell in enumerate(cells):
        if len(cell.models) == 1:
            continue
        first_s, second_s = (_typical([visits[index].interval_s[side] for visits in repeats]) for side in range(2))
        (first, second), (a, b), (x, y) = cell.models, cell.batches, cell.in_flight
        found.append(
            PairEntry(models=(first, second), batches=(a, b), in_flight=(x, y), interval_s=(first_s, second_s))
        )
    return tuple(found)
