"""All Prometheus metrics of the orchestrator, in a registry of their own."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from orchestrator.statistics import Statistics

if TYPE_CHECKING:
    from orchestrator.backend import ModelVersion

_LATENCY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_LAG_BUCKETS_S = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
_BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """Counters and gauges, named `cascadeserve_<thing>_<unit>`."""

    def __init__(self) -> None:
        """A fresh registry, so that several orchestrators may live in one process (tests)."""
        self.registry = CollectorRegistry()
        # beside the registry: what clients ask for in the words of the protocol
        self.statistics = Statistics()
        self._models_seen: dict[str, set[ModelVersion]] = {}
        # Cached on the hot path: looking up a child costs twice what counting does.
        self._requests = cache(
            Counter(
                "cascadeserve_requests_total",
                "Requests by outcome: ok or the kind of error; Overloaded ones were refused before they were read.",
                ["family", "outcome"],
                registry=self.registry,
            ).labels
        )
        self._latency = cache(
            Histogram(
                "cascadeserve_request_latency_seconds",
                "Time from the parsed request to its complete answer.",
                ["family"],
                buckets=_LATENCY_BUCKETS_S,
                registry=self.registry,
            ).labels
        )
        self._rows = cache(
            Counter("cascadeserve_rows_total", "Rows that arrived.", ["family"], registry=self.registry).labels
        )
        self._answered = cache(
            Counter(
                "cascadeserve_rows_answered_total",
                "Rows answered, by the stage that was certain of them.",
                ["family", "stage"],
                registry=self.registry,
            ).labels
        )
        self._cut = cache(
            Counter(
                "cascadeserve_rows_cut_short_total",
                "Rows answered by a stage that was not certain of them, since the next would have been too late.",
                ["family"],
                registry=self.registry,
            ).labels
        )
        self._lag = Histogram(
            "cascadeserve_event_loop_lag_seconds",
            "How late the event loop is, looked at fifty times a second.",
            buckets=_LAG_BUCKETS_S,
            registry=self.registry,
        )
        self._wait = Gauge(
            "cascadeserve_predicted_wait_seconds",
            "What a request that comes now is expected to wait for: the event loop, and the work before it.",
            ["family"],
            registry=self.registry,
        )
        self._nan = Counter(
            "cascadeserve_nan_certainty_rows_total",
            "Rows whose model gave no number as certainty; they go on to the next stage.",
            ["model"],
            registry=self.registry,
        )
        self._batch_rows = cache(
            Histogram(
                "cascadeserve_batch_rows",
                "Rows per batch sent.",
                ["endpoint", "model"],
                buckets=_BATCH_BUCKETS,
                registry=self.registry,
            ).labels
        )
        self._batch_s = cache(
            Histogram(
                "cascadeserve_batch_seconds",
                "Time from a batch's departure to its answer.",
                ["endpoint", "model"],
                buckets=_LATENCY_BUCKETS_S,
                registry=self.registry,
            ).labels
        )
        self._batch_failures = Counter(
            "cascadeserve_batch_failures_total",
            "Batches that an endpoint did not answer or answered with an error.",
            ["endpoint", "model"],
            registry=self.registry,
        )
        self._retried = Counter(
            "cascadeserve_retried_rows_total",
            "Rows sent a second time because their batch was not begun, or failed at another endpoint.",
            ["model"],
            registry=self.registry,
        )
        self._suspects = Counter(
            "cascadeserve_suspect_rows_total",
            "Rows in flight when their endpoint or their model's Python process went away; each is tried alone.",
            ["model"],
            registry=self.registry,
        )
        self._poison = Counter(
            "cascadeserve_poison_rows_total",
            "Rows refused because they failed alone, with an error or a crash.",
            ["model", "failure"],
            registry=self.registry,
        )
        self._demand = Gauge(
            "cascadeserve_demand_rows_per_second",
            "Arrival rate plus unplanned backlog over the drain time.",
            ["family"],
            registry=self.registry,
        )
        self._share = Gauge(
            "cascadeserve_available_device_share",
            "Share of the device time that the family may use: what the others leave, at least what is guaranteed.",
            ["family"],
            registry=self.registry,
        )
        self._queued = Gauge("cascadeserve_queued_rows", "Rows waiting for a model.", ["model"], registry=self.registry)
        self._gear = Gauge(
            "cascadeserve_gear_in_force", "1 for the gear in force, 0 for others.", ["family", "gear"],
            registry=self.registry,
        )  # fmt: skip
        self._shifts = Counter(
            "cascadeserve_gear_shifts_total", "Gear shifts.", ["family", "direction"], registry=self.registry
        )
        self._endpoint_up = Gauge(
            "cascadeserve_endpoint_up", "1 while the endpoint is sent to.", ["endpoint"], registry=self.registry
        )
        self._instances = Gauge(
            "cascadeserve_instances", "Instances as the endpoint reports them.", ["endpoint", "model", "version"],
            registry=self.registry,
        )  # fmt: skip
        self._layout = Gauge(
            "cascadeserve_layout_in_force", "1 for the layout in force, 0 for others.", ["layout"],
            registry=self.registry,
        )  # fmt: skip
        self._plan = Gauge(
            "cascadeserve_plan_in_force", "1 for the gear plan in force, 0 for former ones.", ["plan"],
            registry=self.registry,
        )  # fmt: skip
        self._plan_changes = Counter(
            "cascadeserve_plan_changes_total",
            "New gear plans by outcome: ok or refused.",
            ["outcome"],
            registry=self.registry,
        )
        self._instance_changes = Counter(
            "cascadeserve_instance_changes_total",
            "Instance-group changes by outcome: ok or failed.",
            ["endpoint", "model", "outcome"],
            registry=self.registry,
        )

        self._failing = Gauge(
            "cascadeserve_instance_change_failing",
            "1 while changing the instances of a model fails and is tried again; what stood before serves on.",
            ["endpoint", "model"],
            registry=self.registry,
        )
        self._model_failing = Gauge(
            "cascadeserve_model_failing",
            "1 while a model answers errors only at an endpoint, for rows that others answer; nothing is sent to it.",
            ["endpoint", "model"],
            registry=self.registry,
        )
        self._passed_s = Histogram(
            "cascadeserve_passed_request_seconds",
            "Time to the answer of requests that were passed on to a model that is no cascade, from its slot on.",
            ["endpoint", "model"],
            buckets=_LATENCY_BUCKETS_S,
            registry=self.registry,
        )
        self._foreign = Gauge(
            "cascadeserve_foreign_requests",
            "Requests that wait at an endpoint and are not of this orchestrator, once that is sure.",
            ["endpoint"],
            registry=self.registry,
        )
        self._void = Gauge(
            "cascadeserve_certificate_void",
            "1 where a model answers the probe rows of the certificate otherwise than when it was recorded.",
            ["family", "endpoint", "model"],
            registry=self.registry,
        )
        self._void_seen: set[tuple[str, str, str]] = set()

    def render(self) -> tuple[bytes, str]:
        """Exposition text and its content type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST

    def arrived(self, family: str, rows: int) -> None:
        """Count a request's rows."""
        self._rows(family).inc(rows)

    def request(self, family: str, outcome: str, latency_s: float) -> None:
        """Count a finished request."""
        self._requests(family, outcome).inc()
        if outcome == "ok":
            self._latency(family).observe(latency_s)

    def answered(self, family: str, stage: int, rows: int) -> None:
        """Count rows that a stage answered."""
        self._answered(family, str(stage)).inc(rows)

    def cut_short(self, family: str, rows: int) -> None:
        """Count rows that were answered before a stage was certain of them."""
        self._cut(family).inc(rows)

    def loop_lag(self, lag_s: float) -> None:
        """Record how late the event loop is."""
        self._lag.observe(lag_s)

    def predicted_wait(self, family: str, wait_s: float) -> None:
        """Show what a request that comes now would wait."""
        self._wait.labels(family).set(wait_s)

    def nan_certainty(self, model: str, rows: int) -> None:
        """Count rows whose certainty was no number."""
        self._nan.labels(model).inc(rows)

    def batch(self, endpoint: str, model: str, rows: int, duration_s: float) -> None:
        """Record an answered batch."""
        self._batch_rows(endpoint, model).observe(rows)
        self._batch_s(endpoint, model).observe(duration_s)

    def batch_failed(self, endpoint: str, model: str) -> None:
        """Count a failed batch."""
        self._batch_failures.labels(endpoint, model).inc()

    def retried(self, model: str, rows: int) -> None:
        """Count rows that are sent again."""
        self._retried.labels(model).inc(rows)

    def suspects(self, model: str, rows: int) -> None:
        """Count rows that may have caused a crash."""
        self._suspects.labels(model).inc(rows)

    def poison(self, model: str, failure: str) -> None:
        """Count a row that failed alone."""
        self._poison.labels(model, failure).inc()

    def load(self, family: str, demand_per_s: float, queued_rows: dict[str, int]) -> None:
        """Show demand and queues."""
        self._demand.labels(family).set(demand_per_s)
        for model, rows in queued_rows.items():
            self._queued.labels(model).set(rows)

    def share(self, family: str, available: float) -> None:
        """Show the share of the device time that a family may use."""
        self._share.labels(family).set(available)

    def gear(self, family: str, gears: list[str], in_force: str, direction: str | None) -> None:
        """Show the gear in force; `direction` counts a shift."""
        for name in gears:
            self._gear.labels(family, name).set(name == in_force)
        if direction is not None:
            self._shifts.labels(family, direction).inc()

    def layout(self, layouts: list[str], in_force: str) -> None:
        """Show the layout in force."""
        for name in layouts:
            self._layout.labels(name).set(name == in_force)

    def plan(self, in_force: str, *, former: str | None = None) -> None:
        """Show the gear plan in force."""
        if former is not None:
            self._plan.labels(former).set(0)
        self._plan.labels(in_force).set(1)

    def plan_change(self, outcome: str) -> None:
        """Count a new gear plan that was asked for."""
        self._plan_changes.labels(outcome).inc()

    def endpoint(self, name: str, *, up: bool, instances: dict[ModelVersion, int]) -> None:
        """Show an endpoint's state."""
        self._endpoint_up.labels(name).set(up)
        seen = self._models_seen.setdefault(name, set())
        seen.update(instances)
        for model in seen:  # one that is gone shows 0, not what it had last
            self._instances.labels(name, model.name, model.version).set(instances.get(model, 0))

    def instance_change(self, endpoint: str, model: str, outcome: str) -> None:
        """Count an instance-group change."""
        self._instance_changes.labels(endpoint, model, outcome).inc()

    def instance_change_failing(self, endpoint: str, model: str, *, failing: bool) -> None:
        """Raise or end the alarm about a change that fails."""
        self._failing.labels(endpoint, model).set(failing)

    def model_failing(self, endpoint: str, model: str, *, failing: bool) -> None:
        """Raise or end the alarm about a model that answers errors only."""
        self._model_failing.labels(endpoint, model).set(failing)

    def passed(self, endpoint: str, model: str, duration_s: float) -> None:
        """Record a request that was passed on and answered."""
        self._passed_s.labels(endpoint, model).observe(duration_s)

    def foreign_load(self, endpoint: str, requests: int) -> None:
        """Show the requests of others."""
        self._foreign.labels(endpoint).set(requests)

    def certificate_void(self, endpoint: str, models: set[tuple[str, str]]) -> None:
        """Raise the alarm about these models of an endpoint, each with its family, and end that about others there."""
        void = {(family, endpoint, model) for family, model in models}
        self._void_seen |= void
        for place in self._void_seen:
            if place[1] == endpoint:
                self._void.labels(*place).set(place in void)
