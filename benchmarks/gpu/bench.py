"""The steps of the benchmark, in order."""

from __future__ import annotations

import asyncio
import os
import time
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Literal

import numpy as np

from benchmarks.gpu import family as families
from benchmarks.gpu.client import BenchmarkFailed, TritonClient
from benchmarks.gpu.family import INPUT, Family
from benchmarks.gpu.latency import Grid, busy_times, measure
from benchmarks.gpu.load import Generator, System, free_ports, total_ledger
from benchmarks.gpu.machine import describe, query_gpu, slug
from benchmarks.gpu.plan import choose_threshold, make_plan, predicted_rate_per_s
from benchmarks.gpu.result import (
    WITHOUT_ACCURACY,
    CascadeFigures,
    GpuResult,
    MemberFigures,
    Probe,
    Ratio,
    SystemFigures,
    SystemName,
)
from benchmarks.gpu.search import highest_sustained, median_ratio
from cascadeserve.cluster import Cluster, read_cluster
from cascadeserve.errors import ServerStartFailed
from cascadeserve.local_triton.server import LocalTriton
from cascadeserve.local_triton.working_copy import prepare_working_copy

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

WANTED_REACH = 0.2
ENDPOINT = "device"
_READY_TIMEOUT_S = 180.0
# A sustained rate is one over at least so many rows (and `confirm_s`), as far as `_MAX_CONFIRM_S` allows.
_CONFIRM_ROWS = 5000
_MAX_CONFIRM_S = 60.0
_CONFIRM_TRIES = 3
_BACK_OFF = 0.93


@dataclass(frozen=True, kw_only=True)
class Size:
    """How much is measured. After `budget_s` the run is given up; searches end in time for the confirmations."""

    family: Family
    grid: Grid
    # rows on which the threshold is chosen, and as many others that are sent
    rows: int
    rows_per_request: int
    generators: int
    probe_s: float
    # the SLO (p95) in lone batch-1 calls of the largest model
    slo_factor: float
    # how close the first search comes to the highest rate
    tolerance: float
    # pairs of searches at most, the first of them from scratch
    pairs: int
    confirm_s: float
    budget_s: float


FULL = Size(
    family=families.FULL,
    grid=Grid(batches=(1, 2, 4, 8, 16, 32, 64, 128), concurrencies=(1, 2, 3), repeats=3, window_s=0.15, budget_s=110.0),
    rows=2048,
    rows_per_request=16,
    generators=2,
    probe_s=3.0,
    slo_factor=10.0,
    tolerance=0.1,
    pairs=5,
    confirm_s=20.0,
    budget_s=475.0,
)
QUICK = Size(
    family=families.QUICK,
    grid=Grid(batches=(1, 4, 16), concurrencies=(1, 2), repeats=2, window_s=0.05, budget_s=10.0),
    rows=256,
    rows_per_request=4,
    generators=1,
    probe_s=1.0,
    slo_factor=40.0,  # so that the script can be tried beside other work
    tolerance=0.5,  # one step of bisection
    pairs=1,
    confirm_s=2.0,
    budget_s=110.0,
)


class Benchmark:
    """One run. `state` is an empty folder for everything that is not the result."""

    def __init__(self, device: Literal["gpu", "cpu"], state: Path, *, quick: bool, name: str | None) -> None:
        self._device = device
        self._state = state
        self._quick = quick
        self._size = QUICK if quick else FULL
        self._name = name or (slug(query_gpu()[0]) if device == "gpu" else "cpu")
        self._started_s = time.monotonic()
        self.step = "starting"

    async def run(self) -> GpuResult:
        """Do everything; all processes are gone when it returns or raises.

        Raises:
            CascadeServeError: a step failed.

        """
        try:
            async with asyncio.timeout(self._size.budget_s):
                return await self._run()
        except TimeoutError as error:
            raise BenchmarkFailed(f"not done within {self._size.budget_s:g} s") from error
        except BaseExceptionGroup as group:  # of tasks that ran side by side; the first failure ended the others
            raise _first(group) from group

    def _begin(self, step: str) -> None:
        self.step = step
        print(f"[{self._elapsed_s():5.1f} s] {step}", flush=True)

    def _elapsed_s(self) -> float:
        return time.monotonic() - self._started_s

    async def _run(self) -> GpuResult:
        size = self._size
        self._begin(f"writing {len(size.family.members)} models")
        repository = families.write_repository(self._state / "repository", size.family)
        cluster = self._write_cluster()
        self._begin("starting tritonserver")
        log_path = self._state / "tritonserver.log"
        with log_path.open("wb") as log:
            server = LocalTriton(
                cluster.endpoints[0],
                repository=prepare_working_copy(repository, cluster, self._state),
                models=[member.name for member in size.family.members],
                state=self._state,
                log=log,
            )
            try:
                await server.start(ready_timeout_s=_READY_TIMEOUT_S)
            except ServerStartFailed as error:
                raise BenchmarkFailed(f"{error}; its last words: {_last_error(log_path)}") from error
        client = TritonClient(cluster.endpoints[0].grpc)
        work = asyncio.create_task(self._measure(client, cluster), name="measure")
        ended = asyncio.create_task(server.wait(), name="watch-triton")
        try:
            await asyncio.wait({work, ended}, return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                message = f"tritonserver ended by itself with status {ended.result()}: {_last_error(log_path)}"
                raise BenchmarkFailed(message)
            return work.result()
        finally:
            for task in (work, ended):
                task.cancel()
            await asyncio.gather(work, ended, return_exceptions=True)
            await client.close()
            await server.stop()

    def _write_cluster(self) -> Cluster:
        grpc, http, metrics = free_ports(3)
        # one core for the models, the other ones for everything around them
        device = 'kind = "gpu"' if self._device == "gpu" else f'kind = "cpu"\ncores = [{min(os.sched_getaffinity(0))}]'
        self._cluster_path.write_text(
            f"""schema_version = 1
[[endpoints]]
name = "{ENDPOINT}"
grpc = "127.0.0.1:{grpc}"
http = "127.0.0.1:{http}"
metrics = "127.0.0.1:{metrics}"
[endpoints.device]
{device}
"""
        )
        return read_cluster(self._cluster_path)

    @property
    def _cluster_path(self) -> Path:
        return self._state / "cluster.toml"

    async def _measure(self, client: TritonClient, cluster: Cluster) -> GpuResult:
        size = self._size
        family = size.family
        self._begin("measuring latency by batch size and concurrency")
        chosen_on, sent = np.split(families.draw_rows(family, 2 * size.rows, seed=11), 2)
        cells = await measure(client, [member.name for member in family.members], chosen_on, size.grid)
        busy = busy_times(cells)
        slo_s = size.slo_factor * busy[family.largest].batch1_latency_s
        self._begin(f"choosing the threshold; SLO {slo_s * 1e3:.1f} ms")
        certainties = await client.certainties(family.first, np.concatenate([chosen_on, sent]), family.max_batch // 2)
        threshold = choose_threshold(certainties[: size.rows], WANTED_REACH)
        measured_reach = float((certainties[size.rows :] < threshold).mean())
        np.savez(self._state / "rows.npz", **{f"input:{INPUT}": sent})

        cascades: dict[SystemName, tuple[list[tuple[str, float | None]], list[float]]] = {
            "largest": ([(family.largest, None)], [1.0]),
            "cascade": ([(family.first, threshold), (family.largest, None)], [1.0, measured_reach]),
        }
        systems = {
            name: System(
                name,
                make_plan(name, family, stages, reach, endpoint=cluster.endpoints[0].name, busy=busy, slo_s=slo_s),
                predicted_rate_per_s([model for model, _ in stages], reach, busy, slo_s),
            )
            for name, (stages, reach) in cascades.items()
        }
        generator = Generator(
            rows=self._state / "rows.npz",
            rows_per_request=size.rows_per_request,
            count=size.generators,
            slo_s=slo_s,
            state=self._state,
        )
        confirmations = await self._load(systems, generator)
        figures = {
            name: SystemFigures(
                predicted_rate_per_s=system.predicted_rate_per_s,
                rates_per_s=tuple(system.rates_per_s),
                rate_per_s=median(system.rates_per_s),
                confirmation=confirmations[name],
                probes=tuple(system.probes),
            )
            for name, system in systems.items()
        }
        machine = describe(self._device, await client.server_version())
        return GpuResult(
            schema_version=1,
            tier="gpu",
            name=self._name,
            quick=self._quick,
            note=WITHOUT_ACCURACY,
            machine=machine,
            family=tuple(
                MemberFigures(
                    name=member.name,
                    width=member.width,
                    blocks=member.blocks,
                    stride=member.stride,
                    parameters=member.parameters,
                    flop_per_row=member.flop_per_row(family.size),
                )
                for member in family.members
            ),
            row_shape=family.shape,
            rows_per_request=size.rows_per_request,
            generators=size.generators,
            latency=tuple(cells),
            busy=busy,
            slo_s=slo_s,
            cascade=CascadeFigures(
                stages=(family.first, family.largest),
                threshold=threshold,
                wanted_reach=WANTED_REACH,
                measured_reach=measured_reach,
                served_reach=_served_reach(systems["cascade"].probes),
            ),
            systems=figures,
            ratio=_ratio(figures),
            ledgers={name: total_ledger(probe.ledger for probe in each.probes) for name, each in figures.items()},
            duration_s=self._elapsed_s(),
        )

    async def _load(self, systems: dict[SystemName, System], generator: Generator) -> dict[SystemName, Probe]:
        """Search in interleaved pairs, then confirm; the orchestrators run only in here."""
        size = self._size
        self._begin("starting an orchestrator for each of the two plans")
        try:
            for system in systems.values():
                await system.start(self._cluster_path, self._state)
            for system in systems.values():  # connections, first requests: not part of any search
                await generator.probe(system, 0.2 * system.predicted_rate_per_s, size.probe_s)
            pair_s = 0.0
            for pair in range(size.pairs):
                if pair:  # time for another one, and for the confirmations with one more try?
                    confirming_s = sum(self._confirm_s(system) + 5.0 for system in systems.values())
                    if self._elapsed_s() + pair_s + 1.5 * confirming_s > size.budget_s:
                        break
                began_s = self._elapsed_s()
                for name in list(systems)[:: 1 if pair % 2 == 0 else -1]:
                    self._begin(f"searching the sustained rate of {name!r}, pair {pair + 1} of {size.pairs}")
                    await self._search(systems[name], generator)
                pair_s = self._elapsed_s() - began_s
            return {name: await self._confirm(system, generator) for name, system in systems.items()}
        finally:
            await asyncio.gather(*(system.stop() for system in systems.values()))

    async def _search(self, system: System, generator: Generator) -> None:
        async def sustains(rate_per_s: float) -> bool:
            found = await generator.probe(system, rate_per_s, self._size.probe_s)
            if found.void and not self._quick:
                found = await generator.probe(system, rate_per_s, self._size.probe_s)
            print(f"          {rate_per_s:8.0f} rows/s: {found.verdict}{' (void)' if found.void else ''}", flush=True)
            return self._holds(found)

        if not system.rates_per_s:
            start = 0.5 * system.predicted_rate_per_s
            rate = await highest_sustained(sustains, start, factor=2.0, tolerance=self._size.tolerance)
        else:
            rate = await highest_sustained(sustains, median(system.rates_per_s), factor=1.12, tolerance=0.04)
        if rate is None:
            last = system.probes[-1]
            raise BenchmarkFailed(
                f"{system.name!r} sustains no rate down to {last.rate_per_s:.1f} rows/s: {last.verdict}, "
                f"p95 {_ms(last.p95_s)} against an SLO of {generator.slo_s * 1e3:.1f} ms"
            )
        system.rates_per_s.append(rate)

    async def _confirm(self, system: System, generator: Generator) -> Probe:
        """Load for long at the median rate, or a little below it if that does not hold."""
        rate_per_s = median(system.rates_per_s)
        seconds = self._confirm_s(system)
        self._begin(f"confirming {system.name!r} for {seconds:.0f} s")
        for _ in range(1 if self._quick else _CONFIRM_TRIES):
            found = await generator.probe(system, rate_per_s, seconds)
            print(f"          {rate_per_s:8.0f} rows/s: {found.verdict}{' (void)' if found.void else ''}", flush=True)
            if self._holds(found) or self._elapsed_s() + 2 * (seconds + 5.0) > self._size.budget_s:
                break
            rate_per_s *= _BACK_OFF
        return found

    def _confirm_s(self, system: System) -> float:
        if self._quick:
            return self._size.confirm_s
        for_rows_s = 1.02 * _CONFIRM_ROWS / median(system.rates_per_s)
        return min(max(self._size.confirm_s, for_rows_s), _MAX_CONFIRM_S)

    def _holds(self, found: Probe) -> bool:
        """Whether the rate was sustained; quick runs, on machines busy with other things, let a late generator pass."""
        return found.sustained and (self._quick or not found.void)


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _served_reach(probes: Sequence[Probe]) -> float:
    rows = np.sum([probe.stage_rows for probe in probes], axis=0)
    return float(rows[-1] / rows.sum()) if rows.sum() else 0.0


def _ratio(figures: dict[SystemName, SystemFigures]) -> Ratio:
    largest, cascade = figures["largest"], figures["cascade"]
    middle, low, high, single = median_ratio(list(zip(largest.rates_per_s, cascade.rates_per_s, strict=True)))
    runs = [cascade.confirmation, largest.confirmation]
    confirmed = runs[0].rate_per_s / runs[1].rate_per_s if all(run.sustained and not run.void for run in runs) else None
    return Ratio(
        median=middle,
        low=low,
        high=high,
        pairs=single,
        predicted=cascade.predicted_rate_per_s / largest.predicted_rate_per_s,
        confirmed=confirmed,
    )


def _ms(seconds: float | None) -> str:
    return "none" if seconds is None else f"{seconds * 1e3:.1f} ms"


def _last_error(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    telling = [line for line in lines if line.startswith(("E", "Signal")) or "rror" in line or "cannot open" in line]
    return (telling or lines or ["(nothing)"])[-1]
