from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest

from cascadeserve import cli
from cascadeserve.gear_plan import read_gear_plan
from cascadeserve.triton_config import format_config, parse_config
from planner.records_files import write_records
from tests.fakes.planned import (
    CLUSTER_TOML,
    CONFIG,
    GOAL_TOML,
    FormulaPredictor,
    calibration,
    profile,
    records,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """All files that `plan` reads."""
    monkeypatch.setattr("planner.planning.SimulatedGears", FormulaPredictor.of)
    monkeypatch.setenv("COLUMNS", "100")
    (tmp_path / "goal.toml").write_text(GOAL_TOML)
    (tmp_path / "cluster.toml").write_text(CLUSTER_TOML)
    (tmp_path / "profile.json").write_bytes(msgspec.json.encode(profile()))
    for model in ("small", "large"):
        (tmp_path / "repository" / model).mkdir(parents=True)
        (tmp_path / "repository" / model / "config.pbtxt").write_text(CONFIG.format(name=model))
    write_records(tmp_path / "search.npz", records())
    write_records(tmp_path / "calibration.npz", calibration())
    return tmp_path


def arguments(folder: Path, *more: str) -> list[str]:
    files = {name: folder / f"{name}.{kind}" for name, kind in (("goal", "toml"), ("cluster", "toml"))}
    files |= {"profile": folder / "profile.json", "search": folder / "search.npz"}
    files |= {"calibration": folder / "calibration.npz", "repository": folder / "repository"}
    files |= {"output": folder / "plan.json"}
    return ["plan", *(f"--{name}={path}" for name, path in files.items()), *more]


def test_plan_writes_a_plan_and_explains_it(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(arguments(folder, "--name", "first"))
    plan = read_gear_plan(folder / "plan.json")
    assert plan.name == "first"
    assert plan.made_from is not None
    assert list(plan.made_from.digests) == ["calibration", "cluster", "goal", "profile", "search"]
    shown = capsys.readouterr().out
    cli.main(["explain", str(folder / "plan.json")])
    assert capsys.readouterr().out == shown
    words = " ".join(shown.split())
    assert "Certified: on rows like the 6,000 calibration rows, with probability 0.975" in words
    assert "What rows look like does not depend on the load." in words
    assert "sustains; at" in words
    assert "gear overload" in words


SECOND = CLUSTER_TOML.replace("schema_version = 1", "").replace('"a"', '"b"').replace(":80", ":90")
SECOND += 'device_kind = "l4"\n'


def test_a_plan_for_two_kinds_takes_a_profile_of_each(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "cluster.toml").write_text(CLUSTER_TOML + SECOND)
    slow = profile(device_kind="l4")
    busy = tuple(msgspec.structs.replace(entry, busy_s=0.5 * entry.busy_s) for entry in slow.models["large"].busy)
    models = slow.models | {"large": msgspec.structs.replace(slow.models["large"], busy=busy)}
    (folder / "l4.json").write_bytes(msgspec.json.encode(msgspec.structs.replace(slow, models=models)))
    cli.main(arguments(folder, f"--profile={folder / 'l4.json'}"))
    plan = read_gear_plan(folder / "plan.json")
    assert plan.made_from is not None
    found = plan.made_from.digests
    assert list(found) == ["calibration", "cluster", "goal", "profile.cpu", "profile.l4", "search"]
    assert found["profile.cpu"] != found["profile.l4"]
    assert "b takes 0.50 times as long for large as" in " ".join(capsys.readouterr().out.split())


def test_profiles_that_the_cluster_has_no_use_for_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "l4.json").write_bytes(msgspec.json.encode(profile(device_kind="l4")))
    error = refusal(arguments(folder, f"--profile={folder / 'l4.json'}"), capsys)
    assert "no endpoint is of device kind 'l4'" in error
    error = refusal(arguments(folder, f"--profile={folder / 'profile.json'}"), capsys)
    assert "profile.json: $.device_kind: is 'cpu', of which another profile is given" in error
    (folder / "cluster.toml").write_text(CLUSTER_TOML + SECOND)
    error = refusal(arguments(folder), capsys)
    assert "endpoint 'b' is of device kind 'l4', but the profiles are of cpu" in error


def test_a_trace_is_an_input_too(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "trace.csv").write_text("time_s\n0.0\n0.5\n1.5\n")
    (folder / "goal.toml").write_text(GOAL_TOML + 'trace = { file = "trace.csv", rate_per_s = 50.0 }\n')
    cli.main(arguments(folder))
    plan = read_gear_plan(folder / "plan.json")
    assert plan.made_from is not None
    assert "trace" in plan.made_from.digests
    assert plan.families["tiny"].expected is not None
    assert "At the rates of the goal" in capsys.readouterr().out


def test_the_same_files_and_seed_give_the_same_bytes(folder: Path) -> None:
    cli.main(arguments(folder, "--seed", "7"))
    first = (folder / "plan.json").read_bytes()
    cli.main(arguments(folder, "--seed", "7"))
    assert (folder / "plan.json").read_bytes() == first


def test_a_draft_says_that_it_is_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main([word for word in arguments(folder) if not word.startswith("--calibration")])
    assert "Nothing is certified: this is a draft" in capsys.readouterr().out
    assert not (folder / "calibration.npz.uses.json").exists()


def test_the_reference_alone_has_nothing_to_certify(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(arguments(folder, "--policy", "reference"))
    assert "Every answer is that of large" in capsys.readouterr().out


def test_another_ladder_on_the_same_rows_has_to_be_asked_for(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(arguments(folder))
    (folder / "goal.toml").write_text(GOAL_TOML + "below_reference = 0.004\n")
    assert "certified another ladder" in refusal(arguments(folder), capsys)
    cli.main(arguments(folder, "--spend"))
    certificate = read_gear_plan(folder / "plan.json").families["tiny"].certificate
    assert certificate is not None
    assert certificate.delta == 0.0125


def refusal(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        cli.main(words)
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("Error: ")
    assert error.count("\n") == 1, "one sentence"
    return error


def change_array(path: Path, name: str, change: Callable[[Any], Any]) -> None:
    with np.load(path) as file:
        arrays = {key: file[key] for key in file.files}
    arrays[name] = change(arrays[name])
    np.savez(path, **arrays)


def nan_at(row: int) -> Callable[[Any], Any]:
    def change(array: Any) -> Any:
        array[row] = np.nan
        return array

    return change


def shuffled_batches(document: dict[str, Any]) -> None:
    document["models"]["small"]["busy"].reverse()


def emptied(path: Path) -> None:
    with np.load(path) as file:
        np.savez(path, **{key: file[key] if key == "header" else file[key][:0] for key in file.files})


def change_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


# what is wrong -> (change in the folder, file that is named, words in the error)
WRONG: dict[str, tuple[Callable[[Path], Any], str, str]] = {
    "NaN certainty": (
        lambda f: change_array(f / "search.npz", "small/certainty", nan_at(3)),
        "search.npz",
        "small/certainty: is NaN or infinite in 1 rows, first in row 3",
    ),
    "mismatched lengths": (
        lambda f: change_array(f / "search.npz", "large/label", lambda a: a[:-1]),
        "search.npz",
        "large/label: has 5999 rows, but truth has 6000",
    ),
    "empty calibration": (lambda f: emptied(f / "calibration.npz"), "calibration.npz", "truth: is empty"),
    "calibration rows for the search": (
        lambda f: (f / "search.npz").write_bytes((f / "calibration.npz").read_bytes()),
        "search.npz",
        "is 'calibration'",
    ),
    "batch sizes that do not rise": (
        lambda f: change_json(f / "profile.json", shuffled_batches),
        "profile.json",
        "$.models.small.busy[1].batch: must rise",
    ),
    "unknown key in the goal": (
        lambda f: (f / "goal.toml").write_text(GOAL_TOML + "speed = 3\n"),
        "goal.toml",
        "speed",
    ),
    "unknown key in the profile": (
        lambda f: change_json(f / "profile.json", lambda d: d.update(speed=3)),
        "profile.json",
        "speed",
    ),
    "unknown key in the cluster": (
        lambda f: (f / "cluster.toml").write_text(CLUSTER_TOML + "speed = 3\n"),
        "cluster.toml",
        "speed",
    ),
    "no goal": (lambda f: (f / "goal.toml").unlink(), "goal.toml", "cannot be read"),
    "model that is not in the repository": (
        lambda f: (f / "repository/small/config.pbtxt").unlink(),
        "repository",
        "'small'",
    ),
    "config that is no text": (
        lambda f: (f / "repository/small/config.pbtxt").write_bytes(b'name: "sm\xe4ll"'),
        "repository/small/config.pbtxt",
        "is no text in UTF-8",
    ),
    "model without outputs": (
        lambda f: (f / "repository/small/config.pbtxt").write_text('name: "small"'),
        "repository/small/config.pbtxt",
        "no output `label`",
    ),
    "model with scores of no classes": (
        lambda f: _with_output(f / "repository/small/config.pbtxt", 'output { name: "scores" dims: [2, 2] }'),
        "repository/small/config.pbtxt",
        "an output `scores` without one axis",
    ),
}


def test_a_family_whose_models_return_no_scores_is_planned_without_a_number_of_classes(folder: Path) -> None:
    _with_output(folder / "repository" / "large" / "config.pbtxt", "")
    cli.main(arguments(folder))
    assert read_gear_plan(folder / "plan.json").families["tiny"].num_classes is None


def _with_output(path: Path, text: str) -> None:
    """Give a config another output in place of the scores."""
    config = parse_config(path.read_text())
    del config.output[[output.name for output in config.output].index("scores")]
    path.write_text(f"{format_config(config)} {text}")


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_refused_in_one_sentence_naming_the_file(
    case: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, file, words = WRONG[case]
    change(folder)
    error = refusal(arguments(folder), capsys)
    assert str(folder / file) in error
    assert words in error
    assert not (folder / "plan.json").exists()


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [("--name", "a b/c", "made of other characters"), ("--output", "goal.toml/plan.json", "cannot be made a folder")],
)
def test_what_cannot_be_written_is_refused_before_calibration_rows_are_spent(
    option: str, value: str, words: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    value = str(folder / value) if option == "--output" else value
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments(folder, option, value))
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert option in error
    assert words in error
    assert not (folder / "plan.json").exists()
    assert not (folder / "calibration.npz.uses.json").exists()


def test_models_of_one_family_share_their_inputs(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "repository/small/config.pbtxt").write_text(CONFIG.format(name="small").replace("[3]", "[4]"))
    assert "differ in inputs or classes" in refusal(arguments(folder), capsys)


def test_records_of_another_split_are_refused_before_anything_is_planned(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def plan(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr("planner.cli_plan.Planner.plan", plan)
    write_records(folder / "calibration.npz", records())
    error = refusal(arguments(folder), capsys)
    assert "calibration.npz: header: $.split: is 'search', but the 'calibration' split is wanted here" in error


def test_explain_says_which_file_is_not_the_one_of_the_plan(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(arguments(folder))
    files = [f"--cluster={folder / 'cluster.toml'}", f"--profile={folder / 'profile.json'}"]
    capsys.readouterr()
    cli.main(["explain", str(folder / "plan.json"), *files])
    assert capsys.readouterr().err == ""
    (folder / "cluster.toml").write_text(CLUSTER_TOML + "cost_per_hour = 2.0\n")
    cli.main(["explain", str(folder / "plan.json"), *files, f"--html={folder / 'plan.html'}"])
    shown = capsys.readouterr()
    said = f"{folder / 'cluster.toml'} is not the cluster file that the plan was made from"
    assert shown.err.startswith(f"Warning: {said}")
    assert shown.err.count("\n") == 1
    assert "profile.json" not in shown.err
    assert said in (folder / "plan.html").read_text()


def test_plan_says_where_max_epsilon_asks_for_more_than_the_accuracy(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = "max_epsilon = 0.02 asks for more than min_accuracy = 0.8: "
    (folder / "goal.toml").write_text(GOAL_TOML + "min_accuracy = 0.8\n")
    cli.main(arguments(folder))
    assert said in capsys.readouterr().out
    (folder / "goal.toml").write_text(GOAL_TOML + "min_accuracy = 0.8\nmax_rate_per_s = 5000.0\n")
    assert said in refusal(arguments(folder), capsys)


def test_explain_refuses_what_is_no_plan(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "profile.json" in refusal(["explain", str(folder / "profile.json")], capsys)
