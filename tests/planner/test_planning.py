from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from cascadeserve.artefacts import write_json
from cascadeserve.cluster import GpuDevice
from cascadeserve.errors import UsageError
from cascadeserve.gear_plan import GearPlan, read_gear_plan
from planner.planning import plan_family
from planner.records import SearchRecords
from planner.records_files import read_ledger, write_records
from tests.fakes.planned import FormulaPredictor, calibration, cluster, goal, inputs, profile, records

if TYPE_CHECKING:
    from pathlib import Path

    from cascadeserve.cluster import Endpoint
    from cascadeserve.gear_plan import PlannedFamily
    from planner.certificate import Certificate


@pytest.fixture(autouse=True)
def _formula(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("planner.planning.SimulatedGears", FormulaPredictor.of)


@pytest.fixture
def calibration_file(tmp_path: Path) -> Path:
    path = tmp_path / "calibration.npz"
    write_records(path, calibration())
    return path


def family_of(plan: GearPlan) -> PlannedFamily:
    return plan.families["tiny"]


def test_a_plan_serves_and_says_what_is_certain(tmp_path: Path, calibration_file: Path) -> None:
    plan = plan_family(inputs(), calibration_file)
    write_json(tmp_path / "plan.json", plan)
    assert read_gear_plan(tmp_path / "plan.json", cluster()) == plan
    family = family_of(plan)
    assert family.reference_model == "large"
    assert "large" in {entry.name for entry in family.ladder}
    assert {entry.name for entry in family.ladder} >= {gear.ladder_entry for gear in family.gears}
    certificate = family.certificate
    assert certificate is not None
    assert certificate.epsilon == max(entry.epsilon for entry in family.ladder if entry.epsilon is not None) <= 0.02
    assert (certificate.rows, certificate.delta) == (6000, 0.025)
    assert all(entry.accuracy is not None for entry in family.ladder)
    assert family.gears[-1].degraded
    assert family.entry(family.gears[-1].ladder_entry).epsilon is not None, "overload is certified unless asked else"


def test_the_same_inputs_give_the_same_bytes_and_spend_nothing_more(calibration_file: Path) -> None:
    first = msgspec.json.encode(plan_family(inputs(), calibration_file))
    assert msgspec.json.encode(plan_family(inputs(), calibration_file)) == first
    assert len(read_ledger(calibration_file).uses) == 1


def test_a_draft_certifies_nothing() -> None:
    family = family_of(plan_family(inputs(), None))
    assert family.certificate is None
    assert {entry.epsilon for entry in family.ladder if entry.name != "large"} == {None}


def test_faster_plans_are_less_accurate_but_never_below_the_floor() -> None:
    fast = family_of(plan_family(inputs(), None))
    careful = family_of(plan_family(inputs(goal=goal(below_reference=0.0)), None))
    assert fast.max_rate_per_s("all") > careful.max_rate_per_s("all")
    large = careful.entry("large").accuracy
    assert large is not None
    assert all(entry.accuracy is not None and entry.accuracy >= large for entry in careful.ladder)


def test_an_entry_that_is_not_certified_is_left_out(monkeypatch: pytest.MonkeyPatch, calibration_file: Path) -> None:
    before = family_of(plan_family(inputs(), None))
    fastest = before.gears[-1].ladder_entry

    def pessimist(*args: Any, **options: Any) -> Certificate:
        from planner.certificate import certify_file  # noqa: PLC0415

        found = certify_file(*args, **options)
        entries = tuple(msgspec.structs.replace(e, epsilon=0.5) if e.name == fastest else e for e in found.entries)
        return msgspec.structs.replace(found, entries=entries, max_epsilon=0.5)

    monkeypatch.setattr("planner.planning.certify_file", pessimist)
    family = family_of(plan_family(inputs(), calibration_file))
    assert fastest not in {entry.name for entry in family.ladder}
    assert family.max_rate_per_s("all") < before.max_rate_per_s("all")
    assert family.certificate is not None
    assert family.certificate.epsilon < 0.5


def test_if_only_the_reference_is_certified_it_serves_alone(calibration_file: Path) -> None:
    family = family_of(plan_family(inputs(goal=goal(max_epsilon=0.0)), calibration_file))
    assert {gear.ladder_entry for gear in family.gears} == {"large"}
    assert not read_ledger(calibration_file).uses


def test_the_reference_alone_needs_no_certificate(calibration_file: Path) -> None:
    family = family_of(plan_family(inputs(policy="reference"), calibration_file))
    assert [entry.name for entry in family.ladder] == ["large"]
    assert family.ladder[0].epsilon == 0.0
    assert list(family.models) == ["large"]
    assert not read_ledger(calibration_file).uses


def test_overload_may_be_served_without_a_certificate(calibration_file: Path) -> None:
    family = family_of(plan_family(inputs(goal=goal(uncertified_overload=True)), calibration_file))
    assert family.gears[-1].ladder_entry == "small"
    assert family.entry("small").epsilon is None


def test_the_prior_weighs_accuracy_and_epsilon(calibration_file: Path) -> None:
    top = family_of(plan_family(inputs(), None)).max_rate_per_s("all")
    prior = ((0.5 * top, 0.5), (0.9 * top, 0.5))
    family = family_of(plan_family(inputs(prior=prior), calibration_file))
    assert family.expected is not None
    assert sum(family.expected.gears.values()) == pytest.approx(1.0)
    assert family.certificate is not None
    assert family.certificate.weighted_epsilon is not None
    assert family.certificate.weighted_epsilon <= family.certificate.epsilon


def test_rates_above_a_plan_with_uncertified_overload_have_no_weighted_epsilon(calibration_file: Path) -> None:
    given = inputs(goal=goal(uncertified_overload=True), prior=((1e6, 1.0),))
    certificate = family_of(plan_family(given, calibration_file)).certificate
    assert certificate is not None
    assert certificate.weighted_epsilon is None


def test_the_slo_may_be_a_multiple_of_the_reference() -> None:
    given = inputs(goal=goal(slo_s=None, slo_per_reference_batch=10.0))
    assert family_of(plan_family(given, None)).slo_s == pytest.approx(0.11)


def of_another_kind(name: str) -> Endpoint:
    return msgspec.structs.replace(cluster().endpoints[0], name=name, device_kind="l4")


def test_on_several_kinds_it_is_a_multiple_of_the_fastest() -> None:
    large = profile().models["large"]
    one_row = msgspec.structs.replace(large.busy[0], busy_s=0.004)
    faster = msgspec.structs.replace(large, busy=(one_row, *large.busy[1:]))
    profiles = {"cpu": profile(), "l4": profile(device_kind="l4", models=profile().models | {"large": faster})}
    both = msgspec.structs.replace(cluster(), endpoints=(*cluster().endpoints, of_another_kind("b")))
    given = inputs(goal=goal(slo_s=None, slo_per_reference_batch=50.0), profiles=profiles, cluster=both)
    assert family_of(plan_family(given, None)).slo_s == pytest.approx(0.2)


def test_batches_stay_within_the_model_configs() -> None:
    family = family_of(plan_family(inputs(largest_batch={"small": 4, "large": 2}), None))
    assert {name: model.max_batch for name, model in family.models.items()} == {"small": 4, "large": 2}
    for gear in family.gears:
        for model, trigger in gear.triggers.items():
            assert trigger.max_batch <= family.models[model].max_batch


def other_family() -> dict[str, Any]:
    return {"family": "huge"}


def unprofiled() -> dict[str, Any]:
    return {"profiles": {"cpu": profile(models={"large": profile().models["large"]})}}


def on_gpu() -> dict[str, Any]:
    endpoint = msgspec.structs.replace(cluster().endpoints[0], device=GpuDevice())
    return {"cluster": msgspec.structs.replace(cluster(), endpoints=(endpoint,))}


def more_slots() -> dict[str, Any]:
    endpoint = msgspec.structs.replace(cluster().endpoints[0], slots=2)
    return {"cluster": msgspec.structs.replace(cluster(), endpoints=(endpoint,))}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (other_family, "of family 'tiny'"),
        (unprofiled, "'small' is in the records but not in the profile"),
        (on_gpu, "'a' is of device kind 'gpu', but the profiles are of cpu"),
        (more_slots, "has 2 slots"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(changes: Any, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        plan_family(inputs(**changes()), None)


def test_an_accuracy_that_no_model_reaches_is_refused() -> None:
    with pytest.raises(
        UsageError, match=r"wants an accuracy of 99\.99%, but the most accurate model, 'large', reaches"
    ):
        plan_family(inputs(goal=goal(below_reference=None, min_accuracy=0.9999)), None)


def test_a_stricter_delta_than_the_one_that_was_claimed_is_refused(calibration_file: Path) -> None:
    plan_family(inputs(), calibration_file)
    with pytest.raises(UsageError, match=r"certified at delta 0\.025 and 0\.02 is asked for"):
        plan_family(inputs(goal=goal(delta=0.02)), calibration_file)


def test_a_goal_that_nothing_keeps_is_refused() -> None:
    with pytest.raises(UsageError, match="no ladder entry answers within the SLO of 1 ms"):
        plan_family(inputs(goal=goal(slo_s=0.001)), None)


def test_progress_counts_the_ladder() -> None:
    seen: list[tuple[int, int]] = []
    plan_family(inputs(), None, on_progress=lambda done, total: seen.append((done, total)))
    assert seen[0][0] == 0
    assert seen[-1][0] == seen[-1][1] == len(seen) - 1


def test_grouped_rows_are_certified_by_groups(tmp_path: Path) -> None:
    def grouped(rows: Any) -> Any:
        rows.group_id[:] //= 4
        return rows

    path = tmp_path / "grouped.npz"
    write_records(path, grouped(calibration()))
    family = family_of(plan_family(inputs(search=grouped(records(SearchRecords))), path))
    assert family.certificate is not None
    assert family.certificate.method.startswith("betting")
