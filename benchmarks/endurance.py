"""Is anything lost while everything changes? `python -m benchmarks.endurance`, with real processes.

Two Tritons with the digits models, an orchestrator, and a steady load in open loop whose every request is accounted
for. Parts, each with a stack of its own:

- *changes*: the plan is exchanged again and again for one with other instance counts, at times with one model more.
  Quoted: instance-group changes and loads and unloads of a model, what failed, p99 meanwhile and without changes.
- *layouts*: the committed plan of examples/two_layouts goes from one layout to the other and back by a surge.
- *faults*: one endpoint is killed and started again, the other one is stopped (SIGSTOP) and continued, Python processes
  of its models are killed. Quoted: the ledger, by how much the latest refusal missed its deadline, and how long it took
  after a server was ready again, or after a Python process was killed, until it was sent to again.
- *restarts*: the orchestrator gets SIGTERM under load, then SIGKILL, and is started again beside the same Tritons. What
  a SIGTERM left unanswered is told by kind: sent before it, sent after it, or not sent, for nobody listened any more.
- *transitions*: it gets SIGKILL in the middle of a transition from one layout to another, and is started again.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import shutil
import signal
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from benchmarks.endurance_stack import ENDPOINTS, EnduranceStack, shifting_plan, standing_plan, two_layouts_plan, until
from cascadeserve.artefacts import write_json
from planner.host import describe_host

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

_STATE = Path(".cascadeserve/endurance").resolve()
_RATE = "--rate=60"
_SLO_S = 0.5
_TIMEOUT_S = 4.0
_LOAD = (_RATE, f"--slo={_SLO_S}", f"--timeout={_TIMEOUT_S}")
# enough for an endpoint to be found silent and taken out, and for what it had to be answered elsewhere
_STOPPED_S = 4.0
# the model that all rows are asked of at this rate: that another one is dead, nobody would notice
_ASKED = "digits_cnn"
_SAY = Console(stderr=True)


def _counts(turn: int) -> dict[str, dict[str, int]]:
    """What stands after a turn: at every one two models change their counts, at every other one comes or goes."""
    counts = {name: {"digits_mlp": 2 - turn % 2, "digits_cnn": 1 + turn % 2} for name in ENDPOINTS}
    if turn // 2 % 2:
        counts["b"]["digits_resnet"] = 1
    return counts


async def _changes(stack: EnduranceStack, *, short: bool) -> dict[str, Any]:
    turns = 6 if short else 52  # of four changes and half a move each
    async with stack.under_load("steady", *_LOAD, duration_s=10.0 if short else 60.0) as load:
        await load.ended()
    steady = load.figures(timeout_s=_TIMEOUT_S)
    moves = 0
    async with stack.under_load("changing", *_LOAD) as load:
        await asyncio.sleep(3.0)
        for turn in range(1, turns + 1):
            wanted, former = _counts(turn), _counts(turn - 1)
            moves += len(wanted["b"]) != len(former["b"])
            write_json(stack.plan, standing_plan(f"turn-{turn}", wanted))
            stack.signal_orchestrator(signal.SIGHUP)

            async def stands(wanted: dict[str, dict[str, int]] = wanted) -> bool:
                return await stack.instances() == wanted

            await until(stands, within_s=60.0, saying=f"the counts of turn {turn}")
            _SAY.print(f"[dim]turn {turn} of {turns}[/dim]")
    changing = load.figures(timeout_s=_TIMEOUT_S)
    done = await stack.changes()
    return {
        "group_changes": done - moves,
        "model_moves": moves,
        "failed_changes": await stack.changes("failed"),
        "steady": steady,
        "changing": changing,
        "not_answered": _not_answered(changing["ledger"]),
    }


async def _layouts(stack: EnduranceStack, *, short: bool) -> dict[str, Any]:
    steps = "4x100,10x700,25x100" if short else "8x100,20x700,35x100"
    async with stack.under_load("layouts", f"--steps={steps}", "--slo=0.2", "--timeout=5") as load:
        await load.ended()
    figures = load.figures(timeout_s=5.0)
    log = stack.log.read_text(errors="replace")
    return figures | {
        "there": log.count("layout layout-2 in force"),
        "back": log.count("layout layout-1 in force"),
        "not_answered": _not_answered(figures["ledger"]),
    }


async def _faults(stack: EnduranceStack, *, short: bool) -> dict[str, Any]:
    kills, stops, stub_kills = (2, 1, 1) if short else (20, 10, 10)
    back: dict[str, list[float]] = {"killed": [], "stopped": [], "stub": []}

    async def kill() -> None:
        triton = stack.tritons["a"]
        os.kill(triton.pid, signal.SIGKILL)
        await triton.wait()
        await triton.stop()
        await asyncio.sleep(1.0)
        await triton.start()
        back["killed"].append(await until(partial(stack.is_up, "a"), within_s=30.0, saying="endpoint a"))

    async def stop() -> None:
        pid = stack.tritons["b"].pid
        os.kill(pid, signal.SIGSTOP)
        try:
            await until(partial(_is_down, stack, "b"), within_s=10.0, saying="that endpoint b was taken out")
            await asyncio.sleep(_STOPPED_S)
        finally:
            os.kill(pid, signal.SIGCONT)
        back["stopped"].append(await until(partial(stack.is_up, "b"), within_s=30.0, saying="endpoint b"))

    async def kill_stub() -> None:
        before = await stack.changes()
        os.kill(random.choice(stack.stubs("b", _ASKED)), signal.SIGKILL)  # noqa: S311 - which one does not matter

        async def mended() -> bool:
            return await stack.changes() > before

        back["stub"].append(await until(mended, within_s=60.0, saying="the model whose Python process was killed"))

    events: list[Callable[[], Awaitable[None]]] = [*[kill] * kills, *[stop] * stops, *[kill_stub] * stub_kills]
    random.Random(7).shuffle(events)  # noqa: S311
    async with stack.under_load("faults", *_LOAD) as load:
        await asyncio.sleep(3.0)
        for number, event in enumerate(events, 1):
            await event()
            _SAY.print(f"[dim]fault {number} of {len(events)}: {event.__name__}[/dim]")
            await asyncio.sleep(2.0)
    return load.figures(timeout_s=_TIMEOUT_S) | {
        "events": {name: len(times_s) for name, times_s in back.items()},
        "back_s": {name: max(times_s) for name, times_s in back.items()},
    }


async def _is_down(stack: EnduranceStack, endpoint: str) -> bool:
    return not await stack.is_up(endpoint)


async def _transitions(stack: EnduranceStack, *, short: bool) -> dict[str, Any]:
    ready_s, untouched, finished, not_answered = [], [], 0, 0
    between: list[dict[str, dict[str, int]]] = [layout["instances"] for layout in shifting_plan()["layouts"]]
    turns = 1 if short else 5

    async def on_its_way() -> bool:
        standing = await stack.instances()
        return any(standing.values()) and standing not in between

    async def stands(layout: int) -> bool:
        return await stack.instances() == between[layout]

    for turn in range(1, turns + 1):
        await until(partial(stands, 0), within_s=60.0, saying="the layout for no load")
        servers = [stack.tritons[name].pid for name in ENDPOINTS]
        async with stack.under_load("killed", *_LOAD):
            await until(on_its_way, within_s=30.0, saying="the transition to the other layout")
            stack.signal_orchestrator(signal.SIGKILL)
            assert stack.orchestrator is not None
            await stack.orchestrator.wait()
        noted = len(stack.log.read_text(errors="replace"))
        ready_s.append(await stack.start_orchestrator())
        async with stack.under_load("resumed", *_LOAD) as load:
            await until(partial(stands, 1), within_s=60.0, saying="the layout that was under way")
            await asyncio.sleep(1.0)
        not_answered += _not_answered(load.figures(timeout_s=_TIMEOUT_S)["ledger"])
        taken_over = re.search(
            r"layout (\w+) is taken over, (\w+) wanted", stack.log.read_text(errors="replace")[noted:]
        )
        finished += taken_over is not None and taken_over[1] != taken_over[2]
        untouched.append([stack.tritons[name].pid for name in ENDPOINTS] == servers)
        _SAY.print(f"[dim]transition {turn} of {turns}: {ready_s[-1]:.2f} s[/dim]")
    return {
        "kills": turns,
        "not_resumed": turns - finished,
        "ready_s": max(ready_s),
        "not_answered": not_answered,
        "untouched": all(untouched),
    }


async def _restarts(stack: EnduranceStack, *, short: bool) -> dict[str, Any]:
    ready_s, untouched, ledgers, unanswered = [], [], [], []
    for _ in range(1 if short else 5):
        async with stack.under_load("stopped", *_LOAD) as load:
            await asyncio.sleep(3.0)
            assert stack.orchestrator is not None
            stopped_s = asyncio.get_running_loop().time()
            stack.signal_orchestrator(signal.SIGTERM)
            await stack.orchestrator.wait()
        unanswered.append(load.unanswered(stopped_s))
        ledgers.append(load.figures(timeout_s=_TIMEOUT_S)["ledger"])
        await stack.start_orchestrator()
        await asyncio.sleep(2.0)  # ready with one of the two, it may not have read the other
        standing, pids = await stack.instances(), _server_pids(stack)
        async with stack.under_load("killed", *_LOAD):
            await asyncio.sleep(2.0)
            stack.signal_orchestrator(signal.SIGKILL)
            await stack.orchestrator.wait()
        ready_s.append(await stack.start_orchestrator())
        await asyncio.sleep(2.0)
        same = _server_pids(stack) == pids and await stack.instances() == standing and await stack.changes() == 0
        untouched.append(same)
    return {
        "sigterm_lost": sum(ledger["lost"] + ledger["duplicated"] + ledger["failed"] for ledger in ledgers),
        "sigterm_unanswered": sum(sum(kinds["sent_before"].values()) for kinds in unanswered),
        "sigterm": [{"ledger": ledger, "unanswered": kinds} for ledger, kinds in zip(ledgers, unanswered, strict=True)],
        "ready_s": max(ready_s),
        "untouched": all(untouched),
    }


def _server_pids(stack: EnduranceStack) -> list[list[int]]:
    return [[stack.tritons[name].pid, *stack.stubs(name)] for name in ENDPOINTS]


def _not_answered(ledger: dict[str, int]) -> int:
    return sum(ledger[name] for name in ("refused", "failed", "lost", "duplicated"))


_LIKE = {"a": {"digits_mlp": 1, "digits_cnn": 1}, "b": {"digits_mlp": 1, "digits_cnn": 1}}
_PARTS: dict[str, tuple[Callable[..., Awaitable[dict[str, Any]]], Callable[[], dict[str, Any]]]] = {
    "changes": (_changes, lambda: standing_plan("turn-0", _counts(0))),
    "layouts": (_layouts, two_layouts_plan),
    "faults": (_faults, lambda: standing_plan("faults", _LIKE)),
    "restarts": (_restarts, lambda: standing_plan("restarts", _LIKE)),
    "transitions": (_transitions, shifting_plan),
}


async def _run(part: str, *, short: bool) -> dict[str, Any]:
    run, plan = _PARTS[part]
    folder = _STATE / part
    shutil.rmtree(folder, ignore_errors=True)
    stack = EnduranceStack(folder, plan())
    async with stack.running():
        return await run(stack, short=short)


@click.command()
@click.option("--part", "parts", type=click.Choice(list(_PARTS)), multiple=True, help="Only this one, repeatable.")
@click.option("--short", is_flag=True, help="Fewer of everything.")
@click.option(
    "--result", type=click.Path(path_type=Path), default="benchmarks/results/local/endurance.json", show_default=True
)
def main(parts: tuple[str, ...], result: Path, *, short: bool) -> None:
    """Run the parts and write the result."""
    found = {part: asyncio.run(_run(part, short=short)) for part in parts or tuple(_PARTS)}
    write_json(result, {"host": describe_host(), "short": short, **found})
    _SAY.print(found)


if __name__ == "__main__":
    main()
