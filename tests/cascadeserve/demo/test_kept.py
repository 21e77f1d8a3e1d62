from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from cascadeserve.demo import plans
from cascadeserve.demo.kept import alone, digest_of, is_current, keep
from cascadeserve.errors import UsageError

if TYPE_CHECKING:
    from pathlib import Path


def test_a_file_is_kept_while_it_is_made_from_the_same(tmp_path: Path) -> None:
    path = tmp_path / "made"
    assert not is_current(path, "a")
    path.write_text("made from a")
    keep(path, "a")
    assert is_current(path, "a")
    assert not is_current(path, "b")
    assert not path.exists(), "what is outdated is removed, so that a command that refuses to overwrite can make it"


def test_a_file_without_a_note_may_be_half_done(tmp_path: Path) -> None:
    (tmp_path / "made").write_text("who knows")
    assert not is_current(tmp_path / "made", "a")


def test_a_note_without_its_file_says_nothing(tmp_path: Path) -> None:
    keep(tmp_path / "made", "a")
    assert not is_current(tmp_path / "made", "a")


def test_digests_depend_on_names_and_values_alone() -> None:
    assert digest_of(a=1, b=[2]) == digest_of(b=[2], a=1)
    assert len({digest_of(a=1, b=2), digest_of(a=2, b=1), digest_of(a=1), digest_of(c=1, b=2)}) == 4


def test_two_demos_do_not_share_a_state_directory(tmp_path: Path) -> None:
    with alone(tmp_path), pytest.raises(UsageError, match="another demo runs"), alone(tmp_path):
        pass
    with alone(tmp_path):
        pass


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    files = {name: tmp_path / name for name in ("search", "profile", "goal", "cluster")}
    for name, path in files.items():
        path.write_text(name)
    monkeypatch.setattr(plans, "GOAL", files.pop("goal"))
    monkeypatch.setattr(plans, "_CLUSTER", files.pop("cluster"))
    return files


def test_calibration_rows_that_certified_another_plan_are_not_used_again(
    tmp_path: Path, inputs: dict[str, Path]
) -> None:
    assert plans.calibration_seed(tmp_path, **inputs) == 0
    inputs["profile"].write_text("another one")
    assert plans.calibration_seed(tmp_path, **inputs) == 0, "nobody has looked at them yet"
    plans.calibration_path(tmp_path, 0).with_suffix(".npz.uses.json").write_text("{}")
    assert plans.calibration_seed(tmp_path, **inputs) == 0, "the same plan may be made again"
    inputs["profile"].write_text("a third one")
    assert plans.calibration_seed(tmp_path, **inputs) == 1
    assert plans.calibration_seed(tmp_path, **inputs) == 1
