"""`cascadeserve replay`."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import resource
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import click
import numpy as np
from rich.console import Console

from cascadeserve.artefacts import write_json
from cascadeserve.collector import spare_what_lives
from cascadeserve.errors import UsageError
from cascadeserve.replay import settings
from cascadeserve.replay.client import Target, describe_model, open_sender, parse_target
from cascadeserve.replay.pacing import new_precise_loop
from cascadeserve.replay.payload import Question, choose_outputs, match_inputs
from cascadeserve.replay.rows import Rows, choose_rows, read_rows
from cascadeserve.replay.run import Load, OpenLoop
from cascadeserve.replay.show import tabulate, watch
from cascadeserve.replay.summary import summarise

if TYPE_CHECKING:
    from cascadeserve.replay.ledger import Records

# Connections for the requests of this long are opened before the first is sent, up to so many.
_BURST_S = 0.1
_MOST_PREPARED = 256
# What a shell reports for a command that was ended by Ctrl-C.
_INTERRUPTED = 130


def _pin(cores: str) -> None:
    try:
        os.sched_setaffinity(0, settings.parse_cores(cores))
    except OSError as error:
        raise UsageError(f"cores {cores}: this process may not run there ({error.strerror})") from error


def _raise_descriptor_limit() -> None:
    """Take all the descriptors the system allows: an open loop against a stalled server opens one per request."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _most_at_once(load: Load) -> int:
    """Largest number of requests that are scheduled within a tenth of a second, up to what is reasonable."""
    times_s = load.scheduled_s
    return min(int(np.max(np.searchsorted(times_s, times_s + _BURST_S) - np.arange(len(times_s)))), _MOST_PREPARED)


async def _run(target: Target, model: str, rows: Rows, load: Load, console: Console) -> Records:
    signature = await describe_model(target, model)
    question = Question(model, match_inputs(rows, signature), choose_outputs(signature), load.timeout_s)
    sender = open_sender(target, question)
    await sender.prepare(_most_at_once(load))
    loop = OpenLoop(load, sender)
    running = asyncio.get_running_loop()
    # Elsewhere than in the main thread (tests) signals cannot be caught, and need not be.
    with contextlib.suppress(RuntimeError, ValueError):
        running.add_signal_handler(signal.SIGINT, loop.interrupt)
    spare_what_lives()
    watcher = asyncio.create_task(watch(loop.records.live, len(load.scheduled_s), console), name="replay progress")
    try:
        return await loop.run()
    finally:
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)
        await sender.close()
        gc.unfreeze()
        with contextlib.suppress(RuntimeError, ValueError):
            running.remove_signal_handler(signal.SIGINT)


_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command(short_help="Send a load to a KServe v2 server and report what became of it.")
@click.option("--url", required=True, help="http://host:port or grpc://host:port of a KServe v2 server.")
@click.option("--model", required=True, help="Name of the model or family to ask.")
@click.option("--rows", "rows_path", required=True, type=_FILE, help=".npz with `input:<TENSOR>` and `label`.")
@click.option("--trace", type=_FILE, help="CSV trace: times of requests, or counts per minute.")
@click.option("--trace-column", help="Column of the times: its name, or its index from 0.")
@click.option("--trace-from", help="Start of a window of the trace, written like its times.")
@click.option("--trace-to", help="End of that window (exclusive).")
@click.option("--rate", type=float, help="Mean rate, rows per second.")
@click.option("--duration", type=float, help="Duration of the load, seconds.")
@click.option("--process", type=click.Choice(["poisson", "gamma", "bursty"]), help="Arrivals; default poisson.")
@click.option("--cv", type=float, default=4.0, show_default=True, help="gamma: coefficient of variation of the gaps.")
@click.option("--burst-factor", type=float, default=4.0, show_default=True, help="bursty: burst rate / base rate.")
@click.option("--base-dwell", type=float, default=8.0, show_default=True, help="bursty: mean seconds at base rate.")
@click.option("--burst-dwell", type=float, default=2.0, show_default=True, help="bursty: mean seconds of a burst.")
@click.option("--steps", help='Steps of seconds x rows per second: "5x100,5x400,5x100".')
@click.option("--rows-per-request", default="1", show_default=True, help="Rows of a request: 4, or 1-8 uniformly.")
@click.option("--shuffle", is_flag=True, help="Take the rows in one order permuted by the seed.")
@click.option("--slo", type=float, help="Latency goal of a request, seconds; for goodput and the lag check.")
@click.option("--timeout", type=float, help="Deadline of a request, seconds; default 4 x SLO, or 5.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Same seed, same load.")
@click.option("--report", "report_path", type=_FILE, help="Write the serving report here (JSON).")
@click.option("--records", "records_path", type=_FILE, help="Write one record per request and row here (.npz).")
@click.option("--cores", help="Run the generator on these cores only: 1, 0,2 or 2-3.")
@click.pass_context
def replay(
    ctx: click.Context,
    *,
    url: str,
    model: str,
    rows_path: Path,
    trace: Path | None,
    trace_column: str | None,
    trace_from: str | None,
    trace_to: str | None,
    rate: float | None,
    duration: float | None,
    process: settings.Process | None,
    cv: float,
    burst_factor: float,
    base_dwell: float,
    burst_dwell: float,
    steps: str | None,
    rows_per_request: str,
    shuffle: bool,
    slo: float | None,
    timeout: float | None,
    seed: int,
    report_path: Path | None,
    records_path: Path | None,
    cores: str | None,
) -> None:
    """Send a load to a KServe v2 server in open loop and report what became of every request.

    Requests leave at their scheduled times whatever the server does, and latency counts from these times. Ctrl-C stops
    sending and waits for the answers under way; a second Ctrl-C abandons them. Exit code: 1 when a request was lost or
    an answer came twice, 130 after Ctrl-C, else 0.
    """
    asked = settings.LoadSettings(
        rate_per_s=rate,
        duration_s=duration,
        process=process,
        cv=cv,
        burst_factor=burst_factor,
        mean_base_s=base_dwell,
        mean_burst_s=burst_dwell,
        steps=None if steps is None else settings.parse_steps(steps),
        trace=trace,
        trace_column=trace_column,
        trace_from=trace_from,
        trace_to=trace_to,
    )
    asked.check()
    per_request = settings.parse_range(rows_per_request)
    timeout_s = settings.choose_timeout(timeout, slo)
    target = parse_target(url)
    # Arrivals and rows have their own streams: another way of dealing rows leaves the arrivals as they are.
    arrivals_rng, rows_rng = (np.random.default_rng(child) for child in np.random.SeedSequence(seed).spawn(2))
    scheduled_s, duration_s = asked.draw(sum(per_request) / 2, arrivals_rng)
    if not len(scheduled_s):
        raise UsageError("this load holds no request at all; raise rate or duration")
    rows = read_rows(rows_path)
    chosen = choose_rows(len(rows), len(scheduled_s), rows_rng, per_request=per_request, shuffle=shuffle)
    _raise_descriptor_limit()
    if cores is not None:
        _pin(cores)
    console = Console()
    with asyncio.Runner(loop_factory=new_precise_loop) as runner:
        records = runner.run(_run(target, model, rows, Load(scheduled_s, chosen, timeout_s), console))
    report = summarise(records, labels=rows.labels, duration_s=duration_s, slo_s=slo)
    if report_path is not None:
        write_json(report_path, report)
    if records_path is not None:
        records.write(records_path)
    console.print(tabulate(report))
    if not report.complete:
        ctx.exit(_INTERRUPTED)
    if report.ledger.lost or report.ledger.duplicated:
        ctx.exit(1)
