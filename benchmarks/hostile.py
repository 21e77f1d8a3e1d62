"""What hostile clients cost the others: `python -m benchmarks.hostile`.

An honest load is measured alone and under each attack, in interleaved pairs. Quoted is the median over pairs of p99
under the attack over p99 alone; `seen` counts what the attacks came to. Attacks and load come from this machine, and
share the orchestrator's core.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import itertools
import resource
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import numpy as np
from rich.console import Console

from cascadeserve.artefacts import write_json
from cascadeserve.local_stack import LocalStack
from examples.digits.data import rows

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

_STATE = Path(".cascadeserve/hostile").resolve()
_RATE_PER_S = 100
_HEAD = b"POST /v2/models/digits/infer HTTP/1.1\r\nHost: a\r\n"
_NUM_SLOW = 500
_NUM_IDLE = 10_000
_BOMBS_PER_S = 2
_FLOODS_PER_S = 20
# until an attack is in full force
_RAMP_S = 10.0
# spaces: a gigabyte, and what is just within the limit of 64 MiB
_BOMBS_BYTES = (1 << 30, 63 << 20)

Address = tuple[str, int]


@contextlib.asynccontextmanager
async def _connection(address: Address) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection(*address)
    try:
        yield reader, writer
    finally:
        writer.close()


async def _slowly(address: Address, seen: Counter[str]) -> None:
    """A head, byte by byte, for ever."""
    while True:
        with contextlib.suppress(OSError):
            async with _connection(address) as (_, writer):
                seen["opened"] += 1
                while not writer.is_closing():
                    for byte in _HEAD:
                        writer.write(bytes([byte]))
                        await asyncio.sleep(1.0)


async def slowloris(address: Address, seen: Counter[str]) -> None:
    """Many connections that never come to the end of a request."""
    await asyncio.gather(*(_slowly(address, seen) for _ in range(_NUM_SLOW)))


async def idle(address: Address, seen: Counter[str]) -> None:
    """Many connections that say nothing, opened again when they are closed."""

    async def hold() -> None:
        while True:
            with contextlib.suppress(OSError):
                async with _connection(address) as (reader, _):
                    seen["opened"] += 1
                    await reader.read()
                seen["closed"] += 1
            await asyncio.sleep(5.0)

    async with asyncio.TaskGroup() as group:
        for _ in range(_NUM_IDLE):
            group.create_task(hold())
            await asyncio.sleep(_RAMP_S / _NUM_IDLE / 2)


async def _again(address: Address, seen: Counter[str], per_s: float, *requests: bytes) -> None:
    """Send a request so often, each in its turn, and read what comes."""

    async def send(request: bytes) -> None:
        try:
            async with asyncio.timeout(10), _connection(address) as (reader, writer):
                writer.write(request)
                # the status of the first answer
                seen[(await reader.read(1 << 12))[9:12].decode("latin-1") or "closed"] += 1
        except (OSError, TimeoutError) as error:
            seen[type(error).__name__] += 1

    async with asyncio.TaskGroup() as group:
        for request in itertools.cycle(requests):
            group.create_task(send(request))
            await asyncio.sleep(1 / per_s)


async def bombs(address: Address, seen: Counter[str]) -> None:
    """Small requests that unfold to very much, beyond the limit and just within."""
    requests = []
    for num_bytes in _BOMBS_BYTES:
        packed = await asyncio.to_thread(lambda size: gzip.compress(b" " * size, 9), num_bytes)
        requests.append(_HEAD + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(packed) + packed)
    await _again(address, seen, _BOMBS_PER_S, *requests)


async def floods(address: Address, seen: Counter[str]) -> None:
    """Heads that do not end."""
    lines = b"".join(b"X-%d: %s\r\n" % (number, b"a" * 100) for number in range(10_000))
    await _again(address, seen, _FLOODS_PER_S, _HEAD + lines)


ATTACKS: dict[str, Callable[[Address, Counter[str]], Awaitable[None]]] = {
    "slowloris": slowloris,
    "idle": idle,
    "bombs": bombs,
    "floods": floods,
}


async def _measure(pairs: int, seconds: float, names: tuple[str, ...]) -> dict[str, Any]:
    data = _STATE / "rows.npz"
    stack = LocalStack(_STATE, plan=Path("examples/digits/gear_plan.json"), repository=Path("model_repository"))
    drawn = rows("replay", 1_000)
    np.savez(data, **{"input:image": drawn.inputs, "label": drawn.labels})
    host, _, port = stack.url.removeprefix("http://").partition(":")
    options = [f"--rate={_RATE_PER_S}", f"--duration={seconds}"]
    measured: dict[str, Any] = {}
    with stack.log.with_name("replay.log").open("wb") as log:
        async with stack.running():
            for name in names:
                p99s: list[tuple[float, float]] = []
                lost = 0
                seen: Counter[str] = Counter()
                for pair in range(pairs):
                    alone, _ = await stack.replay(_STATE / "alone", stack.url, "digits", data, *options, log=log)
                    attack = asyncio.create_task(ATTACKS[name]((host, int(port)), seen), name=name)
                    await asyncio.sleep(_RAMP_S)
                    under, _ = await stack.replay(
                        _STATE / f"{name}-{pair}", stack.url, "digits", data, *options, log=log
                    )
                    attack.cancel()
                    await asyncio.gather(attack, return_exceptions=True)
                    p99s.append((alone.p99_s or float("nan"), under.p99_s or float("nan")))
                    lost += under.ledger.lost + under.ledger.refused
                ratios = [under_s / alone_s for alone_s, under_s in p99s]
                measured[name] = {
                    "p99_s": p99s,
                    "ratio": float(np.median(ratios)),
                    "lost_or_refused": lost,
                    "seen": dict(seen),
                }
    # nan if one is
    measured["worst_ratio"] = float(np.max([measured[name]["ratio"] for name in names]))
    measured["lost_or_refused"] = sum(measured[name]["lost_or_refused"] for name in names)
    return measured


@click.command()
@click.option("--pairs", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--seconds", type=click.FloatRange(min=1.0), default=10.0, show_default=True, help="Of each run.")
@click.option("--attack", "names", type=click.Choice(list(ATTACKS)), multiple=True, default=tuple(ATTACKS))
@click.option(
    "--result", type=click.Path(path_type=Path), default="benchmarks/results/local/hostile.json", show_default=True
)
def main(pairs: int, seconds: float, names: tuple[str, ...], result: Path) -> None:
    """Measure, write the result, print it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    measured = asyncio.run(_measure(pairs, seconds, names))
    write_json(result, measured)
    Console().print(measured)


if __name__ == "__main__":
    main()
