"""What `plan` says of files that are fine each by itself, but of which no plan can be made."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import pytest

from cascadeserve import cli
from planner.records_files import write_records
from tests.fakes.planned import CLUSTER_TOML, CONFIG, GOAL_TOML, FormulaPredictor, calibration, profile, records

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """All files that `plan` reads."""
    monkeypatch.setattr("planner.planning.SimulatedGears", FormulaPredictor.of)
    (tmp_path / "goal.toml").write_text(GOAL_TOML)
    (tmp_path / "cluster.toml").write_text(CLUSTER_TOML)
    for model in ("small", "large"):
        (tmp_path / "repository" / model).mkdir(parents=True)
        (tmp_path / "repository" / model / "config.pbtxt").write_text(CONFIG.format(name=model))
    write_records(tmp_path / "search.npz", records())
    write_records(tmp_path / "calibration.npz", calibration())
    write_profile(tmp_path, {"small": 100, "large": 400})
    return tmp_path


def write_profile(folder: Path, memory_bytes: Mapping[str, int | None]) -> None:
    known = profile()
    models = {
        name: msgspec.structs.replace(model, memory_bytes=memory_bytes[name]) for name, model in known.models.items()
    }
    (folder / "profile.json").write_bytes(msgspec.json.encode(msgspec.structs.replace(known, models=models)))


def endpoint(name: str, port: int, more: str = "") -> str:
    return (
        f'[[endpoints]]\nname = "{name}"\ngrpc = "127.0.0.1:{port}1"\nhttp = "127.0.0.1:{port}2"\n'
        f'metrics = "127.0.0.1:{port}3"\ndevice = {{ kind = "cpu", cores = [0] }}\n{more}\n'
    )


def arguments(folder: Path, *more: str) -> list[str]:
    files = ("goal.toml", "cluster.toml", "profile.json", "search.npz", "calibration.npz")
    given = [f"--{name.partition('.')[0]}={folder / name}" for name in files]
    return ["plan", *given, f"--repository={folder / 'repository'}", f"--output={folder / 'plan.json'}", *more]


def refusal(folder: Path, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    """The one line that `plan` prints; it leaves nothing behind, and spends no calibration rows."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments(folder, *more))
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("Error: ")
    assert error.count("\n") == 1
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    return error


ONE = "schema_version = 1\n"
# what is wrong -> (cluster file, words in the error)
CLUSTERS: dict[str, tuple[str, tuple[str, ...]]] = {
    "no endpoints": (
        f"{ONE}endpoints = []\n",
        ("cluster.toml: $.endpoints: lists none; describe at least one under [[endpoints]]",),
    ),
    "endpoints left out": (ONE, ("cluster.toml: $.endpoints: lists none",)),
    "a kind without a profile": (
        ONE + endpoint("a", 800, 'device_kind = "h100"'),
        ("endpoint 'a' is of device kind 'h100', but the profiles are of cpu; profile it, or correct",),
    ),
    "negative memory": (
        ONE + endpoint("a", 800, "memory_bytes = -5"),
        ("cluster.toml: $.endpoints[0].memory_bytes: Expected `int` >= 1",),
    ),
    "memory in fractions": (
        ONE + endpoint("a", 800, "memory_bytes = 1.5"),
        ("cluster.toml: $.endpoints[0].memory_bytes: Expected `int",),
    ),
    "less memory than any model takes": (
        ONE + endpoint("a", 800, "memory_bytes = 50"),
        ("model 'small' is to stand on 1 endpoint, but fits on 0; give endpoint 'a' 50 bytes more memory",),
    ),
    "a model that is larger than every endpoint": (
        ONE + endpoint("a", 800, "memory_bytes = 200") + endpoint("b", 900, "memory_bytes = 150"),
        (
            "model 'large' is to stand on 1 endpoint, but fits on 0; give endpoint 'a' 200 bytes more memory",
            # with what fits there is a plan, if that is accurate enough
            "Any of these would do: below_reference = ",
            # and with so much that the larger one is on the other endpoint
            "memory_bytes = 400 for endpoint 'a'.",
        ),
    ),
}


@pytest.mark.parametrize("case", CLUSTERS)
def test_a_cluster_for_which_nothing_can_be_planned_is_refused_in_one_sentence(
    case: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, sentences = CLUSTERS[case]
    (folder / "cluster.toml").write_text(text)
    error = refusal(folder, capsys)
    for words in sentences:
        assert words in error


def test_memory_of_an_endpoint_asks_for_that_of_the_models(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "cluster.toml").write_text(ONE + endpoint("a", 800, "memory_bytes = 500"))
    write_profile(folder, {"small": 100, "large": None})
    error = refusal(folder, capsys)
    assert "endpoint 'a' has a memory_bytes, but the profile of its device kind 'cpu' does not say what" in error
    assert "model 'large' takes; profile it, write its memory_bytes, or leave out that of the endpoint" in error


def test_a_negative_memory_of_a_model_is_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_profile(folder, {"small": -1, "large": 400})
    assert "profile.json: $.models[...].memory_bytes: Expected `int` >= 0" in refusal(folder, capsys)


@pytest.mark.parametrize("memory", ["", "memory_bytes = 450"])
def test_an_slo_that_no_model_can_keep_is_refused(
    memory: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "cluster.toml").write_text(ONE + endpoint("a", 800, memory))
    (folder / "goal.toml").write_text(GOAL_TOML.replace("0.1", "1e-6"))
    error = refusal(folder, capsys)
    assert "no ladder entry answers within the SLO of 0.001 ms at any rate; relax the SLO, or add a faster" in error


def test_a_rate_that_the_memory_does_not_allow_names_what_would_do(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "cluster.toml").write_text(ONE + endpoint("a", 800, "memory_bytes = 450"))
    (folder / "goal.toml").write_text(f"{GOAL_TOML}max_rate_per_s = 1000.0\n")
    error = refusal(folder, capsys)
    assert "the goal asks for 1000 rows/s, but 'large', the fastest entry that is accurate enough, serves only" in error
    assert "more endpoints like 'a'" in error


def test_the_least_cost_passes_over_endpoints_on_which_nothing_fits(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ONE + endpoint("a", 800, "memory_bytes = 50")
    (folder / "goal.toml").write_text(f"{GOAL_TOML}max_rate_per_s = 10.0\n")
    (folder / "cluster.toml").write_text(small + endpoint("b", 900, "memory_bytes = 60"))
    assert "model 'small' is to stand on 1 endpoint, but fits on 0" in refusal(folder, capsys, "--minimise=cost")
    (folder / "cluster.toml").write_text(small + endpoint("b", 900, "memory_bytes = 450"))
    cli.main(arguments(folder, "--minimise=cost"))
    assert "1 of 2 endpoints reach 10 rows/s: b." in capsys.readouterr().out
