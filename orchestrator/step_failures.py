"""Changes of instances that failed: when each is tried again, and the one alarm that says so."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection

    from orchestrator.backend import ModelVersion
    from orchestrator.metrics import Metrics

_log = logging.getLogger(__name__)

# A failed step is tried again after this long, doubled at every further failure.
FIRST_BACK_OFF_S = 1.0
LAST_BACK_OFF_S = 60.0


class StepFailures:
    """By endpoint and model: how often in a row, and not before when again."""

    def __init__(self, metrics: Metrics) -> None:
        """None has failed."""
        self._metrics = metrics
        self._failures: dict[tuple[str, ModelVersion], tuple[int, float]] = {}
        self._loop = asyncio.get_running_loop()

    def must_wait(self, endpoint: str, model: ModelVersion) -> bool:
        """Whether it is too early to try again."""
        _, not_before_s = self._failures.get((endpoint, model), (0, 0.0))
        return self._loop.time() < not_before_s

    def failed(self, endpoint: str, model: ModelVersion, error: Exception) -> None:
        """Count a failure; the first of several in a row is the one that is logged as an error."""
        count, _ = self._failures.get((endpoint, model), (0, 0.0))
        back_off_s = min(FIRST_BACK_OFF_S * 2**count, LAST_BACK_OFF_S)
        self._failures[endpoint, model] = (count + 1, self._loop.time() + back_off_s)
        self._metrics.instance_change(endpoint, model.name, "failed")
        self._metrics.instance_change_failing(endpoint, model.name, failing=True)
        level = logging.ERROR if count == 0 else logging.INFO
        _log.log(
            level, "endpoint %s: changing the instances of %s failed, old ones keep serving, again in %g s: %s",
            endpoint, model, back_off_s, error,
        )  # fmt: skip

    def succeeded(self, endpoint: str, model: ModelVersion) -> None:
        """Count a change that was made."""
        self._metrics.instance_change(endpoint, model.name, "ok")
        if (endpoint, model) in self._failures:
            _log.info("endpoint %s: changing the instances of %s works again", endpoint, model)
            self._forget({(endpoint, model)})

    def keep_only(self, due: Collection[tuple[str, ModelVersion]]) -> None:
        """Forget failures of changes that are not wanted any more."""
        self._forget(self._failures.keys() - due)

    def endpoint_came_up(self, endpoint: str) -> None:
        """Forget what failed at a former life of a server."""
        self._forget({key for key in self._failures if key[0] == endpoint})

    def clear(self) -> None:
        """Forget all: somebody asks for it now."""
        self._forget(set(self._failures))

    def _forget(self, keys: set[tuple[str, ModelVersion]]) -> None:
        for endpoint, model in keys:
            del self._failures[endpoint, model]
            self._metrics.instance_change_failing(endpoint, model.name, failing=False)
