"""A model whose Python process has ended: every request to it fails while all readiness checks stay green (2.51).

A plain load changes nothing, and a full reload by a changed config holds the old and the new instances in memory at
once. Unloading and loading took half a second here and needs neither more memory nor the config file; the model can
answer nothing meanwhile, but it could not before.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from orchestrator.backend import ModelVersion
    from orchestrator.state import EndpointState

_log = logging.getLogger(__name__)

_TIMEOUT_S = 300.0


async def load_anew(endpoint: EndpointState, model: str, ensembles: Sequence[str]) -> dict[ModelVersion, int]:
    """Unload and load a model, then the ensembles made of it, which went with it; returns what stands then.

    Raises:
        BackendError: it does not stand again.

    """
    _log.warning("endpoint %s: the Python process of %s has ended; loading it anew", endpoint.name, model)
    backend = endpoint.backend
    await backend.unload(model, timeout_s=_TIMEOUT_S)
    for name in (model, *ensembles):
        await backend.load(name, timeout_s=_TIMEOUT_S)
        endpoint.loads[name] += 1
    return await backend.instance_counts(timeout_s=_TIMEOUT_S)
