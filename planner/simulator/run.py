"""Simulator: a gear plan, records and profiles made into arrays, and runs of loads through them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cascadeserve.errors import UsageError
from cascadeserve.policy.admission import ADMISSIONS, DEADLINE_SLOS
from cascadeserve.policy.balancing import BALANCERS
from cascadeserve.policy.gear_switch import TICK_S
from cascadeserve.policy.ordering import ORDERS
from planner.profile import FrontCost
from planner.simulator import kernel, state
from planner.simulator.layouts import layout_of_states
from planner.simulator.served import build_served

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from cascadeserve.gear_plan import GearPlan
    from planner.profile import Profile
    from planner.records import Records
    from planner.simulator.load import Load


# Every tick of the gear loop is kept. Planning for slow models simulates weeks, nothing simulates years.
_LONGEST_S = 366 * 86_400.0


@dataclass(frozen=True, eq=False)
class Simulation:
    """What became of a load of n requests and r rows; times in seconds from its start.

    latency_s [n] counts from the scheduled time and is NaN for refused requests. gear [n] is the one in which the
    request's last row left, as an index into the family's gears (-1: none did); stage [r] answered the row (-1:
    refused), and cut [r] says that it was not certain of it but the next one would have been too late. Ticks are those
    of the gear loop; tick_layout is the layout that is left while a transition is under way, which tick_changing tells.
    busy_s is device-seconds done per endpoint, batches and batch_rows what was sent per
    model, and in_system_at_end the requests unanswered when the last one arrived.

    `log` has the first batches by departure, as many as were asked for; refused_s [n] is when a request was refused
    (NaN: it was not), and empty where no log was asked for.
    """

    load: Load
    latency_s: NDArray[np.float64]
    gear: NDArray[np.int16]
    stage: NDArray[np.int8]
    right: NDArray[np.bool_]
    cut: NDArray[np.bool_]
    tick_s: NDArray[np.float64]
    tick_gear: NDArray[np.int16]
    tick_layout: NDArray[np.int16]
    tick_changing: NDArray[np.bool_]
    tick_demand_per_s: NDArray[np.float64]
    busy_s: dict[str, float]
    batches: dict[str, int]
    batch_rows: dict[str, int]
    in_system_at_end: int
    refused_s: NDArray[np.float64]
    log: state.Log

    @property
    def refused(self) -> int:
        """Requests without an answer."""
        return int(np.isnan(self.latency_s).sum())

    def quantile_s(self, share: float, *, from_s: float = 0.0) -> float:
        """Latency quantile of the requests scheduled from `from_s` on; refused ones count as infinitely late."""
        return self.quantiles_s((share,), from_s=from_s)[0]

    def quantiles_s(self, shares: Sequence[float], *, from_s: float = 0.0) -> list[float]:
        """Several of them at once, which takes little more than one."""
        latency_s = np.where(np.isnan(self.latency_s), np.inf, self.latency_s)[self.load.times_s >= from_s]
        if not len(latency_s):
            return [0.0] * len(shares)
        found: list[float] = np.quantile(latency_s, shares, method="inverted_cdf").tolist()
        return found

    @property
    def accuracy(self) -> float | None:
        """Share of the answered rows that are right."""
        answered = self.stage >= 0
        return float(self.right[answered].mean()) if answered.any() else None


class Simulator:
    """Runs loads through one family of a plan on simulated endpoints.

    Devices are those of the profiles, what the policy believes of them is the plan's busy times.
    """

    def __init__(self, plan: GearPlan, family: str, records: Records, devices: Mapping[str, Profile]) -> None:
        """`devices` is the profile of every endpoint by name, in the order of the cluster file, which breaks ties.

        What the orchestrator itself costs is taken from the first profile that has it.
        """
        self._plan = plan
        self.family = plan.families[family]
        self._front = next((profile.front for profile in devices.values() if profile.front), None) or FrontCost()
        self._endpoints = list(devices)
        self._layouts = [layout.name for layout in plan.layouts]
        self._served, self._right, self._model_right = build_served(plan, family, records, devices)
        self._layout_of = layout_of_states(plan, family, devices)

    def run(
        self,
        load: Load,
        *,
        timeout_s: float | NDArray[np.float64] | None = None,
        hold_gear: str | None = None,
        layout: str | None = None,
        logged_batches: int = 0,
    ) -> Simulation:
        """Send a load; `hold_gear` keeps one gear whatever the demand, and `logged_batches` at most are logged.

        `timeout_s` is of all requests, or [n] of each. The default is that of the orchestrator for small requests, 4
        SLOs; it gives large ones longer.

        Raises:
            UsageError: the run would last too long.

        """
        offset = np.concatenate(([0], np.cumsum(load.rows)))
        work = np.ones(len(load.rows)) if load.work is None else load.work
        timeout_s = DEADLINE_SLOS * self.family.slo_s if timeout_s is None else timeout_s
        sent = state.Load(
            times_s=load.times_s,
            offset=offset,
            record=load.row_index,
            request=np.repeat(np.arange(len(load.rows)), load.rows),
            work=work,
            timeout_s=np.full(len(load.rows), timeout_s, np.float64),
        )
        rows = state.empty_rows(sent, logged=logged_batches > 0)
        queues = state.empty_queues(len(self.family.models))
        endpoints = len(self._endpoints)
        flights = state.idle_flights(endpoints, int(self._served.slots.max()) + 1, logged_batches=logged_batches)
        devices = state.idle_devices(endpoints, len(self.family.models))
        # an integer would be another signature, and the kernel compiled again
        knobs = self._knobs(hold_gear, layout, float(load.duration_s))
        last_s = max(load.duration_s, float(load.times_s[-1])) + float(sent.timeout_s.max())
        if not last_s <= _LONGEST_S:
            raise UsageError(
                f"load and deadline of a request together last {last_s:.6g} s, but at most {_LONGEST_S:.0f} s are "
                "simulated; give a shorter load, or a shorter timeout or SLO"
            )
        room = int(last_s / TICK_S) + 2
        ticks = state.Ticks(np.zeros(room, np.int16), np.zeros(room, np.int16), np.zeros(room))
        first = knobs.held_gear if hold_gear is not None else int(self._served.layout_gear[knobs.first_layout, 0])
        control = state.first_gear(first, knobs.first_layout)
        waiting = np.empty(len(load.rows) + len(flights.phase), np.int64)
        num_ticks, unanswered = kernel.run(
            self._served, knobs, sent, rows, queues, flights, devices, control, ticks, state.first_door(), waiting
        )
        num_ticks = min(num_ticks, room)
        answered = np.repeat(~np.isnan(rows.latency_s), load.rows)
        entry = self._served.gear_entry[rows.gear]
        cut = (rows.how == state.CUT) & answered
        right = self._right[entry, load.row_index] & answered
        right[cut] = self._model_right[self._served.stage_model[entry[cut], rows.stage[cut]], load.row_index[cut]]
        models = list(self.family.models)
        return Simulation(
            load=load,
            latency_s=rows.latency_s,
            gear=rows.gear[offset[1:] - 1],
            stage=np.where(answered, rows.stage, np.int8(-1)),
            right=right,
            cut=cut,
            tick_s=TICK_S * np.arange(1, num_ticks + 1),
            tick_gear=ticks.gear[:num_ticks],
            tick_layout=self._layout_of[ticks.layout[:num_ticks]],
            tick_changing=ticks.layout[:num_ticks] >= len(self._layouts),
            tick_demand_per_s=ticks.demand_per_s[:num_ticks],
            busy_s=dict(zip(self._endpoints, devices.done_s.tolist(), strict=True)),
            batches=dict(zip(models, devices.batches.tolist(), strict=True)),
            batch_rows=dict(zip(models, devices.batch_rows.tolist(), strict=True)),
            in_system_at_end=unanswered,
            refused_s=rows.refused_s,
            log=state.Log._make(column[: devices.batches.sum()] for column in flights.log),
        )

    def _knobs(self, hold_gear: str | None, layout: str | None, until_s: float) -> state.Knobs:
        switching, scheduling, front = self._plan.switching, self._plan.scheduling, self._front
        gears = [gear.name for gear in self.family.gears]
        held = state.NONE if hold_gear is None else gears.index(hold_gear)
        first = 0 if layout is None else self._layouts.index(layout)
        if hold_gear is not None:
            first = self._layouts.index(self.family.gears[held].layout)
        return state.Knobs(
            slo_s=self.family.slo_s,
            dispersion=self.family.dispersion,
            gear_dwell_s=switching.gear_dwell_s,
            layout_up_after_s=switching.layout_up_after_s,
            layout_down_after_s=switching.layout_down_after_s,
            layout_down_fraction=switching.layout_down_fraction,
            balancer=BALANCERS.index(scheduling.balancer),
            order=ORDERS.index(scheduling.order),
            admission=ADMISSIONS.index(scheduling.admission),
            request_s=front.request_s,
            answer_s=front.answer_s,
            batch_s=front.batch_s,
            row_s=front.row_s,
            path_s=front.path_s,
            held_gear=held,
            first_layout=first,
            until_s=until_s,
        )
