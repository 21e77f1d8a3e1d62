"""Two families from one plan on one real Triton: both are answered, and one uses what the other leaves."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest

from tests.e2e.load import start_replay, tiny_rows
from tests.fakes.servers import Stack, running
from tests.fakes.tiny import plan_document, write_repository

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.triton, pytest.mark.loaded, pytest.mark.timeout(180)]


def document() -> dict[str, Any]:
    """The tiny family and one of a single model, each with half of the device time."""
    plan = plan_document()
    plan["layouts"] = [{"name": "narrow", "instances": {"a": {"small": 1, "large": 1, "third": 1}}}]
    plan["switching"] = {"gear_dwell_s": 0.5}
    family = plan["families"]["family"]
    family["gears"] = [gear for gear in family["gears"] if gear["layout"] == "narrow"]
    plan["families"]["other"] = family | {
        "models": {"third": family["models"]["small"]},
        "reference_model": "third",
        "ladder": [{"name": "third", "stages": [{"model": "third"}], "reach": [1.0]}],
        "gears": [family["gears"][0] | {"name": "only", "ladder_entry": "third", "max_rate_per_s": 400.0}],
    }
    for each in plan["families"].values():
        each["share"] = 0.5
    return plan


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("families")
    (folder / "repository").mkdir()
    (folder / "plan.json").write_text(json.dumps(document()))
    repository = write_repository(folder / "repository", ("small", "large", "third"))
    with running(Stack(folder, repository, folder / "plan.json", ("a",))) as stack:
        yield stack


def metric(stack: Stack, name: str, **labels: str) -> float:
    with urllib.request.urlopen(f"{stack.url}/metrics", timeout=5) as response:
        text = response.read().decode()
    listed = ",".join(f'{label}="{value}"' for label, value in labels.items())
    found = re.search(rf"^{re.escape(f'cascadeserve_{name}{{{listed}}}')} (\S+)$", text, re.MULTILINE)
    assert found, text
    return float(found[1])


def folders(tmp_path: Path) -> tuple[Path, Path]:
    """One for the load of each family."""
    mine, others = tmp_path / "family", tmp_path / "other"
    mine.mkdir()
    others.mkdir()
    return mine, others


def test_both_families_are_answered_and_what_one_leaves_the_other_uses(stack: Stack, tmp_path: Path) -> None:
    mine, others = folders(tmp_path)
    load = start_replay(mine, stack.url, tiny_rows(mine), "--rate=150", "--duration=12", "--slo=0.5", "--timeout=10")
    time.sleep(5.0)
    # 150 rows/s on all of the device are as 75 on half of it
    assert metric(stack, "available_device_share", family="family") == 1.0
    assert metric(stack, "gear_in_force", family="family", gear="calm") == 1.0
    beside = start_replay(
        others, stack.url, tiny_rows(others, escalated=0.0), "--rate=360", "--duration=5", "--slo=0.5", "--timeout=10",
        model="other",
    )  # fmt: skip
    time.sleep(4.0)
    assert metric(stack, "available_device_share", family="family") < 0.7
    assert metric(stack, "gear_in_force", family="family", gear="busy") == 1.0
    for report in (load.result(), beside.result()):
        assert report["ledger"]["answered_correct"] == report["ledger"]["sent"]
