"""The orchestrator's door (orchestrator/entry.py) as an array: which requests are refused before they are read.

What waits is looked at every LOOK_S. A look falls between two events, so what it sees is what the next event finds; it
is half a period off the ticks, so that none falls on one. What a request that is refused here takes of the
orchestrator's core is what any other does: a profile does not tell them apart.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from cascadeserve.policy import admission
from planner.simulator.compiling import inlined
from planner.simulator.policy import admits, wait_ahead_s
from planner.simulator.state import LOOK, OWN, ROW, ROWS_OF_ONE, STANDING, SURGE, WAIT

if TYPE_CHECKING:
    from planner.simulator.state import Devices, Floats, Knobs, Load, Queues, Served

_LETS_ALL_IN, _LOOK_S, _LAST_WEIGHT = admission.NONE, admission.LOOK_S, admission.LAST_WEIGHT


@inlined
def look(served: Served, queues: Queues, devices: Devices, door: Floats, layout: int, gear: int, now_s: float) -> None:
    """See what waits, before anything happens at `now_s`; as orchestrator/app.py has it."""
    in_flight_s, queued_s, slots = 0.0, 0.0, 0
    entry = served.gear_entry[gear]
    for endpoint in range(len(served.slots)):
        serves = False
        for stage in range(served.entry_stages[entry]):
            serves = serves or served.instances[layout, endpoint, served.stage_model[entry, stage]] > 0
        if serves:
            in_flight_s += devices.planned_s[endpoint]
            slots += served.slots[endpoint]
    for model in range(len(queues.work)):
        queued_s += queues.work[model] * served.onward_work_s[gear, model]
    door[WAIT] = wait_ahead_s(in_flight_s, queued_s, slots, slots)
    door[ROW] = served.onward_work_s[gear, served.stage_model[entry, 0]] / slots
    door[OWN], door[SURGE] = served.own_s[gear], served.surge_slos[gear]
    door[LOOK] = (np.ceil(now_s / _LOOK_S - 0.5) + 0.5) * _LOOK_S


@inlined
def admit(knobs: Knobs, load: Load, door: Floats, request: int, now_s: float) -> tuple[bool, float]:
    """(Whether a request is let in, the work that it counts as in the demand: of a refused one it is not known)."""
    work = (load.offset[request + 1] - load.offset[request]) * load.work[request]
    if knobs.admission == _LETS_ALL_IN:
        return True, work
    # how long it has waited for the core
    lag_s = now_s - load.times_s[request] - knobs.request_s
    let_in, _, door[STANDING] = admits(lag_s + door[WAIT], door[OWN], knobs.slo_s, door[SURGE], now_s, door[STANDING])
    usual = door[ROWS_OF_ONE]
    if not let_in:
        return False, usual
    door[WAIT] += usual * door[ROW]
    door[ROWS_OF_ONE] = usual + _LAST_WEIGHT * (work - usual)
    return True, work
