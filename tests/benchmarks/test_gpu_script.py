"""The GPU benchmark, as far as a machine without a GPU can try it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.gpu.client import BenchmarkFailed
from benchmarks.gpu.family import FULL, QUICK, Family, draw_rows
from benchmarks.gpu.latency import busy_times
from benchmarks.gpu.load import judge, total_ledger
from benchmarks.gpu.plan import choose_threshold, choose_trigger, make_plan, predicted_rate_per_s
from benchmarks.gpu.result import BusyTime, GpuResult, LatencyCell
from benchmarks.gpu.search import bootstrap_interval, highest_sustained, median_ratio
from cascadeserve.artefacts import read_json
from cascadeserve.report import Ledger

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu" / "run.sh"


def busy(*points: tuple[int, float]) -> BusyTime:
    return BusyTime(busy_s=points, batch1_latency_s=points[0][1] + 0.001, overhead_s=0.001)


def ledger(**counts: int) -> Ledger:
    names = ("sent", "answered_correct", "answered_wrong", "refused", "failed", "lost", "duplicated")
    return Ledger(**(dict.fromkeys(names, 0) | counts))


def processes_naming(text: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode()
        except OSError:  # it ended meanwhile
            continue
        if text in line:
            found.append(line)
    return found


@pytest.mark.parametrize("limit", [3.0, 47.0, 100.0, 1234.0])
@pytest.mark.parametrize(("factor", "tolerance"), [(2.0, 0.1), (1.12, 0.04)])
async def test_search_ends_within_its_tolerance(limit: float, factor: float, tolerance: float) -> None:
    probed: list[float] = []

    async def sustains(rate: float) -> bool:
        probed.append(rate)
        return rate <= limit

    start = limit * (0.6 if factor > 1.5 else 1.05)
    rate = await highest_sustained(sustains, start, factor=factor, tolerance=tolerance)
    assert rate is not None
    assert rate <= limit < rate * (1 + tolerance)
    assert len(probed) <= 12


async def test_search_gives_up_where_nothing_holds() -> None:
    async def never(_: float) -> bool:
        return False

    assert await highest_sustained(never, 100.0, factor=2.0, tolerance=0.1) is None


def test_ratio_is_the_median_of_the_pairs_with_an_interval_around_it() -> None:
    middle, low, high, pairs = median_ratio([(100.0, 300.0), (100.0, 320.0), (110.0, 330.0), (90.0, 360.0)])
    assert pairs == pytest.approx((3.0, 3.2, 3.0, 4.0))
    assert middle == pytest.approx(3.1)
    assert low <= middle <= high
    assert bootstrap_interval([2.0]) == (2.0, 2.0)


def test_threshold_parts_the_wanted_share_between_two_values() -> None:
    certainties = np.linspace(0.0, 1.0, 500, dtype=np.float32)
    threshold = choose_threshold(certainties, 0.2)
    assert (certainties < threshold).mean() == pytest.approx(0.2, abs=0.003)
    assert threshold not in certainties.astype(float)
    with pytest.raises(BenchmarkFailed, match="equally certain"):
        choose_threshold(np.ones(10, np.float32), 0.2)


def test_triggers_keep_batches_within_their_share_of_the_slo() -> None:
    trigger = choose_trigger(busy((1, 0.004), (8, 0.006), (16, 0.008), (32, 0.0155), (64, 0.030)), slo_s=0.064)
    assert (trigger.min_batch, trigger.max_batch) == (16, 32)
    assert trigger.max_wait_s == pytest.approx(0.0064)
    too_slow_for_the_slo = choose_trigger(busy((1, 0.5), (2, 0.9)), slo_s=0.064)
    assert too_slow_for_the_slo.max_batch == 1


def test_plan_of_the_cascade_predicts_what_its_busy_times_allow() -> None:
    times = {"small": busy((1, 0.001), (16, 0.002)), "large": busy((1, 0.005), (16, 0.02))}
    stages: list[tuple[str, float | None]] = [("small", 0.4), ("large", None)]
    plan = make_plan("cascade", QUICK, stages, [1.0, 0.25], endpoint="device", busy=times, slo_s=0.1)
    assert plan.families["cascade"].reference_model == "large"
    rate = predicted_rate_per_s(["small", "large"], [1.0, 0.25], times, 0.1)
    assert rate == pytest.approx(1 / (0.002 / 16 + 0.25 * 0.02 / 16))


def test_busy_time_is_the_interval_between_batches_when_one_more_waits() -> None:
    cells = [
        LatencyCell(
            model="m", batch=batch, concurrency=concurrency, latency_p50_s=latency_s, batch_interval_s=interval_s,
            rows_per_s=batch / interval_s, triton_compute_s=0.002, repeats=1, calls=4,
        )
        for batch, concurrency, latency_s, interval_s in [
            (1, 1, 0.003, 0.003), (1, 2, 0.004, 0.002), (1, 3, 0.006, 0.0021),
            (8, 1, 0.009, 0.009), (8, 2, 0.014, 0.007),
        ]
    ]  # fmt: skip
    found = busy_times(cells)["m"]
    assert found.busy_s == ((1, 0.002), (8, 0.007))
    assert found.overhead_s == pytest.approx(0.001)


@pytest.mark.parametrize(
    ("counts", "p95_s", "late_p95_s", "verdict"),
    [
        ({}, 0.05, 0.06, "sustained"),
        ({"lost": 1}, 0.05, 0.06, "lost"),
        ({"refused": 1}, 0.05, 0.06, "refused"),
        ({}, 0.11, 0.2, "p95 above SLO"),
        ({}, None, None, "p95 above SLO"),
        ({}, 0.09, 0.11, "queue grows"),
    ],
)
def test_a_rate_is_sustained_only_by_every_rule(
    counts: dict[str, int], p95_s: float | None, late_p95_s: float | None, verdict: str
) -> None:
    assert judge(ledger(sent=9, **counts), p95_s, late_p95_s, 0.1) == verdict
    assert total_ledger([ledger(sent=9, **counts), ledger(sent=1)]).sent == 10


@pytest.mark.parametrize("family", [FULL, QUICK])
def test_family_grows_and_its_rows_differ(family: Family) -> None:
    flops = [member.flop_per_row(family.size) for member in family.members]
    assert flops == sorted(flops)
    assert family.first in [member.name for member in family.members[:-1]]
    rows = draw_rows(family, 64, 3)
    assert rows.shape == (64, *family.shape)
    assert rows.dtype == np.float32
    assert rows.mean((2, 3)).std(axis=0).min() > 0.1  # a network that averages over the image still tells them apart


def run_script(*arguments: str, timeout_s: float) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_WHEEL_DIR")}
    return subprocess.run(
        [str(SCRIPT), *arguments], env=environment | {"PYTHON": sys.executable}, capture_output=True, text=True,
        timeout=timeout_s, check=False,
    )  # fmt: skip


def test_script_refuses_the_full_family_on_a_cpu() -> None:
    done = run_script("--device", "cpu", timeout_s=30)
    assert done.returncode == 2
    assert "add --quick" in done.stderr


@pytest.mark.triton
@pytest.mark.torch
@pytest.mark.timeout(180)
def test_quick_run_on_the_real_server_writes_a_complete_result(tmp_path: Path) -> None:
    output, state = tmp_path / "result.json", tmp_path / "state"
    done = run_script(
        "--device", "cpu", "--quick", "--name", "try", "--output", str(output), "--state", str(state), timeout_s=150
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = read_json(output, GpuResult)
    assert (result.tier, result.name, result.quick, result.machine.device) == ("gpu", "try", True, "cpu")
    assert result.machine.tritonserver == "2.51.0"
    measured = {(cell.model, cell.batch, cell.concurrency) for cell in result.latency}
    assert measured == {(m, b, c) for m in ("small", "large") for b in (1, 4, 16) for c in (1, 2)}
    assert all(cell.triton_compute_s > 0 for cell in result.latency)
    assert result.slo_s == pytest.approx(40 * result.busy["large"].batch1_latency_s)
    assert result.cascade.measured_reach == pytest.approx(0.2, abs=0.1)
    assert result.cascade.served_reach == pytest.approx(result.cascade.measured_reach, abs=0.1)
    for name, system in result.systems.items():
        assert result.ledgers[name].lost == result.ledgers[name].duplicated == result.ledgers[name].failed == 0
        assert result.ledgers[name].sent == sum(probe.ledger.sent for probe in system.probes) > 0
        assert system.rate_per_s > 0
        assert system.confirmation == system.probes[-1]
    assert result.ratio.low <= result.ratio.median <= result.ratio.high
    assert "cascade / largest" in done.stdout
    assert processes_naming(str(state)) == []


@pytest.mark.triton
@pytest.mark.torch
@pytest.mark.timeout(90)
def test_a_terminated_run_leaves_no_process_behind(tmp_path: Path) -> None:
    state = tmp_path / "state"
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_WHEEL_DIR")}
    with subprocess.Popen(
        [str(SCRIPT), "--device", "cpu", "--quick", "--state", str(state), "--output", str(tmp_path / "result.json")],
        env=environment | {"PYTHON": sys.executable}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as run:  # fmt: skip
        assert run.stdout is not None
        for line in run.stdout:
            if "measuring latency" in line:
                break
        assert processes_naming(str(state))
        run.send_signal(signal.SIGTERM)
        _, errors = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "interrupted while measuring latency" in errors
    time.sleep(0.2)  # the kernel tells orphans, if any, after their parent is gone
    assert processes_naming(str(state)) == []
