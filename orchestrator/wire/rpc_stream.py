"""ModelStreamInfer: many requests on one stream, each with one answer, in the order of the requests."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from tritonclient.grpc import service_pb2

from cascadeserve.errors import Unavailable
from orchestrator.wire.status import SHUTTING_DOWN

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

# Requests of one stream under way or waiting to be sent back. Beyond them the stream is not read, and gRPC's flow
# control makes its client wait.
MAX_OPEN = 256
# Every answer is the only one of its request, so it is the last.
_FINAL = "triton_final_response"


async def answer_stream(
    requests: AsyncIterator[Any], infer: Callable[[Any], Awaitable[tuple[Any, str]]], ending: asyncio.Event
) -> AsyncIterator[Any]:
    """Answer each message with one ModelStreamInferResponse.

    `infer` returns a ModelInferResponse and an empty sentence, or None and what was wrong. One request that fails takes
    no other with it.

    Raises:
        Unavailable: `ending` was set before the client had sent its last message; what was read of it is answered.

    """
    answers: asyncio.Queue[asyncio.Task[Any] | None] = asyncio.Queue()
    room = asyncio.Semaphore(MAX_OPEN)
    reader = asyncio.create_task(_read(requests, infer, answers, room), name="stream-reader")
    reader.add_done_callback(lambda _: answers.put_nowait(None))
    end = asyncio.create_task(_stop_reading(reader, ending), name="stream-end")
    try:
        while (task := await answers.get()) is not None:
            room.release()
            yield await task
        if reader.cancelled():
            raise Unavailable(SHUTTING_DOWN)
        reader.result()
    finally:
        # If this comes early, the client left: nobody waits for what is under way.
        reader.cancel()
        end.cancel()
        await asyncio.gather(reader, end, return_exceptions=True)
        left = []
        while not answers.empty():
            if (task := answers.get_nowait()) is not None:
                task.cancel()
                left.append(task)
        await asyncio.gather(*left, return_exceptions=True)


async def _read(
    requests: AsyncIterator[Any],
    infer: Callable[[Any], Awaitable[tuple[Any, str]]],
    answers: asyncio.Queue[asyncio.Task[Any] | None],
    room: asyncio.Semaphore,
) -> None:
    async for request in requests:
        answers.put_nowait(asyncio.create_task(_answer(request, infer), name="stream-infer"))
        # before the next one is read: what is read will be answered
        await room.acquire()


async def _stop_reading(reader: asyncio.Task[None], ending: asyncio.Event) -> None:
    await ending.wait()
    reader.cancel()


async def _answer(request: Any, infer: Callable[[Any], Awaitable[tuple[Any, str]]]) -> Any:  # noqa: ANN401
    response, wrong = await infer(request)
    if wrong:
        # Triton's clients find the request by its id.
        return service_pb2.ModelStreamInferResponse(
            error_message=wrong, infer_response={"id": getattr(request, "id", "")}
        )
    response.parameters[_FINAL].bool_param = True
    return service_pb2.ModelStreamInferResponse(infer_response=response)
