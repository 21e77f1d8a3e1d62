"""A simulated run as a file for Perfetto (ui.perfetto.dev) or chrome://tracing: JSON in the Trace Event Format.

Every endpoint is a process with one track per place for a batch in flight: a slice from the batch's departure to the
moment its answer was handled, and in it the part that it ran on the device. The orchestrator is a process with the
gear and the layout in force, in that the transition to the next one, the demand as a counter, and an instant for every
refused request.

Slices of one track nest or follow each other, as the format asks; events stand by rising time, an outer slice first.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from cascadeserve.artefacts import write_atomically

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from cascadeserve.gear_plan import GearPlan
    from planner.simulator import Simulation

    Event = dict[str, Any]

# of batches, of ticks and of refusals: what the viewers open without trouble
MOST = 100_000

_ORCHESTRATOR, _FIRST_ENDPOINT = 1, 2
_GEAR, _LAYOUT, _REFUSED = 1, 2, 3


def write_trace(path: Path, simulation: Simulation, plan: GearPlan, family: str) -> float | None:
    """Write the trace of a run that was made with `logged_batches=MOST`; folders are made.

    Returns the seconds from the run's start that it covers, None if these are all.
    """
    until_s = covered_s(simulation)
    events = heapq.merge(*_streams(simulation, plan, family, until_s), key=lambda event: float(event["ts"]))
    about = {
        "made_by": "cascadeserve simulate",
        "plan": plan.name,
        "family": family,
        "complete": until_s is None,
        "covers_s": _end_s(simulation) if until_s is None else until_s,
    }
    lines = b",\n".join(map(msgspec.json.encode, [*_names(simulation), *events]))
    head = b'{"displayTimeUnit":"ms","otherData":' + msgspec.json.encode(about)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, head + b',"traceEvents":[\n' + lines + b"\n]}\n")
    return until_s


def covered_s(simulation: Simulation, most: int = MOST) -> float | None:
    """Seconds after which a trace lacks something, None if it lacks nothing."""
    ends_s: list[float] = []
    if sum(simulation.batches.values()) > len(simulation.log.left_s):
        ends_s.append(float(simulation.log.left_s[-1]))
    refused_s = simulation.refused_s[~np.isnan(simulation.refused_s)]
    full = (times_s for times_s in (simulation.tick_s, np.sort(refused_s)) if len(times_s) > most)
    ends_s.extend(float(times_s[most - 1]) for times_s in full)
    return min(ends_s, default=None)


def _end_s(simulation: Simulation) -> float:
    """When the last of all that is shown ends."""
    times = (simulation.log.back_s, simulation.refused_s, simulation.tick_s, [simulation.load.duration_s])
    known_s = np.concatenate(times)
    return float(np.nanmax(known_s))


def _names(simulation: Simulation) -> Iterator[Event]:
    yield from _name("process", _ORCHESTRATOR, 0, "orchestrator")
    for track, name in ((_GEAR, "gear"), (_LAYOUT, "layout"), (_REFUSED, "refused requests")):
        yield from _name("thread", _ORCHESTRATOR, track, name)
    log = simulation.log
    for index, endpoint in enumerate(simulation.busy_s):
        yield from _name("process", _FIRST_ENDPOINT + index, 0, f"endpoint {endpoint}")
        for place in np.unique(log.place[log.endpoint == index]).tolist():
            yield from _name("thread", _FIRST_ENDPOINT + index, place + 1, f"batch in flight {place + 1}")


def _name(what: str, process: int, track: int, name: str) -> Iterator[Event]:
    where = {"ph": "M", "pid": process, "tid": track}
    yield {"name": f"{what}_name", **where, "args": {"name": name}}
    # the viewers would sort by name or by first event
    yield {"name": f"{what}_sort_index", **where, "args": {"sort_index": process if what == "process" else track}}


def _streams(simulation: Simulation, plan: GearPlan, family: str, until_s: float | None) -> Iterator[Iterable[Event]]:
    """Events by rising time, those that others lie in before these."""
    served = plan.families[family]
    until_s = np.inf if until_s is None else until_s
    ticks = simulation.tick_s <= until_s
    tick_s = simulation.tick_s[ticks]
    gears, layouts = ([each.name for each in parts] for parts in (served.gears, plan.layouts))
    yield _stretches(_GEAR, "gear", tick_s, simulation.tick_gear[ticks], gears)
    yield _stretches(_LAYOUT, "layout", tick_s, simulation.tick_layout[ticks], layouts)
    changing = simulation.tick_changing[ticks].astype(np.int16)
    yield _stretches(_LAYOUT, "transition", tick_s, changing, ["", "transition"])
    shown = np.flatnonzero(simulation.log.left_s <= until_s)
    yield _flights(simulation, shown, list(served.models), gears)
    began = shown[~np.isnan(simulation.log.began_s[shown])]
    yield _runs(simulation, began[np.argsort(simulation.log.began_s[began], kind="stable")])
    yield (
        {"name": "demand", "ph": "C", "pid": _ORCHESTRATOR, "tid": 0, "ts": at_us, "args": {"rows/s": demand}}
        for at_us, demand in zip(_us(tick_s), simulation.tick_demand_per_s[ticks].tolist(), strict=True)
    )
    yield _refusals(simulation, until_s)


def _stretches(
    track: int, kind: str, tick_s: NDArray[np.float64], which: NDArray[np.int16], names: Sequence[str]
) -> Iterator[Event]:
    """What was in force from tick to tick; the first tick tells what was from the start. No name: nothing to show."""
    begins = np.flatnonzero(np.diff(which, prepend=-1))
    starts_s = tick_s[begins]
    starts_s[:1] = 0.0
    ends_s = np.append(starts_s[1:], tick_s[-1:])
    for start_us, length_us, index in zip(*_spans_us(starts_s, ends_s), which[begins].tolist(), strict=True):
        if names[index]:
            yield _slice(names[index], kind, (_ORCHESTRATOR, track), start_us, length_us, {})


def _flights(
    simulation: Simulation, shown: NDArray[np.int64], models: Sequence[str], gears: Sequence[str]
) -> Iterator[Event]:
    """One slice per batch, by departure."""
    log = simulation.log
    back_s = log.back_s[shown]
    spans_us = _spans_us(log.left_s[shown], np.where(np.isnan(back_s), _end_s(simulation), back_s))
    for number, start_us, length_us in zip(shown.tolist(), *spans_us, strict=True):
        about: dict[str, Any] = {"number": number, "rows": int(log.rows[number]), "gear": gears[log.gear[number]]}
        if np.isnan(log.back_s[number]):
            about["answered"] = False
        yield _slice(models[log.model[number]], "batch", _track(simulation, number), start_us, length_us, about)


def _runs(simulation: Simulation, began: NDArray[np.int64]) -> Iterator[Event]:
    """The part of each batch on the device; `device_s` is shorter than the slice where batches shared a slot."""
    log = simulation.log
    ended_s = log.ended_s[began]
    spans_us = _spans_us(log.began_s[began], np.where(np.isnan(ended_s), _end_s(simulation), ended_s))
    for number, start_us, length_us in zip(began.tolist(), *spans_us, strict=True):
        about = {"number": number, "device_s": float(log.device_s[number])}
        yield _slice("on the device", "device", _track(simulation, number), start_us, length_us, about)


def _refusals(simulation: Simulation, until_s: float) -> Iterator[Event]:
    refused = np.flatnonzero(simulation.refused_s <= until_s)
    refused = refused[np.argsort(simulation.refused_s[refused], kind="stable")]
    times_s, load = simulation.refused_s[refused], simulation.load
    waited_s = times_s - load.times_s[refused]
    where = {"pid": _ORCHESTRATOR, "tid": _REFUSED}
    for number, at_us, after_s in zip(refused.tolist(), _us(times_s), waited_s.tolist(), strict=True):
        about = {"request": number, "rows": int(load.rows[number]), "after_s": after_s}
        yield {"name": "refused", "cat": "request", "ph": "i", "s": "t", **where, "ts": at_us, "args": about}


def _track(simulation: Simulation, number: int) -> tuple[int, int]:
    return _FIRST_ENDPOINT + int(simulation.log.endpoint[number]), 1 + int(simulation.log.place[number])


def _slice(
    name: str, kind: str, track: tuple[int, int], start_us: float, length_us: float, about: dict[str, Any]
) -> Event:
    process, thread = track
    return {
        "name": name, "cat": kind, "ph": "X", "pid": process, "tid": thread, "ts": start_us, "dur": length_us,
        "args": about,
    }  # fmt: skip


def _ns(times_s: NDArray[np.float64]) -> NDArray[np.int64]:
    ns: NDArray[np.int64] = np.rint(1e9 * times_s).astype(np.int64)
    return ns


def _us(times_s: NDArray[np.float64]) -> list[float]:
    us: list[float] = (_ns(times_s) / 1e3).tolist()
    return us


def _spans_us(starts_s: NDArray[np.float64], ends_s: NDArray[np.float64]) -> tuple[list[float], list[float]]:
    """Starts and lengths; whole nanoseconds, so that what ends together does so here too."""
    lengths_us: list[float] = ((_ns(ends_s) - _ns(starts_s)) / 1e3).tolist()
    return _us(starts_s), lengths_us
