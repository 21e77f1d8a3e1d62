"""Dear work in portions: one piece of it per turn of the event loop, so that nothing else waits for long."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, TypeVar

from cascadeserve.errors import Overloaded

if TYPE_CHECKING:
    from collections.abc import Callable
    from concurrent.futures import ThreadPoolExecutor

# Work is refused while the oldest that waits has waited for longer: less comes to an end than comes in. It is half of
# the time that an answer is worth waiting for, within these bounds: whatever waits holds its request.
_LEAST_S, _MOST_S = 0.25, 2.0
_RETRY_AFTER_S = 1.0

_Result = TypeVar("_Result")


class Turns:
    """Pieces of work that wait for each other, first come first served."""

    def __init__(self, sentence: str) -> None:
        """Nothing waits yet; `sentence` says what waits and what to do, where that is too much."""
        self._sentence = sentence
        self._lock = asyncio.Lock()
        self._loop = asyncio.get_running_loop()
        # since when the pieces that wait do so, oldest first
        self._since_s: dict[object, float] = {}

    async def run(self, work: Callable[[], _Result], deadline_s: float | None = None) -> tuple[_Result, float]:
        """Do the work when its turn has come; whatever else is ready then runs before the next piece.

        `deadline_s` is how long the answer that it is for is worth waiting for; None where nobody knows.

        Returns its result, and the seconds for which it has waited.

        Raises:
            Overloaded: too much waits already.

        """
        waited_s = await self._begin(deadline_s)
        try:
            return work(), waited_s
        finally:
            self._loop.call_soon(self._lock.release)

    async def run_in(
        self, thread: ThreadPoolExecutor, work: Callable[[], _Result], deadline_s: float | None = None
    ) -> tuple[_Result, float]:
        """Do the same in a thread. What nobody waits for any more is done to its end, and only then is the next."""
        waited_s = await self._begin(deadline_s)
        done = thread.submit(work)
        done.add_done_callback(self._end_soon)
        return await asyncio.wrap_future(done), waited_s

    async def _begin(self, deadline_s: float | None) -> float:
        since_s = self._loop.time()
        patience_s = _LEAST_S if deadline_s is None else min(max(deadline_s / 2, _LEAST_S), _MOST_S)
        if self._since_s and since_s - next(iter(self._since_s.values())) > patience_s:
            raise Overloaded(self._sentence, retry_after_s=_RETRY_AFTER_S)
        mine = object()
        self._since_s[mine] = since_s
        try:
            await self._lock.acquire()
        finally:
            del self._since_s[mine]
        return self._loop.time() - since_s

    def _end_soon(self, _done: object) -> None:
        # the loop may have ended before its thread
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._lock.release)
