"""ModelStreamInfer: many requests on one stream, each with one answer, in the order of the requests."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from tritonclient.grpc import service_pb2

from cascadeserve.errors import Unavailable
from orchestrator.wire.limits import MAX_ID_BYTES
from orchestrator.wire.rpc_unread import Unread
from orchestrator.wire.status import SHUTTING_DOWN

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable

    from orchestrator.wire.limits import Limits

    Infer = Callable[[Any], Awaitable[tuple[Any, str]]]

# Requests of one stream under way or waiting to be sent back. Beyond them the stream is not read, and gRPC's flow
# control makes its client wait.
MAX_OPEN = 256
# The same for what they hold: requests until they are answered, answers until they are sent.
MAX_HELD_BYTES = 1 << 26
# A stream on which nothing is asked and nothing is owed for so long is ended. Clients keep one open
# between the bursts of a day's work; idle HTTP connections get the same.
IDLE_S = 3600.0
_IDLE = "the stream was idle for too long; open another one"
_MAKES_ROOM = "the stream was idle and another one needed its place; open another one"
# Every answer is the only one of its request, so it is the last.
_FINAL = "triton_final_response"


class Streams:
    """The open streams of a server; where they are too many, the one that was idle for longest makes room."""

    def __init__(self, limits: Limits, read: Callable[[bytes], Any], ending: asyncio.Event) -> None:
        """`read` makes a message of its bytes.

        Once `ending` is set, streams end with the answers to what was read of them.
        """
        self.read = read
        self.ending = ending
        # Half of the calls: streams may last for long, and the others' calls go on beside them.
        self._max_open = max(limits.max_connections // 2, 1)
        self._max_held_bytes = limits.max_received_bytes
        self._unread = Unread(limits.client_timeout_s)
        self._num_open = 0
        self._held_bytes = 0
        # The longest idle one first. Those that never asked for anything go before the others.
        self._fresh: dict[_Stream, None] = {}
        self._idle: dict[_Stream, None] = {}

    async def answer(self, requests: AsyncIterator[bytes], infer: Infer, peer: str) -> AsyncGenerator[bytes, None]:
        """Answer each message of a client with one ModelStreamInferResponse; `peer` is what gRPC calls it.

        `infer` returns a ModelInferResponse and an empty sentence, or None and what was wrong. One request that fails
        takes no other with it.

        Raises:
            Unavailable: the stream ends before the client had sent its last message, and what was read of it is
                answered; or there is no room for it.

        """
        if self._num_open >= self._max_open:
            leaves = next(iter(self._fresh or self._idle), None)
            if leaves is not None:
                self.busy(leaves)
                leaves.end(_MAKES_ROOM)
            elif not self._unread.make_room():
                raise Unavailable(f"{self._max_open} streams are open and none is idle; try again later")
        stream = _Stream(self, requests, infer)
        self._num_open += 1
        self._fresh[stream] = None
        try:
            async with aclosing(stream.answers()) as answers:
                async for answer in answers:
                    self._unread.begin(stream, len(answer), peer)
                    yield answer
                    self._unread.end(stream)
        finally:
            self._unread.end(stream)
            self._num_open -= 1
            self.hold(-stream.held_bytes)
            self.busy(stream)

    def hold(self, more_bytes: int) -> None:
        """Take note of what one holds more, or less."""
        self._held_bytes += more_bytes

    def hold_much(self) -> bool:
        """Whether all together hold so much that each is read only when it holds nothing."""
        return self._held_bytes > self._max_held_bytes

    def busy(self, stream: _Stream) -> None:
        """Take note that something is asked of it."""
        self._fresh.pop(stream, None)
        self._idle.pop(stream, None)

    def idle(self, stream: _Stream) -> None:
        """Take note that nothing is owed to it any more."""
        self._idle[stream] = None


class _Stream:
    def __init__(self, streams: Streams, requests: AsyncIterator[bytes], infer: Infer) -> None:
        self._streams = streams
        self._requests = requests
        self._infer = infer
        self._answers: asyncio.Queue[asyncio.Task[bytes] | None] = asyncio.Queue()
        self._room = asyncio.Semaphore(MAX_OPEN)
        self._num_open = 0
        self.held_bytes = 0
        self._less_held = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._idle_since_s = self._loop.time()
        self._reader = asyncio.create_task(self._read(), name="stream-reader")
        self._reader.add_done_callback(lambda _: self._answers.put_nowait(None))
        self._why = ""

    def end(self, why: str) -> None:
        """Read no more of it; what was read is answered."""
        self._why = self._why or why
        self._reader.cancel()

    async def answers(self) -> AsyncGenerator[bytes, None]:
        """Answer what is read, in its order."""
        end = asyncio.create_task(self._end_in_time(), name="stream-end")
        try:
            while (task := await self._answers.get()) is not None:
                self._room.release()
                answer = await task
                yield answer
                # only now it is sent
                self._hold(-len(answer))
                self._num_open -= 1
                if not self._num_open:
                    self._idle_since_s = self._loop.time()
                    self._streams.idle(self)
                # neither is kept while the next one is waited for
                del task, answer
            if self._reader.cancelled():
                raise Unavailable(self._why)
            self._reader.result()
        finally:
            # If this comes early, the client left: nobody waits for what is under way.
            self._reader.cancel()
            end.cancel()
            await asyncio.gather(self._reader, end, return_exceptions=True)
            left = []
            while not self._answers.empty():
                if (task := self._answers.get_nowait()) is not None:
                    task.cancel()
                    left.append(task)
            await asyncio.gather(*left, return_exceptions=True)

    async def _read(self) -> None:
        async for request in self._requests:
            self._num_open += 1
            self._streams.busy(self)
            self._hold(len(request))
            self._answers.put_nowait(asyncio.create_task(self._answer(request), name="stream-infer"))
            del request
            # before the next one is read: what is read will be answered
            await self._room.acquire()
            while self.held_bytes > (0 if self._streams.hold_much() else MAX_HELD_BYTES):
                self._less_held.clear()
                await self._less_held.wait()

    async def _end_in_time(self) -> None:
        while not self._streams.ending.is_set():
            try:
                async with asyncio.timeout(IDLE_S / 4):
                    await self._streams.ending.wait()
            except TimeoutError:
                if not self._num_open and self._loop.time() - self._idle_since_s > IDLE_S:
                    self.end(_IDLE)
        self.end(SHUTTING_DOWN)

    def _hold(self, more_bytes: int) -> None:
        self.held_bytes += more_bytes
        self._streams.hold(more_bytes)
        self._less_held.set()

    async def _answer(self, data: bytes) -> bytes:
        request = self._streams.read(data)
        response, wrong = await self._infer(request)
        if wrong:
            # Triton's clients find the request by its id.
            found = getattr(request, "id", "")
            answer = service_pb2.ModelStreamInferResponse(
                error_message=wrong, infer_response={"id": found if len(found) <= MAX_ID_BYTES else ""}
            )
        else:
            response.parameters[_FINAL].bool_param = True
            answer = service_pb2.ModelStreamInferResponse(infer_response=response)
        sent: bytes = answer.SerializeToString()
        self._hold(len(sent) - len(data))
        return sent
