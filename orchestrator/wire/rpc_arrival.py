"""Requests of gRPC calls that do not arrive: gRPC itself would wait for the rest, and hold the beginning, for ever."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from orchestrator.wire.slow_clients import SlowClients

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    Context = grpc.aio.ServicerContext[Any, Any]

# of the time that a request has, how much goes by between two looks
_LOOK = 0.25
# So many requests may be arriving, whatever the limit of calls: those of a burst do, for a moment.
_MIN_ARRIVING = 100


class Arrivals:
    """The calls of a server whose request has not come yet."""

    def __init__(self, timeout_s: float, max_calls: int) -> None:
        """Calls whose request has not come take no more than a quarter of `max_calls`."""
        self._timeout_s = timeout_s
        self._max_arriving = max(max_calls // 4, _MIN_ARRIVING)
        self._slow: SlowClients[asyncio.Task[Any]] = SlowClients(timeout_s)
        # the oldest first
        self._arriving: dict[asyncio.Task[Any], None] = {}
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

        async def answer(_requests: Any, context: Context) -> Any:  # noqa: ANN401 - untyped protobuf
            return await rpc(await self._read(context), context)

        # As if it were a stream: its handler runs from the beginning, and reads the request itself.
        return grpc.stream_unary_rpc_method_handler(
            answer, request_deserializer=request_deserializer, response_serializer=response_serializer
        )

    async def _read(self, context: Context) -> Any:  # noqa: ANN401
        task = asyncio.current_task()
        assert task is not None
        if len(self._arriving) >= self._max_arriving:
            oldest = next(iter(self._arriving))
            self._cut_off(
                oldest, grpc.StatusCode.UNAVAILABLE, "the request did not arrive and another one needed its place"
            )
        self._arriving[task] = None
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

    def _cut_off(self, task: asyncio.Task[Any], code: grpc.StatusCode, sentence: str) -> None:
        del self._arriving[task]
        self._cut[task] = (code, sentence)
        task.cancel()

    def _wait(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(_LOOK * self._timeout_s, self._look)

    def _look(self) -> None:
        self._timer = None
        owing = ((task, 0) for task in self._arriving)
        sentence = f"the request did not arrive within {self._timeout_s:g} s"
        for task in self._slow.overdue(owing, asyncio.get_running_loop().time()):
            self._cut_off(task, grpc.StatusCode.DEADLINE_EXCEEDED, sentence)
        if self._arriving:
            self._wait()
