"""Every way in which a request can end, on real sockets, counted exactly."""

from __future__ import annotations

import asyncio
import socket
import time
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from cascadeserve.errors import UsageError
from cascadeserve.replay.client import describe_model, open_sender, parse_target
from cascadeserve.replay.payload import Question, choose_outputs, encode_rows, match_inputs
from cascadeserve.replay.rows import choose_rows, read_rows
from cascadeserve.replay.run import Load, OpenLoop
from cascadeserve.replay.summary import is_void, summarise

if TYPE_CHECKING:
    from pathlib import Path

    from cascadeserve.replay.ledger import Records
    from cascadeserve.report import ServingReport

REQUESTS = 20


def make_loop(url: str, path: Path, **options: Any) -> tuple[OpenLoop, Any]:
    """Loop and sender without asking the server, which may be a bad one."""
    rows = read_rows(path)
    scheduled_s = np.arange(options.get("requests", REQUESTS)) * options.get("gap_s", 0.005)
    per_request = options.get("per_request", (1, 1))
    chosen = choose_rows(len(rows), len(scheduled_s), np.random.default_rng(0), per_request=per_request)
    timeout_s = options.get("timeout_s", 5.0)
    inputs = tuple(encode_rows(name, array) for name, array in rows.inputs.items())
    question = Question("digits", inputs, ("label", "stage", "certainty"), timeout_s)
    sender = open_sender(parse_target(url), question)
    return OpenLoop(Load(scheduled_s, chosen, timeout_s), sender), sender


async def run(url: str, path: Path, **options: Any) -> tuple[Records, ServingReport]:
    loop, sender = make_loop(url, path, **options)
    try:
        records = await loop.run()
    finally:
        await sender.close()
    report = summarise(
        records,
        labels=read_rows(path).labels,
        duration_s=float(records.scheduled_s[-1]),
        slo_s=options.get("slo_s", 0.5),
    )
    ledger = report.ledger
    ends = ledger.answered_correct + ledger.answered_wrong + ledger.refused + ledger.failed + ledger.lost
    assert ends + ledger.duplicated == ledger.sent + ledger.duplicated
    return records, report


def counts(report: ServingReport) -> dict[str, int]:
    names = ("answered_correct", "answered_wrong", "refused", "failed", "lost", "duplicated")
    return {name: value for name in names if (value := getattr(report.ledger, name))}


async def test_good_answers(serve: Any, new_script: Any, rows_path: Path) -> None:
    script = new_script()
    async with serve(script) as url:
        records, report = await run(url, rows_path)
    # every tenth row is labelled wrong
    assert counts(report) == {"answered_correct": 18, "answered_wrong": 2}
    assert report.accuracy == pytest.approx(0.9)
    assert report.goodput == 1.0
    assert report.complete
    assert report.errors == {}
    assert [span.gear for span in report.gears] == ["g0"]
    assert [(stage.stage, stage.share) for stage in report.stages] == [(0, 0.5), (1, 0.5)]
    assert records.label.tolist() == [*range(10), *range(10)]
    assert np.all(records.certainty == 0.75)
    assert np.all(records.certified == 1)
    assert len(set(script.ids)) == REQUESTS
    assert set(script.timeouts_us) == {5_000_000}


async def test_requests_of_several_rows(serve: Any, new_script: Any, rows_path: Path) -> None:
    async with serve(new_script()) as url:
        records, report = await run(url, rows_path, per_request=(1, 4))
    wrong = [
        9 in records.rows.row_index[a:b] for a, b in zip(records.rows.offset, records.rows.offset[1:], strict=False)
    ]
    assert counts(report) == {"answered_correct": REQUESTS - sum(wrong), "answered_wrong": sum(wrong)}
    assert np.array_equal(records.label, records.rows.row_index)
    assert report.rows_sent == records.rows.offset[-1]


@pytest.mark.parametrize(
    ("behaviour", "expected"),
    [
        ("refuse", {"refused": REQUESTS}),
        ("late", {"refused": REQUESTS}),
        ("fail", {"failed": REQUESTS}),
        ("short", {"failed": REQUESTS}),
        ("reset", {"lost": REQUESTS}),
        ("wrong_id", {"lost": REQUESTS, "duplicated": REQUESTS}),
    ],
)
async def test_bad_answers(
    serve: Any, new_script: Any, rows_path: Path, behaviour: str, expected: dict[str, int]
) -> None:
    async with serve(new_script(behaviour)) as url:
        _, report = await run(url, rows_path)
    assert counts(report) == expected
    assert report.ledger.sent == REQUESTS
    # one text each, whatever ids the server puts into it; a reset may show in more than one way
    assert sum(report.errors.values()) == REQUESTS
    assert behaviour == "reset" or len(report.errors) == 1


async def test_no_answer_is_lost_a_second_after_the_deadline(serve: Any, new_script: Any, rows_path: Path) -> None:
    async with serve(new_script("silent")) as url:
        records, report = await run(url, rows_path, timeout_s=0.1)
    assert counts(report) == {"lost": REQUESTS}
    assert report.errors == {"no reply by the deadline + 1 s": REQUESTS}
    # not before; how long after is the machine's
    assert np.min(records.done_s - records.scheduled_s) >= 1.1 - 0.01


@pytest.mark.parametrize("scheme", ["http", "grpc"])
async def test_a_server_that_is_down_refuses(rows_path: Path, scheme: str) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    _, report = await run(f"{scheme}://127.0.0.1:{port}", rows_path)
    assert counts(report) == {"refused": REQUESTS}
    assert report.errors == {"connection refused": REQUESTS}
    with pytest.raises(UsageError, match="start the server"):
        await describe_model(parse_target(f"{scheme}://127.0.0.1:{port}"), "digits")


async def test_a_refusal_without_a_body_is_a_failure(new_script: Any, rows_path: Path, serve_http: Any) -> None:
    async with serve_http(new_script("refuse_empty")) as url:
        _, report = await run(url, rows_path)
    assert counts(report) == {"failed": REQUESTS}


async def test_chunked_answers_are_read(new_script: Any, rows_path: Path, serve_http: Any) -> None:
    async with serve_http(new_script("chunked")) as url:
        _, report = await run(url, rows_path)
    assert counts(report) == {"answered_correct": 18, "answered_wrong": 2}


async def test_metadata_gives_inputs_and_outputs(serve: Any, new_script: Any, rows_path: Path) -> None:
    async with serve(new_script()) as url:
        signature = await describe_model(parse_target(url), "digits")
        with pytest.raises(UsageError, match="does not describe model other"):
            await describe_model(parse_target(url), "other")
    (encoded,) = match_inputs(read_rows(rows_path), signature)
    assert (encoded.name, encoded.row_shape, encoded.datatype) == ("image", (2, 3), "FP32")
    assert choose_outputs(signature) == ("label", "stage", "certainty")


async def test_a_stalled_server_stops_no_sends(serve: Any, new_script: Any, rows_path: Path) -> None:
    script = new_script("stall")

    async def end_the_stall_when_all_are_there() -> None:
        while len(script.arrived_s) < 50:  # noqa: ASYNC110 - the script is plain data
            await asyncio.sleep(0.01)
        script.stall_until.set()

    async with serve(script) as url:
        ending = asyncio.create_task(end_the_stall_when_all_are_there())
        records, report = await run(url, rows_path, requests=50, gap_s=0.01)
        await ending
    # all of them arrived while the first was still waiting
    assert counts(report) == {"answered_correct": 45, "answered_wrong": 5}
    # and latency is counted from the schedule: the first waited from 0 until the last was sent
    latency_s = records.done_s - records.scheduled_s
    assert latency_s[0] > 0.48


async def test_late_sends_are_lag_and_latency(new_script: Any, rows_path: Path, serve_http: Any) -> None:
    async with serve_http(new_script()) as url:
        # the generator itself is held up from about 0.05 to 0.35 s of the schedule
        asyncio.get_running_loop().call_later(0.1, time.sleep, 0.3)
        records, report = await run(url, rows_path, requests=50, gap_s=0.01)
    assert counts(report) == {"answered_correct": 45, "answered_wrong": 5}
    assert report.generator_lag_p99_s > 0.2
    assert np.max(records.done_s - records.scheduled_s) > 0.2
    assert is_void(report)


async def test_interrupting_keeps_a_report_that_adds_up(serve: Any, new_script: Any, rows_path: Path) -> None:
    script = new_script("stall")
    async with serve(script) as url:
        loop, sender = make_loop(url, rows_path, requests=1000, gap_s=0.01)
        running = asyncio.create_task(loop.run())
        await asyncio.sleep(0.3)
        loop.interrupt()
        script.stall_until.set()
        records = await running
        await sender.close()
    report = summarise(records, labels=None, duration_s=10.0, slo_s=None)
    assert not report.complete
    assert 5 < report.ledger.sent < 100
    assert counts(report) == {"answered_correct": report.ledger.sent}
    assert report.accuracy is None
    assert report.duration_s < 1.0


async def test_interrupting_twice_abandons_what_is_in_flight(serve: Any, new_script: Any, rows_path: Path) -> None:
    async with serve(new_script("silent")) as url:
        loop, sender = make_loop(url, rows_path, requests=1000, gap_s=0.01)
        running = asyncio.create_task(loop.run())
        await asyncio.sleep(0.2)
        loop.interrupt()
        await asyncio.sleep(0.05)
        loop.interrupt()
        records = await asyncio.wait_for(running, 2)
        await sender.close()
    report = summarise(records, labels=None, duration_s=10.0, slo_s=1.0)
    assert report.ledger.sent == 0
    assert report.p95_s is None
    assert report.goodput is None
