from __future__ import annotations

import asyncio
import os
import socket
from contextlib import suppress
from typing import TYPE_CHECKING

import pytest

from cascadeserve.errors import CascadeServeError, UsageError
from cascadeserve.replay.payload import ModelSignature
from planner.host import describe_host, find_server, is_local, resident_bytes
from planner.profile import Profile, check_profile, work_rate
from planner.profiling import Cell, Effort, Profiler, model_profile, pair_entries, plan_cells, progress_key
from planner.triton_calls import Executions, ServedModel

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.looptime

OVERHEAD_S = 0.001
QUANTUM_S = 0.0005
ROW_S = {"small": 0.001, "large": 0.005}
EFFORT = Effort(repeats=3, window_s=0.2, min_batches=4)


def served(name: str = "small", **changes: object) -> ServedModel:
    plain = {"backend": "onnxruntime", "max_batch": 8, "instances": 1, "dynamic_batching": False}
    plain |= {"version": 1, "versions": (1,)}
    return ServedModel(name=name, signature=ModelSignature((), ()), **(plain | changes))  # type: ignore[arg-type]


class FakeDevice:
    """One core: batches of a model run one after another, two models take turns in small slices."""

    def __init__(self) -> None:
        self.core = asyncio.Lock()
        self.instance = {name: asyncio.Lock() for name in ROW_S}
        self.counted = dict.fromkeys(ROW_S, Executions(0, 0.0))
        self.sent = 0
        self.fail_at: int | None = None
        self.gone: set[str] = set()
        self.log: list[str] = []

    async def send(self, request: bytes) -> bytes:
        self.sent += 1
        if self.sent == self.fail_at:
            raise CascadeServeError("the server went away")
        model, rows = request.decode().split()
        await asyncio.sleep(OVERHEAD_S)
        async with self.instance[model]:
            started_s = asyncio.get_running_loop().time()
            for _ in range(round(ROW_S[model] * int(rows) / QUANTUM_S)):
                async with self.core:
                    await asyncio.sleep(QUANTUM_S)
            took_s = asyncio.get_running_loop().time() - started_s
        before = self.counted[model]
        self.counted[model] = Executions(before.count + 1, before.compute_s + took_s)
        return b""

    async def executions(self, model: str) -> Executions:
        return self.counted[model]

    async def is_gone(self, model: str) -> bool:
        return model in self.gone

    async def load(self, model: str) -> None:
        await asyncio.sleep(2.0)
        self.log.append(f"load {model}")
        self.gone.discard(model)

    async def unload(self, model: str) -> None:
        self.log.append(f"unload {model}")
        asyncio.get_running_loop().call_later(1.0, self.gone.add, model)


def profiler(device: FakeDevice, effort: Effort = EFFORT) -> Profiler:
    return Profiler(device, lambda model, batch: [f"{model} {batch}".encode()], effort)


def alone(model: str, batch: int, concurrency: int) -> Cell:
    return Cell(models=(model,), batches=(batch,), in_flight=(concurrency,))


async def test_one_in_flight_shows_busy_time_and_overhead(tmp_path: Path) -> None:
    cells = [alone("small", batch, concurrency) for concurrency in (1, 2) for batch in (1, 8)]
    repeats = await profiler(FakeDevice()).repeat_all(
        cells, key="k", checkpoint=tmp_path / "repeats.json", on_visit=lambda: None
    )
    found = model_profile(served(), cells, repeats, slots=1)
    assert [(entry.batch, entry.concurrency) for entry in found.busy] == [(1, 1), (8, 1), (1, 2), (8, 2)]
    assert [entry.busy_s for entry in found.busy] == pytest.approx([0.001, 0.008, 0.001, 0.008], rel=0.02)
    assert found.overhead_s == pytest.approx(OVERHEAD_S, rel=0.02)
    assert [entry.spread_frac for entry in found.busy] == pytest.approx([0.0] * 4, abs=0.02)


async def test_pairs_share_the_device(tmp_path: Path) -> None:
    models = [served("small"), served("large")]
    cells = plan_cells(models, (1, 4, 8), slots=1, pair_batches=2)
    repeats = await profiler(FakeDevice()).repeat_all(
        cells, key="k", checkpoint=tmp_path / "repeats.json", on_visit=lambda: None
    )
    profile = Profile(
        schema_version=1,
        device_kind="cpu",
        models={model.name: model_profile(model, cells, repeats, slots=1) for model in models},
        pairs=pair_entries(cells, repeats),
    )
    check_profile(profile)
    assert [pair.batches for pair in profile.pairs] == [(4, 4), (8, 8)]
    # in turns: 8 ms of the small model take 16 ms, and the large one has its other half
    assert profile.pairs[1].interval_s[0] == pytest.approx(0.016, rel=0.15)
    assert profile.pairs[1].interval_s[1] == pytest.approx(0.080, rel=0.15)
    assert work_rate(profile, profile.pairs[1]) == pytest.approx(1.0, abs=0.1)


async def test_busy_time_is_in_slot_seconds() -> None:
    cells = [alone("small", 1, concurrency) for concurrency in (1, 2, 3)]
    visits = [[await profiler(FakeDevice()).visit(cell) for cell in cells]]
    two_slots = model_profile(served(instances=2), cells, visits, slots=2)
    # The fake completes a batch per ms; had it two slots at work, each batch would have had one for 2 ms.
    assert two_slots.busy[2].busy_s == pytest.approx(0.002, rel=0.02)
    assert model_profile(served(instances=1), cells, visits, slots=2).busy[2].busy_s == pytest.approx(0.001, rel=0.02)


async def test_an_interrupted_run_goes_on_with_the_next_repeat(tmp_path: Path) -> None:
    cells = [alone("small", 1, 1), alone("large", 1, 1)]
    checkpoint = tmp_path / "repeats.json"
    whole = FakeDevice()
    expected = await profiler(whole).repeat_all(
        cells, key="k", checkpoint=tmp_path / "whole.json", on_visit=lambda: None
    )
    broken = FakeDevice()
    broken.fail_at = whole.sent // 2
    with suppress(CascadeServeError):
        await profiler(broken).repeat_all(cells, key="k", checkpoint=checkpoint, on_visit=lambda: None)
    rest, visits = FakeDevice(), []
    repeats = await profiler(rest).repeat_all(cells, key="k", checkpoint=checkpoint, on_visit=lambda: visits.append(1))
    assert len(repeats) == len(expected) == EFFORT.repeats
    assert len(visits) == EFFORT.repeats * len(cells)
    # one repeat was kept, two were measured anew
    assert rest.sent == pytest.approx(whole.sent * 2 / 3, abs=6)


async def test_repeats_of_something_else_are_not_taken(tmp_path: Path) -> None:
    checkpoint = tmp_path / "repeats.json"
    for device, key in ((FakeDevice(), "one"), (FakeDevice(), "two")):
        await profiler(device).repeat_all([alone("small", 1, 1)], key=key, checkpoint=checkpoint, on_visit=lambda: None)
        assert device.sent > 100
    checkpoint.write_text("{half a fi")
    device = FakeDevice()
    await profiler(device).repeat_all([alone("small", 1, 1)], key="two", checkpoint=checkpoint, on_visit=lambda: None)
    assert device.sent > 100
    assert progress_key("a", [1]) != progress_key("a", [2])


async def test_a_budget_ends_it_after_whole_repeats(tmp_path: Path, looptime: float) -> None:
    effort = Effort(repeats=100, window_s=0.2, min_batches=4, budget_s=1.0)
    repeats = await profiler(FakeDevice(), effort).repeat_all(
        [alone("small", 1, 1)], key="k", checkpoint=tmp_path / "r.json", on_visit=lambda: None
    )
    assert 3 <= len(repeats) <= 5
    assert looptime < 1.1


async def test_batches_of_somebody_else_are_noticed() -> None:
    device = FakeDevice()

    async def somebody_else() -> None:
        while True:
            await device.send(b"small 1")

    other = asyncio.create_task(somebody_else())
    with pytest.raises(CascadeServeError, match="something else uses the endpoint"):
        await profiler(device).visit(alone("small", 1, 1))
    other.cancel()
    await asyncio.gather(other, return_exceptions=True)


async def test_reload_is_timed_and_what_it_frees_is_the_models_memory() -> None:
    device = FakeDevice()
    found = await profiler(device).measure_reload("small", 8, lambda: 100 if device.gone else 350)
    assert found == (pytest.approx(2.0), 250)
    assert device.log == ["unload small", "load small"]
    load_s, memory_bytes = await profiler(device).measure_reload("small", 8, lambda: None)
    assert (load_s, memory_bytes) == (pytest.approx(2.0), None)


async def test_a_part_is_reloaded_through_its_ensemble_and_every_ensemble_with_it_comes_back() -> None:
    device = FakeDevice()
    found = await profiler(device).measure_reload("small", 8, lambda: None, part="part", ensembles=("small", "other"))
    assert found == (pytest.approx(2.0), None)
    assert device.log == ["unload part", "load part", "load small", "load other"]


async def test_an_interruption_leaves_the_model_loaded() -> None:
    device = FakeDevice()
    task = asyncio.create_task(profiler(device).measure_reload("small", 8, lambda: None))
    await asyncio.sleep(0.5)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert device.log == ["unload small", "load small"]
    assert device.gone == set()


def test_cells_cover_sizes_concurrencies_and_pairs() -> None:
    cells = plan_cells([served("small", max_batch=4), served("large")], (1, 4, 8, 99), slots=2, pair_batches=1)
    mine = [(cell.in_flight[0], cell.batches[0]) for cell in cells if cell.models == ("small",)]
    assert mine == [(1, 1), (1, 4), (2, 1), (2, 4), (3, 1), (3, 4)]
    assert cells[-1] == Cell(models=("small", "large"), batches=(1, 1), in_flight=(2, 1))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"dynamic_batching": True}, "dynamic_batching"),
        ({"dynamic_batching": True, "composed_of": {"a": 1, "b": 1}}, "composed of"),
        ({"max_batch": 0}, "at most 0"),
    ],
)
def test_a_model_that_cannot_be_measured_is_refused(changes: dict[str, object], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        plan_cells([served(**changes)], (1, 8), slots=1, pair_batches=1)


def test_the_server_is_found_by_its_port() -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        assert find_server(port) is None
        listening.listen()
        assert find_server(port) == os.getpid()
    held = resident_bytes(os.getpid())
    assert held is not None
    assert held > 10e6
    assert resident_bytes(2**22 + 1) is None


def test_the_host_is_described_without_its_name() -> None:
    host = describe_host()
    assert host.num_cores
    assert host.memory_bytes
    if len(name := socket.gethostname()) > 4:
        assert name not in repr(host)
    assert is_local("127.0.0.1:8001")
    assert not is_local("triton.example:8001")
