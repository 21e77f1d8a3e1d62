"""A device in virtual time: batches take what the plan says, and share it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import numpy as np

from orchestrator.backend import BatchAnswer, ModelVersion

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from cascadeserve.gear_plan import GearPlan


class SharedDevice:
    """A backend with the models of all families of a plan, each batch of which travels for `way_s` there and back.

    Running batches share one slot evenly; batches of one model run one after the other.
    """

    def __init__(self, plan: GearPlan, endpoint: str, *, way_s: float) -> None:
        """It takes for a batch what the plan says."""
        self._endpoint = endpoint
        self._way_s = way_s
        self._models = {name: model for family in plan.families.values() for name, model in family.models.items()}
        self._standing = plan.layouts[0].instances[endpoint]
        self._loop = asyncio.get_running_loop()
        self._running: dict[str, tuple[float, asyncio.Future[None]]] = {}
        self._queue: list[tuple[str, float, asyncio.Future[None]]] = []
        self._as_of_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    async def infer(
        self,
        model: ModelVersion,
        specs: Sequence[Any],
        inputs: Sequence[NDArray[Any]],
        *,
        want_scores: bool,
        timeout_s: float,
    ) -> BatchAnswer:
        """Certainties stand in column 1 of the input, in column 2 what a row takes beyond one; the label is 0."""
        del specs, want_scores, timeout_s
        rows = inputs[0]
        await asyncio.sleep(self._way_s / 2)
        finished = self._loop.create_future()
        self._count_work()
        busy_s = self._models[model.name].batch_busy_s(len(rows) + float(rows[:, 2].sum()), self._endpoint)
        self._queue.append((model.name, busy_s, finished))
        self._start()
        await finished
        await asyncio.sleep(self._way_s / 2)
        return BatchAnswer(np.zeros(len(rows), np.int64), rows[:, 1].copy(), None)

    async def is_live(self, *, timeout_s: float) -> bool:  # noqa: ARG002
        """Always."""
        return True

    async def instance_counts(self, *, timeout_s: float) -> dict[ModelVersion, int]:  # noqa: ARG002
        """Those of the first layout."""
        return {ModelVersion(model, 1): count for model, count in self._standing.items()}

    async def load(self, model: str, *, timeout_s: float) -> None:
        """Never asked for."""
        raise NotImplementedError

    async def unload(self, model: str, *, timeout_s: float, to_its_end: bool = False) -> None:
        """Never asked for."""
        raise NotImplementedError

    async def close(self) -> None:
        """Nothing to close."""

    def _count_work(self) -> None:
        now_s = self._loop.time()
        share_s = (now_s - self._as_of_s) / max(len(self._running), 1)
        self._running = {model: (left_s - share_s, done) for model, (left_s, done) in self._running.items()}
        self._as_of_s = now_s

    def _start(self) -> None:
        for item in list(self._queue):
            model, work_s, finished = item
            if model not in self._running:
                self._queue.remove(item)
                self._running[model] = (work_s, finished)
        if self._timer is not None:
            self._timer.cancel()
        if self._running:
            first_s = min(left_s for left_s, _ in self._running.values()) * len(self._running)
            self._timer = self._loop.call_at(self._as_of_s + first_s, self._finish)

    def _finish(self) -> None:
        self._count_work()
        for model, (left_s, finished) in list(self._running.items()):
            if left_s < 1e-9:
                del self._running[model]
                finished.set_result(None)
        self._start()
