"""Watches the event loop: whatever holds it up holds up every request."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orchestrator.metrics import Metrics

_PERIOD_S = 0.05


async def watch_loop(metrics: Metrics) -> None:
    """Sleep again and again, and record how much later than asked for it ended."""
    loop = asyncio.get_running_loop()
    while True:
        due_s = loop.time() + _PERIOD_S
        await asyncio.sleep(_PERIOD_S)
        metrics.loop_lag(loop.time() - due_s)
