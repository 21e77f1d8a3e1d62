"""The calls of a gRPC server with one request and one answer, from their beginning until their answer is taken.

gRPC itself would wait for the rest of a request, and for a client to take its answer, for ever.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from orchestrator.wire.rpc_unread import Unread

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from orchestrator.wire.limits import Limits

    Context = grpc.aio.ServicerContext[Any, Any]

# of the time that a request has, how much goes by between two looks
_LOOK = 0.25
# So many requests may be arriving, whatever the limit of calls: those of a burst do, for a moment.
_MIN_ARRIVING = 100


class Calls:
    """Where they are too many, those make room whose clients owe something."""

    def __init__(self, limits: Limits) -> None:
        """Calls whose request has not come take no more than a quarter of all places."""
        self._timeout_s = limits.client_timeout_s
        self._max_open = limits.max_connections
        self._num_open = 0
        self._max_arriving = max(limits.max_connections // 4, _MIN_ARRIVING)
        self._loop = asyncio.get_running_loop()
        # since when, the oldest first
        self._arriving: dict[asyncio.Task[Any], float] = {}
        self._unread = Unread(limits.client_timeout_s)
        # what those that were cut off are told
        self._cut: dict[asyncio.Task[Any], tuple[grpc.StatusCode, str]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def handler(
        self,
        rpc: Callable[[Any, Context], Awaitable[Any]],
        request_deserializer: Callable[[bytes], Any] | None,
        response_serializer: Callable[[Any], bytes],
    ) -> grpc.RpcMethodHandler[Any, Any]:
        """Bind an RPC with one request and one answer; a request that does not arrive ends it."""

        async def answer(_requests: Any, context: Context) -> bytes:  # noqa: ANN401 - untyped protobuf
            if self._num_open + len(self._unread) >= self._max_open and not self._make_room():
                await context.abort(
                    grpc.StatusCode.RESOURCE_EXHAUSTED, f"{self._max_open} calls are under way; try again shortly"
                )
            self._num_open += 1
            try:
                sent = response_serializer(await rpc(await self._read(context), context))
            finally:
                self._num_open -= 1
            # gRPC sends the answer in the same task
            task = asyncio.current_task()
            assert task is not None
            self._unread.begin(task, len(sent), context.peer())
            task.add_done_callback(self._unread.end)
            return sent

        # As if it were a stream: its handler runs from the beginning, and reads the request itself.
        return grpc.stream_unary_rpc_method_handler(answer, request_deserializer=request_deserializer)

    async def _read(self, context: Context) -> Any:  # noqa: ANN401
        task = asyncio.current_task()
        assert task is not None
        if len(self._arriving) >= self._max_arriving:
            self._cut_oldest()
        self._arriving[task] = self._loop.time()
        if self._timer is None:
            self._wait()
        try:
            request = await context.read()
        except asyncio.CancelledError:
            if task not in self._cut:
                raise
            task.uncancel()
            await context.abort(*self._cut[task])
        finally:
            self._arriving.pop(task, None)
            self._cut.pop(task, None)
        if request is grpc.aio.EOF:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the call ended without a request")
        return request

    def _make_room(self) -> bool:
        if self._unread.make_room():
            return True
        if self._arriving:
            self._cut_oldest()
            return True
        return False

    def _cut_oldest(self) -> None:
        oldest = next(iter(self._arriving))
        sentence = "the request did not arrive and another one needed its place"
        self._cut_off(oldest, grpc.StatusCode.UNAVAILABLE, sentence)

    def _cut_off(self, task: asyncio.Task[Any], code: grpc.StatusCode, sentence: str) -> None:
        del self._arriving[task]
        self._cut[task] = (code, sentence)
        task.cancel()

    def _wait(self) -> None:
        self._timer = self._loop.call_later(_LOOK * self._timeout_s, self._look)

    def _look(self) -> None:
        self._timer = None
        until_s = self._loop.time() - self._timeout_s
        sentence = f"the request did not arrive within {self._timeout_s:g} s"
        for task in [task for task, since_s in self._arriving.items() if since_s <= until_s]:
            self._cut_off(task, grpc.StatusCode.DEADLINE_EXCEEDED, sentence)
        if self._arriving:
            self._wait()
