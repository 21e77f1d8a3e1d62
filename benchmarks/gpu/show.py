"""The result as a table for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.gpu.result import GpuResult


def tabulate(result: GpuResult) -> str:
    """All that matters of a result, as text."""
    return "\n".join(_lines(result))


def _lines(result: GpuResult) -> Iterator[str]:
    machine = result.machine
    device = f"{machine.gpu}, driver {machine.driver}" if machine.gpu else machine.cpu
    yield f"{device}; torch {machine.torch}, tritonserver {machine.tritonserver}; {machine.date}"
    if result.quick:
        yield "QUICK: tiny models and short windows; these figures mean nothing"
    concurrencies = sorted({cell.concurrency for cell in result.latency})
    yield ""
    yield "model     batch  " + "".join(f"p50 ms, {each} in flight  " for each in concurrencies) + "busy ms  rows/s"
    cells = {(cell.model, cell.batch, cell.concurrency): cell for cell in result.latency}
    for model, busy in result.busy.items():
        for batch, busy_s in busy.busy_s:
            latencies = (cells[model, batch, each].latency_p50_s * 1e3 for each in concurrencies)
            columns = "".join(f"{latency:19.3f}  " for latency in latencies)
            yield f"{model:<8} {batch:6d}  {columns}{busy_s * 1e3:7.3f}  {batch / busy_s:6.0f}"
    cascade = result.cascade
    yield ""
    yield f"SLO: p95 {result.slo_s * 1e3:.1f} ms; {result.rows_per_request} rows per request"
    reach = f"{cascade.served_reach:.1%} of the rows went on (wanted {cascade.wanted_reach:.0%})"
    yield f"cascade {' -> '.join(cascade.stages)}: {reach}"
    yield ""
    yield "system    sustained rows/s  predicted  confirmed rows/s    p95 ms  orchestrator CPU  lost  refused"
    for name, system in result.systems.items():
        run, ledger = system.confirmation, result.ledgers[name]
        verdict = "" if run.sustained else f"  (confirmation: {run.verdict})"
        p95 = "none" if run.p95_s is None else f"{run.p95_s * 1e3:.1f}"
        yield (
            f"{name:<8}  {system.rate_per_s:16.0f}  {system.predicted_rate_per_s:9.0f}  {run.rate_per_s:16.0f}  "
            f"{p95:>8}  {run.orchestrator_cpu_share:16.0%}  {ledger.lost:4d}  {ledger.refused:7d}{verdict}"
        )
    ratio = result.ratio
    confirmed = "not confirmed" if ratio.confirmed is None else f"{ratio.confirmed:.2f} in the confirmation runs"
    yield (
        f"cascade / largest: {ratio.median:.2f} (95 % interval {ratio.low:.2f} to {ratio.high:.2f}, "
        f"{len(ratio.pairs)} pair(s)), {confirmed}, {ratio.predicted:.2f} predicted from busy times"
    )
    yield result.note
