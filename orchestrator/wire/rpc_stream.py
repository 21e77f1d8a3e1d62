"""ModelStreamInfer: many requests on one stream, each with one answer, in the order of the requests."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from tritonclient.grpc import service_pb2

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

# Requests of one stream under way or waiting to be sent back. Beyond them the stream is not read, and gRPC's flow
# control makes its client wait.
MAX_OPEN = 256
# Every answer is the only one of its request, so it is the last.
_FINAL = "triton_final_response"


async def answer_stream(
    requests: AsyncIterator[Any], infer: Callable[[Any], Awaitable[tuple[Any, str]]]
) -> AsyncIterator[Any]:
    """Answer each message with one ModelStreamInferResponse.

    `infer` returns a ModelInferResponse and an empty sentence, or None and what was wrong. One request that fails takes
    no other with it.
    """
    answers: asyncio.Queue[asyncio.Task[Any] | None] = asyncio.Queue(MAX_OPEN)
    reader = asyncio.create_task(_read(requests, infer, answers), name="stream-reader")
    try:
        while (task := await answers.get()) is not None:
            yield await task
        await reader
    finally:
        # The client left or the server stops: nobody waits for what is under way.
        reader.cancel()
        await asyncio.gather(reader, return_exceptions=True)
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
) -> None:
    try:
        async for request in requests:
            await _put(answers, asyncio.create_task(_answer(request, infer), name="stream-infer"))
    except Exception:
        await answers.put(None)
        raise
    # Not when cancelled: then nobody takes anything out any more.
    await answers.put(None)


async def _put(answers: asyncio.Queue[asyncio.Task[Any] | None], task: asyncio.Task[Any]) -> None:
    try:
        await answers.put(task)
    except asyncio.CancelledError:
        task.cancel()
        raise


async def _answer(request: Any, infer: Callable[[Any], Awaitable[tuple[Any, str]]]) -> Any:  # noqa: ANN401
    response, wrong = await infer(request)
    if wrong:
        # Triton's clients find the request by its id.
        return service_pb2.ModelStreamInferResponse(
            error_message=wrong, infer_response={"id": getattr(request, "id", "")}
        )
    response.parameters[_FINAL].bool_param = True
    return service_pb2.ModelStreamInferResponse(infer_response=response)
