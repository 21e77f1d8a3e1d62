"""`cascadeserve plan`: what may be minimised, traces, time limits and interruptions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from cascadeserve import cli
from cascadeserve.gear_plan import read_gear_plan
from cascadeserve.replay.arrivals import gamma
from tests.fakes.planned import GOAL_TOML, FormulaPredictor
from tests.planner import test_cli_plan
from tests.planner.test_cli_plan import arguments, refusal

if TYPE_CHECKING:
    from pathlib import Path

    from planner.predict import Prediction

folder = test_cli_plan.folder

SWIFT = GOAL_TOML.replace("slo_s = 0.1", "below_reference = 0.005\nmax_rate_per_s = 100.0")


def draft(folder: Path, *more: str) -> list[str]:
    return [word for word in arguments(folder, *more) if not word.startswith("--calibration")]


@pytest.mark.parametrize("policy", ["cascade", "static-cascade", "switching", "single", "reference"])
def test_every_policy_makes_a_plan(policy: str, folder: Path) -> None:
    cli.main(draft(folder, "--policy", policy))
    made_from = read_gear_plan(folder / "plan.json").made_from
    assert made_from is not None
    assert made_from.policy == policy


def test_a_goal_without_slo_gets_the_least_latency(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "goal.toml").write_text(SWIFT)
    cli.main(draft(folder))
    said = capsys.readouterr().out
    assert said.startswith("The least SLO that 95 % of the requests can keep up to 100 rows/s is ")
    plan = (folder / "plan.json").read_bytes()
    cli.main(draft(folder, "--minimise", "latency"))
    assert (folder / "plan.json").read_bytes() == plan


def test_endpoints_that_are_not_needed_have_no_place_in_the_plan(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = (folder / "cluster.toml").read_text()
    endpoint = one.partition("[[endpoints]]")[2]
    for number in range(1, 4):
        one += "[[endpoints]]" + endpoint.replace('"a"', f'"b{number}"').replace(":80", f":{80 + number}")
    (folder / "cluster.toml").write_text(one)
    (folder / "goal.toml").write_text(GOAL_TOML + "max_rate_per_s = 400.0\n")
    cli.main(draft(folder, "--minimise", "cost"))
    assert "of 4 endpoints reach 400 rows/s: " in capsys.readouterr().out
    assert 1 <= len(read_gear_plan(folder / "plan.json").layouts[0].instances) < 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--minimise", "latency"), "give neither slo_s nor slo_per_reference_batch"),
        (("--minimise", "cost"), "to minimise the cost takes rates"),
        (("--trace-column", "when"), "--trace-column: names a column of no trace"),
        (("--from-trace", "goal.toml"), "goal.toml"),
    ],
)
def test_options_that_contradict_the_goal_are_refused(
    options: tuple[str, str], words: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(folder / word) if word.endswith(".toml") else word for word in options]
    assert words in refusal(draft(folder, *given), capsys)
    assert not (folder / "plan.json").exists()


def test_a_trace_gives_burstiness_and_rates(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    times_s = gamma(40.0, 2.0, 400.0, np.random.default_rng(0))
    (folder / "requests.csv").write_text("id,when\n" + "".join(f"1,{time:.6f}\n" for time in times_s))
    options = ("--from-trace", str(folder / "requests.csv"), "--trace-column", "when")
    cli.main(draft(folder, *options))
    said = capsys.readouterr().out
    assert "requests have an index of dispersion of " in said
    plan = read_gear_plan(folder / "plan.json")
    family = plan.families["tiny"]
    assert 2.5 < family.dispersion < 6.0
    assert family.expected is not None
    assert plan.made_from is not None
    assert "trace" in plan.made_from.digests
    # what it says can be written into a goal, which then means the same up to its digits
    (folder / "goal.toml").write_text(
        GOAL_TOML + said.splitlines()[1].removeprefix("In a goal: ").replace(", rate_prior", "\nrate_prior") + "\n"
    )
    assert "says already how often each rate occurs" in refusal(draft(folder, *options), capsys)
    cli.main(draft(folder))
    written = read_gear_plan(folder / "plan.json").families["tiny"]
    assert written.dispersion == pytest.approx(family.dispersion, rel=0.01)
    assert written.expected is not None
    assert written.expected.accuracy == pytest.approx(family.expected.accuracy, abs=1e-3)


def test_a_time_limit_says_what_it_left_out(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(draft(folder, "--time-limit", "1e-9"))
    assert capsys.readouterr().err.startswith("The time limit was reached, which left out: the ladder entry ")
    assert read_gear_plan(folder / "plan.json")
    assert not (folder / "plan.json.partial").exists()
    cli.main(draft(folder, "--time-limit", "600"))
    assert capsys.readouterr().err == ""


def test_ctrl_c_ends_in_a_sentence_and_the_same_command_goes_on(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cli.main(arguments(folder))
    whole = (folder / "plan.json").read_bytes()
    (folder / "plan.json").unlink()
    real, asked = FormulaPredictor.gear, 0

    def interrupted(self: FormulaPredictor, *args: Any) -> Prediction:
        nonlocal asked
        asked += 1
        if asked == 50:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(FormulaPredictor, "gear", interrupted)
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments(folder))
    assert caught.value.code == 130
    error = capsys.readouterr().err
    assert error.startswith("interrupted; nothing was written, and the same command goes on where it was, from ")
    assert error.count("\n") == 1
    assert not (folder / "plan.json").exists()
    assert (folder / "plan.json.partial").is_dir()
    cli.main(arguments(folder))
    assert (folder / "plan.json").read_bytes() == whole
    assert not (folder / "plan.json.partial").exists()


def test_a_goal_that_cannot_be_met_says_what_would_do_and_leaves_nothing(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "goal.toml").write_text(GOAL_TOML + "max_rate_per_s = 5000.0\n")
    error = refusal(draft(folder), capsys)
    assert "the goal asks for 5000 rows/s" in error
    assert "would do: max_rate_per_s = " in error
    assert not list(folder.glob("plan.json*"))
