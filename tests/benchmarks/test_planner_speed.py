from __future__ import annotations

import os
from typing import TYPE_CHECKING

import msgspec
import pytest
from click.testing import CliRunner

from benchmarks import planner_speed
from benchmarks.growth_plot import draw_growth
from benchmarks.planner_speed import PlannerSpeed, Point, Size, made_up_inputs, main, median_run, plan_once
from planner.fits import check_fit
from planner.host import describe_host
from tests.fakes.planned import FormulaPredictor

if TYPE_CHECKING:
    from pathlib import Path


def point(wall_s: float, size: Size, peak_rss_bytes: int = 2**20) -> Point:
    return Point(
        size=size, wall_s=wall_s, cpu_s=1.0, plan_s=1.0, peak_rss_bytes=peak_rss_bytes, gears=2, top_rate_per_s=10.0
    )


def measured(size: Size) -> Point:
    return point(0.1 * size.models * size.endpoints + size.ranges, size)


def test_inputs_are_of_the_size_and_fit_each_other() -> None:
    inputs = made_up_inputs(Size(models=12, endpoints=256, ranges=64), rows=500)
    devices = check_fit(
        inputs.search, inputs.profiles, inputs.cluster, family=inputs.family, models=inputs.largest_batch
    )
    assert (len(inputs.search.models), len(devices), len(inputs.prior or ())) == (12, 256, 64)
    assert len({endpoint.grpc for endpoint in inputs.cluster.endpoints}) == 256
    busy_s = [model.busy[0].busy_s for model in inputs.profiles["cpu"].models.values()]
    assert busy_s == sorted(busy_s)
    assert busy_s[-1] == pytest.approx(40 * busy_s[0])


def test_a_point_says_what_the_plan_took(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planner.planning.SimulatedGears", FormulaPredictor.of)
    found = plan_once(Size(models=2, endpoints=3, ranges=4))
    assert found.plan_s > 0.0
    assert found.peak_rss_bytes > 2**20
    assert found.gears >= 1
    monkeypatch.setattr(planner_speed, "plan_once", measured)
    size = Size(models=3)
    done = CliRunner().invoke(main, ["--once", msgspec.json.encode(size).decode()])
    assert msgspec.json.decode(done.stdout, type=Point) == measured(size)


def test_the_median_run_counts_with_the_most_memory_of_any() -> None:
    runs = [point(3.0, Size(), 5), point(1.0, Size(), 6), point(2.0, Size(), 4)]
    assert median_run(runs) == point(2.0, Size(), 6)


def test_results_and_plot_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner_speed, "measured", measured)
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None)
    result, plot = tmp_path / "speed.json", tmp_path / "growth.svg"
    done = CliRunner().invoke(main, ["--result", str(result), "--plot", str(plot)])
    assert done.exit_code == 0, done.output
    found = msgspec.json.decode(result.read_bytes(), type=PlannerSpeed)
    assert found.bar == measured(Size())
    assert [each.size.endpoints for each in found.by_endpoints] == [1, 2, 4, 16, 64, 256]
    assert "</svg>" in plot.read_text()
    first = plot.read_bytes()
    draw_growth(plot, found)
    assert plot.read_bytes() == first, "the same figures give the same bytes"
    assert found.machine == describe_host()
    done = CliRunner().invoke(main, ["--bar-only", "--result", str(result)])
    assert done.exit_code == 0, done.output
    assert msgspec.json.decode(result.read_bytes(), type=PlannerSpeed).by_models == ()
