"""Systems and their runs, with a stack that only pretends to measure."""

from __future__ import annotations

import contextlib
import io
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from rich.console import Console

from cascadeserve.artefacts import write_json
from cascadeserve.demo.compare import Findings, compare, saving, saving_of_pairs
from cascadeserve.demo.measuring import RunFolder, System
from cascadeserve.demo.rate_search import Ask, Found, Verdict
from cascadeserve.demo.report import Pair
from cascadeserve.demo.steps import Steps
from tests.cascadeserve.demo import made_up

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Generator
    from pathlib import Path

    from cascadeserve.demo.compare import Name

CAPACITY = {"best_single_direct": 380.0, "best_single": 430.0, "cascade": 1700.0}


class FakeStack:
    """Sustains `capacity` rows per second; remembers what it was asked."""

    url = "http://nowhere"

    def __init__(self, capacity: float) -> None:
        self.capacity = capacity
        self.asked: list[dict[str, str]] = []
        self.starts = 0

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        self.starts += 1
        yield

    async def replay(self, output: Path, *_: object, log: object) -> Any:  # noqa: ARG002
        options = dict(option.partition("=")[::2] for option in _ if str(option).startswith("--"))  # type: ignore[attr-defined]
        self.asked.append(options)
        report, records, _truth = made_up.load()
        latency_s = 0.01 if float(options.get("--rate", 0)) <= self.capacity else 0.5
        records["done_s"] = records["scheduled_s"] + latency_s
        write_json(output.with_suffix(".json"), made_up.retimed(report, latency_s))
        np.savez(output.with_suffix(".npz"), **records)
        return made_up.retimed(report, latency_s), records


def system(folder: Path, stack: FakeStack, servers: contextlib.AsyncExitStack, about: str = "a") -> System:
    runs = RunFolder(folder / "runs", about)
    return System("one", stack, "m", folder / "rows", made_up.SLO_S, runs, servers, io.BytesIO())  # type: ignore[arg-type]


def asking(*asks: Ask) -> Generator[Ask, Verdict, Found]:
    for ask in asks:  # noqa: UP028 - a tuple cannot be sent verdicts
        yield ask
    return Found(asks[-1].rate_per_s, "nothing")


async def test_runs_are_as_long_as_their_kind_wants(tmp_path: Path) -> None:
    stack = FakeStack(1e9)
    async with contextlib.AsyncExitStack() as servers:
        one = system(tmp_path, stack, servers)
        _, runs = await one.search(
            asking(Ask(400.0, "probe"), Ask(400.0, "confirmation"), Ask(250.0, "confirmation")), lambda _: None
        )
    assert [run.probe.verdict for run in runs] == ["sustained"] * 3
    warm_up, *asked = stack.asked
    assert "--slo" not in warm_up
    assert [float(options["--duration"]) for options in asked] == [5.0, 20.0, 21.2]
    assert len({options["--seed"] for options in asked}) == 3
    assert stack.starts == 1


async def test_finished_runs_of_an_interrupted_demo_are_not_run_again(tmp_path: Path) -> None:
    asks = [Ask(400.0, "probe"), Ask(500.0, "probe")]
    first, second, third = FakeStack(450.0), FakeStack(450.0), FakeStack(450.0)
    async with contextlib.AsyncExitStack() as servers:
        await system(tmp_path, first, servers).search(asking(asks[0]), lambda _: None)
        _, runs = await system(tmp_path, second, servers).search(asking(*asks), lambda _: None)
        assert [run.probe.verdict for run in runs] == ["sustained", "overloaded"]
        assert [options.get("--rate") for options in second.asked] == ["100", "500.00"], "one warm-up, one run"
        # about another plan: nothing of it may be taken
        await system(tmp_path, third, servers, about="b").search(asking(*asks), lambda _: None)
        assert len(third.asked) == 3


async def test_a_run_that_was_asked_for_differently_is_run_again(tmp_path: Path) -> None:
    first, second = FakeStack(450.0), FakeStack(450.0)
    async with contextlib.AsyncExitStack() as servers:
        await system(tmp_path, first, servers).search(asking(Ask(400.0, "probe")), lambda _: None)
        await system(tmp_path, second, servers).search(asking(Ask(410.0, "probe")), lambda _: None)
    assert len(second.asked) == 2


def findings(folder: Path, servers: contextlib.AsyncExitStack) -> dict[Name, Findings]:
    runs = RunFolder(folder / "runs", "a")
    return {
        name: Findings(
            System(name, FakeStack(capacity), "m", folder / "rows", made_up.SLO_S, runs, servers, io.BytesIO()),  # type: ignore[arg-type]
            predicted_per_s=capacity * 0.9,
        )
        for name, capacity in CAPACITY.items()
    }  # type: ignore[return-value]


async def test_the_quick_comparison_finds_the_three_rates(tmp_path: Path) -> None:
    async with contextlib.AsyncExitStack() as servers:
        found = findings(tmp_path, servers)
        steps = Steps(Console(file=io.StringIO()))
        assert await compare(found, steps, "quick") == ()
    for name, each in found.items():
        result = each.result()
        assert CAPACITY[name] / 1.06 <= result.sustained_rows_per_s <= CAPACITY[name]
        assert result.p95_s == pytest.approx(0.01)
        assert result.ledger is not None
        assert result.probes[-1].kind == "confirmation"
    assert list(steps.wall_s) == [f"sustained rate: {name}" for name in CAPACITY]


async def test_the_full_comparison_takes_its_rates_from_interleaved_pairs(tmp_path: Path) -> None:
    async with contextlib.AsyncExitStack() as servers:
        found = findings(tmp_path, servers)
        pairs = await compare(found, Steps(Console(file=io.StringIO())), "full")
    assert len(pairs) == 5
    median, (low, high) = saving_of_pairs(pairs)
    assert low <= median <= high
    assert median == pytest.approx(1700 / 430, rel=0.08)
    assert all(len(each.confirmed) == 5 for each in found.values())
    assert found["cascade"].rate_per_s == pytest.approx(pairs[0].cascade, rel=0.05)


def test_there_is_no_saving_without_all_three() -> None:
    assert saving(380.0, 430.0, 1700.0) == pytest.approx(1700 / 430)
    assert saving(500.0, 430.0, 1000.0) == 2.0
    assert saving(0.0, 430.0, 1700.0) == saving(380.0, 0.0, 1700.0) == saving(380.0, 430.0, 0.0) == 0.0


def test_the_saving_over_pairs_is_their_median() -> None:
    pairs = tuple(
        Pair(best_single_direct=1.0, best_single=1.0, cascade=each, saving=each) for each in (3.4, 3.5, 3.9, 3.6, 4.0)
    )
    median, (low, high) = saving_of_pairs(pairs)
    assert median == 3.6
    assert 3.4 <= low <= 3.6 <= high <= 4.0
