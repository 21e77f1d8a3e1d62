from __future__ import annotations

import asyncio
import logging
from typing import NoReturn

import pytest

from orchestrator.supervise import Kick, LoopEnded, forever


async def never_ends() -> None:
    await asyncio.Event().wait()


async def test_an_error_of_a_loop_is_logged_by_name_and_raised(caplog: pytest.LogCaptureFixture) -> None:
    async def fails() -> NoReturn:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        await forever("gear-loop", fails)
    assert [record.getMessage() for record in caplog.records] == ["gear-loop failed"]
    assert caplog.records[0].exc_info is not None


async def test_a_loop_that_returns_is_an_error() -> None:
    async def returns() -> None:
        return

    with pytest.raises(LoopEnded, match="gear-loop returned"):
        await forever("gear-loop", returns)


async def test_a_loop_that_is_cancelled_ends_without_an_alarm(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    task = asyncio.create_task(forever("gear-loop", never_ends))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not [record for record in caplog.records if record.name.startswith("orchestrator")]


async def test_the_end_of_one_loop_ends_its_whole_task_group() -> None:
    async def returns() -> None:
        return

    others: list[asyncio.Task[None]] = []

    async def run_both() -> None:
        async with asyncio.TaskGroup() as group:
            others.append(group.create_task(forever("other", never_ends)))
            group.create_task(forever("gear-loop", returns))

    with pytest.raises(ExceptionGroup) as caught:
        await run_both()
    assert caught.group_contains(LoopEnded)
    assert others[0].cancelled()


@pytest.mark.looptime
async def test_without_a_kick_the_period_is_slept() -> None:
    loop = asyncio.get_running_loop()
    started_s = loop.time()
    await Kick().wait(30.0)
    assert loop.time() - started_s == pytest.approx(30.0, abs=0.01)


@pytest.mark.looptime
async def test_a_kick_wakes_the_sleeper_and_is_used_up() -> None:
    loop, kick = asyncio.get_running_loop(), Kick()
    loop.call_later(2.0, kick)
    started_s = loop.time()
    await kick.wait(30.0)
    assert loop.time() - started_s == pytest.approx(2.0, abs=0.01)
    await kick.wait(30.0)
    assert loop.time() - started_s == pytest.approx(32.0, abs=0.01)


@pytest.mark.looptime
async def test_a_kick_while_nobody_sleeps_is_kept_and_several_count_as_one() -> None:
    loop, kick = asyncio.get_running_loop(), Kick()
    kick()
    kick()
    started_s = loop.time()
    await kick.wait(30.0)
    assert loop.time() == pytest.approx(started_s, abs=0.01)
    await kick.wait(30.0)
    assert loop.time() - started_s == pytest.approx(30.0, abs=0.01)
