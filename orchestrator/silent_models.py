"""Notices a model that hangs at an endpoint, whose server is there, while others answer for it.

A server that hangs as a whole is found sooner, by `health`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

    from orchestrator.backend import ModelVersion
    from orchestrator.state import EndpointState

# A model that has answered no batch for so long, and for so many times what all in flight there are expected to need,
# hangs, if other endpoints answered so many batches of it meanwhile.
SILENCE_S = 2.0
SILENCE_WORKS = 16.0
OTHER_ANSWERS = 3


class _Noted(NamedTuple):
    """How many answers of the model there were here and elsewhere when silence began."""

    here: int
    elsewhere: int
    since_s: float


class SilentModels:
    """Looks at one endpoint again and again."""

    def __init__(self, endpoint: EndpointState, endpoints: Sequence[EndpointState]) -> None:
        """Nothing is silent yet; `endpoints` are all."""
        self._endpoint = endpoint
        self._others = [each for each in endpoints if each is not endpoint]
        self._noted: dict[ModelVersion, _Noted] = {}

    def find(self, now_s: float) -> list[ModelVersion]:
        """Models that hang."""
        endpoint = self._endpoint
        limit_s = max(SILENCE_S, SILENCE_WORKS * endpoint.work_s / endpoint.slots)
        silent = []
        for model, in_flight in endpoint.in_flight_by_model.items():
            here = endpoint.answers_by_model.get(model, 0)
            elsewhere = sum(each.answers_by_model.get(model, 0) for each in self._others)
            noted = self._noted.get(model)
            if noted is None or not in_flight or here != noted.here:
                self._noted[model] = _Noted(here, elsewhere, now_s)
            elif now_s - noted.since_s > limit_s and elsewhere - noted.elsewhere >= OTHER_ANSWERS:
                silent.append(model)
        return silent
