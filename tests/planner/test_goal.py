from __future__ import annotations

from pathlib import Path

import pytest

from cascadeserve.errors import InvalidArtefact, UsageError
from planner.goal import FamilyGoal, Goal, TraceUse, Zipf, choose_families, rate_prior, read_goal, with_least

EXAMPLE = Path("examples/digits/goal.toml")


def written(folder: Path, text: str) -> Path:
    path = folder / "goal.toml"
    path.write_text(f"schema_version = 1\n[families.tiny]\n{text}\n")
    return path


def test_the_example_is_a_goal() -> None:
    goal = read_goal(EXAMPLE).families["digits"]
    assert goal.slo_per_reference_batch == 10.0
    assert goal.max_rows_per_request == 1


WRONG = {
    "no SLO": ("percentile = 0.9", "one of slo_s"),
    "two SLOs": ("slo_s = 1.0\nslo_per_reference_batch = 3.0", "one of slo_s"),
    "SLO of zero": ("slo_s = 0.0", "$.families.tiny.slo_s"),
    "SLO that is no number": ("slo_s = nan", "$.families.tiny.slo_s"),
    "endless SLO": ("slo_s = inf", "$.families.tiny.slo_s"),
    "unknown key": ("slo_s = 1.0\nspeed = 3", "speed"),
    "percentile in percent": ("slo_s = 1.0\npercentile = 95.0", "$.families.tiny.percentile"),
    "two accuracy floors": ("slo_s = 1.0\nmin_accuracy = 0.9\nbelow_reference = 0.1", "min_accuracy and below"),
    "epsilon in points": ("slo_s = 1.0\nmax_epsilon = 1.5", "$.families.tiny.max_epsilon"),
    "delta of one": ("slo_s = 1.0\ndelta = 1.0", "$.families.tiny.delta"),
    "dispersion below Poisson": ("slo_s = 1.0\ndispersion = 0.5", "$.families.tiny.dispersion"),
    "headroom above one": ("slo_s = 1.0\nheadroom = 1.1", "$.families.tiny.headroom"),
    "rows the wrong way round": ("slo_s = 1.0\nmin_rows_per_request = 2", "min_rows_per_request must not exceed"),
    "weight of zero": ("slo_s = 1.0\nrate_prior = [[10.0, 0.0]]", "rate_prior"),
    "no rate above zero": ("slo_s = 1.0\nrate_prior = [[0.0, 1.0]]", "above 0"),
    "two priors": ('slo_s = 1.0\nrate_prior = [[1.0, 1.0]]\ntrace = { file = "a.csv" }', "rate_prior, trace and zipf"),
    "no SLO and a latency to minimise, but no accuracy": ('minimise = "latency"', "one of slo_s"),
    "a latency to minimise and an SLO": ('slo_s = 1.0\nminimise = "latency"', "give neither slo_s nor"),
    "a cost to minimise without SLO": ('min_accuracy = 0.9\nminimise = "cost"', "takes an SLO"),
    "something else to minimise": ('slo_s = 1.0\nminimise = "work"', "minimise"),
    "a Zipf law that rises": ("slo_s = 1.0\nzipf = { exponent = -1.0 }", "exponent"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_goal_is_refused_with_file_and_field(case: str, tmp_path: Path) -> None:
    text, words = WRONG[case]
    path = written(tmp_path, text)
    with pytest.raises(InvalidArtefact) as caught:
        read_goal(path)
    assert str(path) in str(caught.value)
    assert words in str(caught.value)


def test_of_several_families_the_one_is_named_whose_goal_is_wrong(tmp_path: Path) -> None:
    path = tmp_path / "goal.toml"
    path.write_text("schema_version = 1\n[families.a]\nslo_s = 1.0\n[families.b]\nslo_s = 1.0\ndelta = 2.0\n")
    with pytest.raises(InvalidArtefact, match=r"goal\.toml: \$\.families\.b\.delta: Expected `float` < 1\.0"):
        read_goal(path)


def test_it_is_said_where_max_epsilon_asks_for_more_than_the_accuracy() -> None:
    tight = FamilyGoal(slo_s=1.0, min_accuracy=0.9)
    assert tight.accuracy_floor(0.986) == pytest.approx(0.976)
    said = tight.tightened(0.986)
    assert said is not None
    assert "max_epsilon = 0.01 asks for more than min_accuracy = 0.9" in said
    assert "on at least 97.60%" in said
    for fine in (
        FamilyGoal(slo_s=1.0, min_accuracy=0.98), FamilyGoal(slo_s=1.0, below_reference=0.01), FamilyGoal(slo_s=1.0)
    ):  # fmt: skip
        assert fine.tightened(0.986) is None


def test_no_family_is_no_goal(tmp_path: Path) -> None:
    path = tmp_path / "goal.toml"
    path.write_text("schema_version = 1\nfamilies = {}\n")
    with pytest.raises(InvalidArtefact, match="families"):
        read_goal(path)


def test_all_families_are_planned_or_the_one_that_is_named() -> None:
    one = FamilyGoal(slo_s=1.0)
    path = Path("goal.toml")
    assert choose_families(Goal(schema_version=1, families={"a": one}), path, None) == ("a",)
    two = Goal(schema_version=1, families={"a": one, "b": one})
    assert choose_families(two, path, "b") == ("b",)
    assert choose_families(two, path, None) == ("a", "b")
    with pytest.raises(UsageError, match="'c' is not in"):
        choose_families(two, path, "c")


def test_the_floor_is_what_was_asked_and_what_can_be_certified() -> None:
    assert FamilyGoal(slo_s=1.0).accuracy_floor(0.9) == pytest.approx(0.89)
    assert FamilyGoal(slo_s=1.0, below_reference=0.005).accuracy_floor(0.9) == pytest.approx(0.895)
    assert FamilyGoal(slo_s=1.0, min_accuracy=0.5).accuracy_floor(0.9) == pytest.approx(0.89)
    assert FamilyGoal(slo_s=1.0, min_accuracy=0.899).accuracy_floor(0.9) == pytest.approx(0.899)


def test_a_prior_is_sorted_and_sums_to_one() -> None:
    assert rate_prior(FamilyGoal(slo_s=1.0), Path("goal.toml"), 0) is None
    goal = FamilyGoal(slo_s=1.0, rate_prior=((300.0, 1.0), (100.0, 3.0)))
    assert rate_prior(goal, Path("goal.toml"), 0) == ((100.0, 0.75), (300.0, 0.25))


def test_a_trace_tells_how_often_each_rate_occurs(tmp_path: Path) -> None:
    # one second with 1 request, one with 3, of 2 rows on average
    (tmp_path / "trace.csv").write_text("time_s\n0.0\n1.1\n1.2\n1.9\n")
    goal = FamilyGoal(slo_s=1.0, trace=TraceUse(file="trace.csv"), max_rows_per_request=3)
    assert rate_prior(goal, tmp_path / "goal.toml", 0) == ((2.0, 0.5), (6.0, 0.5))
    faster = FamilyGoal(slo_s=1.0, trace=TraceUse(file="trace.csv", rate_per_s=8.0), max_rows_per_request=3)
    prior = rate_prior(faster, tmp_path / "goal.toml", 0)
    assert prior is not None
    assert sum(share for _, share in prior) == pytest.approx(1.0)


def test_a_trace_of_millennia_is_refused(tmp_path: Path) -> None:
    (tmp_path / "trace.csv").write_text("time_s\n0\n1e12\n")
    goal = FamilyGoal(slo_s=1.0, trace=TraceUse(file="trace.csv"))
    with pytest.raises(UsageError, match=r"trace\.csv lasts 1e\+12 s, but a load may last at most 2592000 s"):
        rate_prior(goal, tmp_path / "goal.toml", 0)


def test_a_missing_trace_is_named(tmp_path: Path) -> None:
    goal = FamilyGoal(slo_s=1.0, trace=TraceUse(file="none.csv"))
    with pytest.raises(InvalidArtefact, match=r"none\.csv"):
        rate_prior(goal, tmp_path / "goal.toml", 0)


def test_a_goal_without_slo_wants_the_least_latency() -> None:
    assert FamilyGoal(slo_s=1.0).least is None
    assert FamilyGoal(min_accuracy=0.9).least == "latency"
    assert FamilyGoal(below_reference=0.01, minimise="latency").least == "latency"
    assert FamilyGoal(slo_s=1.0, minimise="cost").least == "cost"


def test_what_to_minimise_may_be_asked_for_beside_the_goal() -> None:
    assert with_least(FamilyGoal(slo_s=1.0), "cost").least == "cost"
    with pytest.raises(UsageError, match=r"--minimise latency: .* give neither slo_s"):
        with_least(FamilyGoal(slo_s=1.0), "latency")


def test_low_rates_are_more_frequent_under_zipf() -> None:
    path = Path("goal.toml")
    goal = FamilyGoal(slo_s=1.0, max_rate_per_s=300.0, zipf=Zipf(ranges=3, exponent=1.0))
    prior = rate_prior(goal, path, 0)
    assert prior is not None
    assert [rate for rate, _ in prior] == [50.0, 150.0, 250.0]
    assert [share for _, share in prior] == pytest.approx([6 / 11, 3 / 11, 2 / 11])
    own = FamilyGoal(slo_s=1.0, max_rate_per_s=300.0, zipf=Zipf(max_rate_per_s=30.0, ranges=1))
    assert rate_prior(own, path, 0) == ((15.0, 1.0),)
    with pytest.raises(InvalidArtefact, match=r"goal\.toml: zipf: needs max_rate_per_s"):
        rate_prior(FamilyGoal(slo_s=1.0, zipf=Zipf()), path, 0)
