"""The decisions of `cascadeserve.policy`, compiled: the same functions that the orchestrator runs.

A policy function is plain Python that knows nothing of numba. Here each gets a twin whose globals name the compiled
twins of the functions it calls.
"""

from __future__ import annotations

from types import FunctionType, ModuleType
from typing import Any

from cascadeserve.policy import admission, balancing, batching, demand, escalation, gear_switch, ordering, work
from planner.simulator.compiling import inlined


def _compiled(module: ModuleType) -> dict[str, Any]:
    """All functions of a module, compiled, by name."""
    namespace = dict(vars(module))
    twins = {}
    for name, function in vars(module).items():
        if isinstance(function, FunctionType) and function.__module__ == module.__name__:
            twins[name] = inlined(FunctionType(function.__code__, namespace, name, function.__defaults__))
    namespace.update(twins)
    return twins


_admission = _compiled(admission)
in_time, admits = _admission["in_time"], _admission["admits"]
wait_ahead_s = _admission["wait_ahead_s"]
choose_endpoint = _compiled(balancing)["choose_endpoint"]
rank_s = _compiled(ordering)["rank_s"]
_batching = _compiled(batching)
due_reason, due_at_s, next_queue = _batching["due_reason"], _batching["due_at_s"], _batching["next_queue"]
next_stage_in_time = _compiled(escalation)["next_stage_in_time"]
_demand = _compiled(demand)
window_start, arrival_rate_per_s = _demand["window_start"], _demand["arrival_rate_per_s"]
demand_per_s = _demand["demand_per_s"]
_gear_switch = _compiled(gear_switch)
switch_gear, switch_layout = _gear_switch["switch_gear"], _gear_switch["switch_layout"]
_work = _compiled(work)
work_from_s, planned_work_s = _work["work_from_s"], _work["planned_work_s"]
largest_batch_work = _work["largest_batch_work"]
