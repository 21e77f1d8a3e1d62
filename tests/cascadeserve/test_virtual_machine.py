"""Cores kept awake: only in virtual machines, at lowest priority, and gone with the block."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from cascadeserve import virtual_machine


def _spinning() -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            command = (folder / "cmdline").read_bytes().split(b"\0")
            parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
        except OSError:
            continue
        if b"cascadeserve.virtual_machine" in command and int(parent) == os.getpid():
            found.append(int(folder.name))
    return found


@pytest.mark.parametrize("driver", ["none", "haltpoll"])
async def test_one_loop_per_core_at_lowest_priority_where_the_kernel_does_not_heed_the_wish(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, driver: str
) -> None:
    (tmp_path / "driver").write_text(f"{driver}\n")
    monkeypatch.setattr(virtual_machine, "is_virtual", lambda: True)
    monkeypatch.setattr(virtual_machine, "_IDLE_DRIVER", tmp_path / "driver")
    monkeypatch.setattr(virtual_machine, "_WAKING_LATENCY", tmp_path / "absent" / "file")
    async with virtual_machine.cores_kept_awake() as held:
        assert held
        for _ in range(200):
            pids = _spinning()
            if len(pids) == len(os.sched_getaffinity(0)) and all(
                os.sched_getscheduler(pid) == os.SCHED_IDLE for pid in pids
            ):
                break
            await asyncio.sleep(0.05)
        assert {tuple(os.sched_getaffinity(pid)) for pid in pids} == {(core,) for core in os.sched_getaffinity(0)}
        assert {os.sched_getscheduler(pid) for pid in pids} == {os.SCHED_IDLE}
    assert _spinning() == []


async def test_the_kernel_is_asked_where_it_heeds_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "driver").write_text("haltpoll\n")
    monkeypatch.setattr(virtual_machine, "is_virtual", lambda: True)
    monkeypatch.setattr(virtual_machine, "_IDLE_DRIVER", tmp_path / "driver")
    monkeypatch.setattr(virtual_machine, "_WAKING_LATENCY", tmp_path / "latency")
    async with virtual_machine.cores_kept_awake() as held:
        assert held
        assert (tmp_path / "latency").read_bytes() == bytes(4)
        assert _spinning() == []


async def test_nothing_on_real_hardware(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(virtual_machine, "is_virtual", lambda: False)
    async with virtual_machine.cores_kept_awake() as held:
        assert not held
        assert _spinning() == []


def test_time_that_the_host_took() -> None:
    first, then = virtual_machine.stolen_s(), virtual_machine.stolen_s()
    assert first is None or then is None or 0.0 <= first <= then
