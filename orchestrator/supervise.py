"""Background tasks that must not end: a control loop that dies silently leaves a server that looks well."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

_log = logging.getLogger(__name__)


class LoopEnded(Exception):  # noqa: N818 - named by what happened
    """A task that runs forever has returned."""


async def forever(name: str, run: Callable[[], Awaitable[None]]) -> None:
    """Run a forever-task; an end of any kind but cancellation is logged and raised to the task group."""
    try:
        await run()
    except asyncio.CancelledError:
        raise
    except BaseException:
        _log.exception("%s failed", name)
        raise
    message = f"{name} returned, but it must run forever"
    raise LoopEnded(message)


class Kick:
    """Wakes a loop that otherwise sleeps for its period."""

    def __init__(self) -> None:
        """Not kicked."""
        self._event = asyncio.Event()

    def __call__(self) -> None:
        """Wake the loop now."""
        self._event.set()

    async def wait(self, period_s: float) -> None:
        """Sleep for `period_s` or until kicked."""
        try:
            await asyncio.wait_for(self._event.wait(), period_s)
        except TimeoutError:
            return
        self._event.clear()
        task = asyncio.current_task()
        if task is not None and task.cancelling():
            # wait_for loses a cancellation that comes together with a kick (3.11)
            raise asyncio.CancelledError
