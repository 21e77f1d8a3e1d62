"""Dear work in portions: one piece of it per turn of the event loop, so that nothing else waits for long."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, TypeVar

from cascadeserve.errors import Overloaded

if TYPE_CHECKING:
    from collections.abc import Callable

# Work is refused while the oldest that waits has waited for longer: less comes to an end than comes in.
_LONGEST_S = 0.25
_RETRY_AFTER_S = 1.0

_Result = TypeVar("_Result")


class Turns:
    """Pieces of work that wait for each other, first come first served."""

    def __init__(self) -> None:
        """Nothing waits yet."""
        self._lock = asyncio.Lock()
        self._loop = asyncio.get_running_loop()
        # since when the pieces that wait do so, oldest first
        self._since_s: dict[object, float] = {}

    async def run(self, work: Callable[[], _Result]) -> tuple[_Result, float]:
        """Do the work when its turn has come; whatever else is ready then runs before the next piece.

        Returns its result, and the seconds for which it has waited.

        Raises:
            Overloaded: too much waits already.

        """
        since_s = self._loop.time()
        if self._since_s and since_s - next(iter(self._since_s.values())) > _LONGEST_S:
            raise Overloaded(
                "too many large JSON requests wait to be read; send binary data", retry_after_s=_RETRY_AFTER_S
            )
        mine = object()
        self._since_s[mine] = since_s
        try:
            await self._lock.acquire()
        finally:
            del self._since_s[mine]
        waited_s = self._loop.time() - since_s
        try:
            return work(), waited_s
        finally:
            self._loop.call_soon(self._lock.release)
