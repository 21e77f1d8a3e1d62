from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import pytest

from cascadeserve import cli
from cascadeserve.gear_plan import read_gear_plan
from planner.records import CalibrationRecords
from planner.records_files import write_records
from tests.fakes.planned import CLUSTER_TOML, CONFIG, FormulaPredictor, calibration, records
from tests.fakes.two_families import both_profile, other_records

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

GOAL = "schema_version = 1\n" + "".join(
    f"[families.{family}]\nslo_s = 0.1\nmax_epsilon = 0.02\nmax_rate_per_s = 60.0\n" for family in ("tiny", "other")
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """All files that `plan` reads for two families."""
    monkeypatch.setattr("planner.planning.SimulatedGears", FormulaPredictor.of)
    monkeypatch.setenv("COLUMNS", "100")
    (tmp_path / "goal.toml").write_text(GOAL)
    (tmp_path / "cluster.toml").write_text(CLUSTER_TOML)
    (tmp_path / "profile.json").write_bytes(msgspec.json.encode(both_profile()))
    for model in ("small", "large", "little", "big"):
        (tmp_path / "repository" / model).mkdir(parents=True)
        (tmp_path / "repository" / model / "config.pbtxt").write_text(CONFIG.format(name=model))
    write_records(tmp_path / "tiny.npz", records())
    write_records(tmp_path / "other.npz", other_records())
    write_records(tmp_path / "tiny_calibration.npz", calibration())
    write_records(tmp_path / "other_calibration.npz", other_records(CalibrationRecords, seed=3))
    return tmp_path


def arguments(folder: Path, *more: str, searches: tuple[str, ...] = ("tiny", "other")) -> list[str]:
    files = {"goal": "goal.toml", "cluster": "cluster.toml", "profile": "profile.json", "output": "plan.json"}
    named = [f"--{option}={folder / file}" for option, file in files.items()]
    named += [f"--search={folder / name}.npz" for name in searches]
    return ["plan", *named, f"--repository={folder / 'repository'}", *more]


def refusal(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("Error: ")
    assert error.count("\n") == 1, "one sentence"
    return error


def test_one_plan_for_all_families_of_the_goal(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [f"--calibration={folder / name}_calibration.npz" for name in ("other", "tiny")]
    cli.main(arguments(folder, *rows))
    plan = read_gear_plan(folder / "plan.json")
    assert list(plan.families) == ["tiny", "other"]
    assert sum(family.guaranteed_share for family in plan.families.values()) == pytest.approx(1.0)
    assert all(family.certificate for family in plan.families.values())
    assert plan.made_from is not None
    assert list(plan.made_from.digests) == [
        "calibration.other", "calibration.tiny", "cluster", "goal", "profile", "search.other", "search.tiny",
    ]  # fmt: skip
    shown = capsys.readouterr().out
    assert f"tiny has {plan.families['tiny'].guaranteed_share:.0%} of the device time whatever" in shown
    cli.main(["explain", str(folder / "plan.json"), "--html", str(folder / "plan.html")])
    assert capsys.readouterr().out == shown
    assert "of the device time, whatever the other families do" in (folder / "plan.html").read_text()
    assert not (folder / "plan.json.partial").exists()


def test_the_same_files_give_the_same_bytes(folder: Path) -> None:
    cli.main(arguments(folder))
    first = (folder / "plan.json").read_bytes()
    cli.main(arguments(folder, searches=("other", "tiny")))
    assert (folder / "plan.json").read_bytes() == first


def test_one_family_can_still_be_planned_alone_and_has_everything(folder: Path) -> None:
    cli.main(arguments(folder, "--family=other", searches=("other",)))
    (family,) = read_gear_plan(folder / "plan.json").families.values()
    assert family.guaranteed_share == 1.0
    assert '"share":' not in (folder / "plan.json").read_text()


# what is wrong -> (change in the folder, further options, search records, words in the error)
WRONG: dict[str, tuple[Callable[[Path], object], tuple[str, ...], tuple[str, ...], str]] = {
    "no records of a family": (
        lambda _: None, (), ("tiny",), "--search: no records of family 'other' are given; add its file",
    ),
    "two records of one family": (
        lambda f: (f / "copy.npz").write_bytes((f / "tiny.npz").read_bytes()), (), ("tiny", "other", "copy"),
        "copy.npz are both of family 'tiny'; give one of them",
    ),
    "records of a family that is not planned": (
        lambda _: None, ("--family=tiny",), ("tiny", "other"), "other.npz is of family 'other', but 'tiny' is wanted",
    ),
    "calibration rows of one family": (
        lambda _: None, ("--calibration=tiny_calibration.npz",), ("tiny", "other"),
        "--calibration: no records of family 'other' are given",
    ),
    "a weight of nothing": (
        lambda f: (f / "goal.toml").write_text(GOAL + "weight = 0.0\n"), (), ("tiny", "other"),
        "goal.toml: $.families.other.weight: Expected `float` > 0.0",
    ),
    "a family without a rate": (
        lambda f: (f / "goal.toml").write_text(GOAL.removesuffix("max_rate_per_s = 60.0\n")), (), ("tiny", "other"),
        "family 'other' names no rate, by which families share the devices",
    ),
    "a trace for all": (
        lambda f: (f / "trace.csv").write_text("time_s\n0.0\n0.5\n"), ("--from-trace=trace.csv",), ("tiny", "other"),
        "--from-trace: is the load of one family",
    ),
    "something to minimise": (
        lambda _: None, ("--minimise=cost",), ("tiny", "other"), "is to have the least cost, which is for one family",
    ),
    "a model that was not profiled": (
        lambda f: (f / "profile.json").write_bytes(
            msgspec.json.encode(both_profile(models={n: m for n, m in both_profile().models.items() if n != "big"}))
        ),
        (), ("tiny", "other"), "model 'big' is in the records but not in the profile",
    ),
    "more than the devices can do": (
        lambda f: (f / "goal.toml").write_text(GOAL.replace("= 60.0", "= 150.0")), (), ("tiny", "other"),
        "the families need more device time than there is to reach their rates",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_refused_in_one_sentence(
    case: str, folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    change, more, searches, words = WRONG[case]
    monkeypatch.chdir(folder)
    change(folder)
    assert words in refusal(arguments(folder, *more, searches=searches), capsys)
    assert not (folder / "plan.json").exists()
    assert not list(folder.glob("*.uses.json"))


def test_simulate_gives_a_family_its_share_and_says_so(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(arguments(folder))
    share = read_gear_plan(folder / "plan.json").families["tiny"].guaranteed_share
    capsys.readouterr()
    files = {"profile": "profile.json", "cluster": "cluster.toml", "records": "tiny.npz"}
    load = ["--family=tiny", "--rate=20", "--duration=20"]
    cli.main(["simulate", str(folder / "plan.json"), *(f"--{o}={folder / f}" for o, f in files.items()), *load])
    shown = " ".join(capsys.readouterr().out.split())
    assert f"tiny is simulated alone, with the {share:.0%} of the device time that it is guaranteed" in shown
