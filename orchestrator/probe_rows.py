"""Puts the certificate's probe rows to every model where it came to stand, to see if it answers as it was recorded.

Where it does not, the certificate of its family is void until it does: requests are served on, but their answers say
`certified: false`.

A model is asked after its endpoint came up and after it was loaded there. Nothing waits for that: the rows take no slot
and count neither as demand nor as work, and only one such batch is at an endpoint at a time.
"""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

import numpy as np

from orchestrator.backend import BackendError

if TYPE_CHECKING:
    from cascadeserve.gear_plan import GearPlan
    from cascadeserve.probes import Probes
    from orchestrator.dispatcher import Dispatcher
    from orchestrator.metrics import Metrics
    from orchestrator.state import EndpointState, FamilyQueue, FamilyState

_log = logging.getLogger(__name__)

PERIOD_S = 0.5
# after a batch of probe rows that was not answered
AGAIN_AFTER_S = 5.0
_TIMEOUT_S = 10.0


def say_what_is_not_probed(plan: GearPlan) -> None:
    """Say which families have a certificate that nothing can be held against."""
    for name, family in plan.families.items():
        if family.certificate is not None and family.certificate.probes is None:
            _log.info(
                "%s: the certificate has no probe rows, so nothing tells whether models answer as recorded; record the "
                "calibration rows into a new file and plan anew to have some", name,
            )  # fmt: skip


class ProbeRows:
    """The probe rows of all families at one endpoint."""

    def __init__(self, endpoint: EndpointState, dispatcher: Dispatcher, metrics: Metrics) -> None:
        """Nothing was asked yet."""
        self._endpoint = endpoint
        self._dispatcher = dispatcher
        self._metrics = metrics
        # by model
        self._not_before_s: dict[str, float] = {}

    async def run(self) -> None:
        """Look forever."""
        while True:
            await self.look()
            await asyncio.sleep(PERIOD_S)

    async def look(self) -> None:
        """Ask every model that was loaded since it was last asked."""
        void: set[tuple[str, str]] = set()
        for family in tuple(self._dispatcher.families.values()):
            certificate = family.plan.certificate
            if certificate is None or certificate.probes is None:
                continue
            for model in certificate.probes.answers:
                await self._look_at(family, family.queues[model], certificate.probes)
                if (self._endpoint.name, model) in family.mismatches:
                    void.add((family.name, model))
        self._metrics.certificate_void(self._endpoint.name, void)

    async def _look_at(self, family: FamilyState, queue: FamilyQueue, probes: Probes) -> None:
        endpoint, model = self._endpoint, queue.model
        place = endpoint.name, model.name
        if endpoint.up and model not in endpoint.instances:
            family.probed.pop(place, None)
            family.mismatches.discard(place)
            return
        load = self._load_of(queue)
        now_s = asyncio.get_running_loop().time()
        if family.probed.get(place) == load or now_s < self._not_before_s.get(model.name, now_s):
            return
        # one that is reserved runs rows that may crash it, alone
        if not endpoint.hosts(model) or endpoint.reserved:
            return
        try:
            differing, example = await self._ask(family, queue, probes)
        except BackendError as error:
            _log.warning("endpoint %s: %s did not answer the probe rows: %s", endpoint.name, model, error)
            self._not_before_s[model.name] = asyncio.get_running_loop().time() + AGAIN_AFTER_S
            return
        if load != self._load_of(queue):
            return  # it may have been the former one that answered
        family.probed[place] = load
        if differing:
            family.mismatches.add(place)
            _log.error(
                "endpoint %s: %s answers %d of %d probe rows otherwise than when it was recorded (%s); the certificate "
                "of %s is void, its answers are not certified", endpoint.name, model, differing,
                len(probes.answers[model.name].label), example, family.name,
            )  # fmt: skip
        else:
            _log.info("endpoint %s: %s answers the probe rows as recorded", endpoint.name, model)
            family.mismatches.discard(place)

    def _load_of(self, queue: FamilyQueue) -> tuple[int, int]:
        """Differs from what it was if the model, or one that it is composed of, was loaded since."""
        return self._endpoint.generation, sum(self._endpoint.loads[each.name] for each in queue.occupied)

    async def _ask(self, family: FamilyState, queue: FamilyQueue, probes: Probes) -> tuple[int, str]:
        """How many rows are answered otherwise than recorded, and one of them in words."""
        specs = family.plan.inputs
        inputs = probes.tensors(specs)
        wanted = probes.answers[queue.model.name]
        room = family.plan.models[queue.model.name].max_batch
        answers = [
            await self._endpoint.backend.infer(
                queue.model, specs, [array[start : start + room] for array in inputs], want_scores=False,
                timeout_s=_TIMEOUT_S,
            )
            for start in range(0, len(wanted.label), room)
        ]  # fmt: skip
        label = np.concatenate([answer.label for answer in answers])
        certainty = np.concatenate([answer.certainty for answer in answers])
        differing = wanted.differing(label, certainty)
        if not differing.size:
            return 0, ""
        row = differing[0]
        return differing.size, (
            f"row {row}: label {label[row]}, certainty {certainty[row]:.4f}, recorded were {wanted.label[row]} "
            f"and {wanted.certainty[row]:.4f}"
        )
