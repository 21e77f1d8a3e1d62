from __future__ import annotations

import io
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec
import pytest

from cascadeserve.demo import slo_curve
from cascadeserve.demo.compare import NAMES, Findings
from cascadeserve.demo.measuring import RunFolder, System
from cascadeserve.demo.plans import GOAL, PlanPair
from cascadeserve.demo.rate_search import Found
from cascadeserve.demo.report import SloCurve, SloGap, SloPoint
from cascadeserve.demo.slo_curve import (
    MULTIPLES,
    describe,
    goal_multiple,
    goal_text,
    make_curve,
    measure_curve,
    measured,
    plan_curve,
    simulated,
)
from cascadeserve.errors import CascadeServeError, InvalidArtefact, UsageError
from tests.cascadeserve.demo import made_up
from tests.cascadeserve.demo.test_measuring import CAPACITY, FakeStack

if TYPE_CHECKING:
    import contextlib

    from cascadeserve.demo.compare import Bench, Name

CHECKOUT_GOAL = Path(__file__).parents[3] / GOAL
OWN = PlanPair(
    cascade=Path("cascade.json"), single=Path("single.json"), slo_s=0.02, cascade_per_s=1600.0, single_per_s=400.0
)


def pair(cascade_per_s: float, single_per_s: float, slo_s: float = 0.01) -> PlanPair:
    return PlanPair(
        cascade=OWN.cascade, single=OWN.single, slo_s=slo_s, cascade_per_s=cascade_per_s, single_per_s=single_per_s
    )


def findings(rates: dict[Name, float], limited_by: Any = "system") -> dict[Name, Findings]:
    """Findings of a search each that ended with these rates, 0: none."""
    made = {name: Findings(cast("System", None), predicted_per_s=1.0) for name in NAMES}
    for name, each in made.items():
        each.add(Found(rates.get(name) or None, limited_by), [])
    return made


def test_the_goal_of_another_slo_differs_in_nothing_else() -> None:
    assert goal_multiple(CHECKOUT_GOAL) == 10.0, "the SLO of the demo is fixed"
    assert goal_multiple(CHECKOUT_GOAL) in MULTIPLES
    ours, other = CHECKOUT_GOAL.read_text(), goal_text(CHECKOUT_GOAL, 3.0)
    parsed = tomllib.loads(other)
    assert parsed["families"]["digits"].pop("slo_per_reference_batch") == 3.0
    expected = tomllib.loads(ours)
    del expected["families"]["digits"]["slo_per_reference_batch"]
    assert parsed == expected


@pytest.mark.parametrize("line", ["slo_s = 0.02", "", 'slo_per_reference_batch = "ten"'])
def test_a_goal_without_a_multiple_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "goal.toml"
    path.write_text(f"schema_version = 1\n[families.digits]\n{line}\n")
    with pytest.raises(InvalidArtefact, match="slo_per_reference_batch"):
        goal_multiple(path)


def test_a_goal_that_states_it_twice_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "goal.toml"
    path.write_text("slo_per_reference_batch = 1\nslo_per_reference_batch = 2\n")
    with pytest.raises(InvalidArtefact, match="2 lines"):
        goal_text(path, 3.0)


def test_what_plans_predict_is_a_point() -> None:
    found = simulated(5.0, pair(900.0, 200.0))
    assert found == SloPoint(
        slo_multiple=5.0, slo_s=0.01, single_rows_per_s=200.0, cascade_rows_per_s=900.0, saving=4.5
    )
    assert "saving 4.50" in describe(found)


@pytest.mark.parametrize(
    ("plans", "who"),
    [
        (pair(900.0, 0.0), "the largest model keeps"),
        (pair(0.0, 0.0), "the cascade and the largest model keeps"),
    ],
)
def test_an_slo_that_no_plan_keeps_is_left_out(plans: PlanPair, who: str) -> None:
    gap = simulated(3.0, plans)
    assert isinstance(gap, SloGap)
    assert who in gap.reason
    assert "left out" in describe(gap)


def test_measured_is_the_better_of_the_two_singles() -> None:
    found = measured(10.0, 0.02, findings({"best_single_direct": 300.0, "best_single": 250.0, "cascade": 900.0}))
    assert isinstance(found, SloPoint)
    assert (found.single_rows_per_s, found.cascade_rows_per_s, found.saving) == (300.0, 900.0, 3.0)


def test_without_all_three_nothing_is_measured() -> None:
    rates: dict[Name, float] = {"best_single": 250.0, "cascade": 900.0}
    gap = measured(3.0, 0.006, findings(rates))
    assert gap == SloGap(
        slo_multiple=3.0, of="measured", reason="no rate of the largest model with Triton alone was confirmed"
    )
    late = measured(3.0, 0.006, findings(rates, "generator"))
    assert isinstance(late, SloGap)
    assert late.reason.endswith("the load generator could not keep up")


def test_the_curve_goes_by_rising_slo_and_names_its_gaps() -> None:
    gap = SloGap(slo_multiple=3.0, of="measured", reason="so")
    curve = make_curve([made_up.point(3.0, 5.0), made_up.point(10.0, 4.0)], [made_up.point(10.0, 3.5), gap])
    assert [point.slo_multiple for point in curve.simulated] == [3.0, 10.0]
    assert [point.saving for point in curve.measured] == [3.5]
    assert curve.left_out == (gap,)
    assert msgspec.json.decode(msgspec.json.encode(curve), type=SloCurve) == curve


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, str]]:
    """A planner that refuses the largest model alone at 3 x, and what it was asked."""
    made: list[tuple[float, str]] = []

    async def make_plan(path: Path, *options: str, goal: Path, **_: object) -> float:
        multiple, kind = goal_multiple(goal), "single" if "--policy=reference" in options else "cascade"
        made.append((multiple, kind))
        assert path.parent == goal.parent
        if (multiple, kind) == (3.0, "single"):
            raise UsageError("no ladder entry answers within the SLO")
        return 100.0 * multiple if kind == "single" else 400.0 * multiple

    monkeypatch.setattr(slo_curve, "GOAL", CHECKOUT_GOAL)
    monkeypatch.setattr(slo_curve, "make_plan", make_plan)
    monkeypatch.setattr(slo_curve, "planned_rate_per_s", lambda plan: plan)
    return made


async def test_every_slo_but_the_demos_own_gets_its_plans(tmp_path: Path, asked: list[tuple[float, str]]) -> None:
    said: list[str] = []
    plans = await plan_curve(
        tmp_path, OWN, search_records=tmp_path / "search", profile=tmp_path / "profile", say=said.append
    )
    assert list(plans) == list(MULTIPLES)
    assert plans[10.0] is OWN
    assert sorted(asked) == [(multiple, kind) for multiple in (3.0, 5.0, 20.0, 40.0) for kind in ("cascade", "single")]
    assert [plans[multiple].slo_s for multiple in MULTIPLES] == pytest.approx([0.006, 0.01, 0.02, 0.04, 0.08])
    assert not plans[3.0].is_complete
    assert plans[40.0].is_complete
    assert len({plans[multiple].cascade for multiple in MULTIPLES}) == 5
    assert ["left out" in line for line in sorted(said)] == [True, False, False, False, False]


async def test_a_planner_that_fails_is_no_slo_that_cannot_be_met(
    tmp_path: Path, asked: list[tuple[float, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def crash(*_: object, **__: object) -> None:
        raise CascadeServeError("ended with status 1")

    monkeypatch.setattr(slo_curve, "make_plan", crash)
    with pytest.raises(CascadeServeError, match="status 1"):
        await plan_curve(tmp_path, OWN, search_records=tmp_path, profile=tmp_path, say=lambda _: None)
    assert asked == []


class FakeBench:
    """Systems that only pretend to measure."""

    def findings(
        self, plans: PlanPair, runs: RunFolder, servers: contextlib.AsyncExitStack, note: str
    ) -> dict[str, Findings]:
        return {
            name: Findings(
                System(
                    name + note, FakeStack(capacity), "m", Path("rows"), plans.slo_s, runs, servers, io.BytesIO()  # type: ignore[arg-type]
                ),
                predicted_per_s=capacity,
            )
            for name, capacity in CAPACITY.items()
        }  # fmt: skip


async def test_every_slo_that_has_plans_is_measured(tmp_path: Path) -> None:
    plans = {3.0: pair(900.0, 0.0), 20.0: pair(1700.0, 430.0, made_up.SLO_S)}
    found, runs = await measure_curve(
        cast("Bench", FakeBench()), RunFolder(tmp_path / "runs", "a"), plans, lambda _: None
    )
    assert found[0] == SloGap(slo_multiple=3.0, of="measured", reason="there are no plans for it")
    assert isinstance(found[1], SloPoint)
    assert found[1].saving == pytest.approx(1700 / 430, rel=0.08)
    assert len(runs) >= 9
    assert {path.name.split("-")[1] for path in (tmp_path / "runs").glob("*.options")} == {"20x"}
