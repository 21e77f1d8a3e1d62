from __future__ import annotations

import asyncio
import time

import pytest

from orchestrator.loop_lag import watch_loop
from orchestrator.metrics import Metrics


async def test_what_holds_the_loop_up_is_recorded() -> None:
    metrics = Metrics()
    watching = asyncio.create_task(watch_loop(metrics))
    await asyncio.sleep(0)
    time.sleep(0.08)  # noqa: ASYNC251 - the loop is to be late
    await asyncio.sleep(0.01)
    watching.cancel()
    with pytest.raises(asyncio.CancelledError):
        await watching
    text = metrics.render()[0].decode()
    assert "cascadeserve_event_loop_lag_seconds_count 1.0" in text
    assert 'cascadeserve_event_loop_lag_seconds_bucket{le="0.02"} 0.0' in text
