"""Latency by model, batch size and concurrency: closed loops over gRPC, repeats interleaved, medians."""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from dataclasses import dataclass, field
from statistics import median
from typing import TYPE_CHECKING

from benchmarks.gpu.result import BusyTime, LatencyCell

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from benchmarks.gpu.client import TritonClient

# Batches that take longer than this are of no use to any plan here, and larger ones are not tried.
MAX_BATCH_S = 1.0
_MIN_CALLS = 4


@dataclass(frozen=True, kw_only=True)
class Grid:
    """What is measured: every model at every batch size and concurrency, `repeats` windows of `window_s` each.

    After `budget_s` no further repeat is begun.
    """

    batches: tuple[int, ...]
    concurrencies: tuple[int, ...]
    repeats: int
    window_s: float
    budget_s: float


@dataclass
class _Samples:
    latency_s: list[float] = field(default_factory=list)
    gap_s: list[float] = field(default_factory=list)
    compute_s: list[float] = field(default_factory=list)
    calls: int = 0


async def measure(
    client: TritonClient, models: list[str], rows: NDArray[np.float32], grid: Grid, *, seed: int = 1
) -> list[LatencyCell]:
    """Measure the whole grid; the first repeat goes up in batch size, later ones in random order."""
    clock = asyncio.get_running_loop().time
    started_s = clock()
    samples: dict[tuple[str, int, int], _Samples] = defaultdict(_Samples)
    for model in models:
        for batch in grid.batches:
            await _window(client, model, rows[:batch], 1, 0.0)  # the first answers are slower than the rest
            for concurrency in grid.concurrencies:
                cell = (model, batch, concurrency)
                await _measure_cell(client, cell, rows, grid.window_s, samples[cell])
            if min(samples[model, batch, concurrency].gap_s[0] for concurrency in grid.concurrencies) > MAX_BATCH_S:
                break
    rng = random.Random(seed)  # noqa: S311 - an order of measurements, no secret
    repeat_s = clock() - started_s
    for _ in range(grid.repeats - 1):
        if clock() - started_s + repeat_s > grid.budget_s:
            break
        for cell in rng.sample(sorted(samples), len(samples)):
            await _measure_cell(client, cell, rows, grid.window_s, samples[cell])
    return [
        LatencyCell(
            model=model,
            batch=batch,
            concurrency=concurrency,
            latency_p50_s=median(each.latency_s),
            batch_interval_s=median(each.gap_s),
            rows_per_s=batch / median(each.gap_s),
            triton_compute_s=median(each.compute_s),
            repeats=len(each.gap_s),
            calls=each.calls,
        )
        for (model, batch, concurrency), each in samples.items()
    ]


async def _measure_cell(
    client: TritonClient, cell: tuple[str, int, int], rows: NDArray[np.float32], window_s: float, samples: _Samples
) -> None:
    model, batch, concurrency = cell
    count_before, compute_before_s = await client.compute_s(model)
    latencies_s, elapsed_s = await _window(client, model, rows[:batch], concurrency, window_s)
    count, compute_s = await client.compute_s(model)
    samples.latency_s.append(median(latencies_s))
    samples.gap_s.append(elapsed_s / len(latencies_s))
    samples.compute_s.append((compute_s - compute_before_s) / max(count - count_before, 1))
    samples.calls += len(latencies_s)


async def _window(
    client: TritonClient, model: str, rows: NDArray[np.float32], concurrency: int, window_s: float
) -> tuple[list[float], float]:
    """Latencies of all calls that began within the window, and how long they took together."""
    clock = asyncio.get_running_loop().time
    request = client.prepare(model, rows)
    latencies_s: list[float] = []
    begun = 0
    started_s = clock()

    async def call_on() -> None:
        nonlocal begun
        while begun < _MIN_CALLS or clock() < started_s + window_s:
            begun += 1
            sent_s = clock()
            await client.infer(request)
            latencies_s.append(clock() - sent_s)

    async with asyncio.TaskGroup() as group:
        for _ in range(concurrency):
            group.create_task(call_on(), name=f"closed-loop-{model}")
    return latencies_s, clock() - started_s


def busy_times(cells: list[LatencyCell]) -> dict[str, BusyTime]:
    """Estimate, per model, how long a batch keeps the device busy.

    That is the interval between batches while one more is always waiting (the lowest concurrency above 1): the call's
    own way to the server and back is then hidden behind the batch before. What a lone call takes beyond it is overhead.
    """
    waiting = min(cell.concurrency for cell in cells if cell.concurrency > 1)
    found: dict[str, BusyTime] = {}
    for model in dict.fromkeys(cell.model for cell in cells):
        of_model = sorted((cell for cell in cells if cell.model == model), key=lambda cell: cell.batch)
        alone = next(cell for cell in of_model if cell.concurrency == 1)
        busy_s = [(cell.batch, cell.batch_interval_s) for cell in of_model if cell.concurrency == waiting]
        found[model] = BusyTime(
            busy_s=tuple(busy_s), batch1_latency_s=alone.latency_p50_s,
            overhead_s=max(alone.latency_p50_s - busy_s[0][1], 0.0),
        )  # fmt: skip
    return found
