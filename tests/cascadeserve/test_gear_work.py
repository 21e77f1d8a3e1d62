from __future__ import annotations

from typing import Any

import msgspec
import pytest

from cascadeserve.artefacts import decode_json
from cascadeserve.gear_plan import GearPlan
from cascadeserve.gear_work import full_batches_s
from tests.fakes.tiny import plan_document

SLOTS = {"a": 1, "b": 2}


def full_batch_s(gear: str, *, where: dict[str, Any], load: dict[str, float] | None = None) -> float:
    """Of the small model, which takes three times as long on b, in a gear of a layout."""
    document = plan_document()
    family = document["families"]["family"]
    family["models"]["small"]["busy_s_on"] = {"b": [[1, 0.003], [64, 0.006]]}
    for layout in document["layouts"]:
        layout["instances"] = where
    if load is not None:
        for each in family["gears"]:
            each["load"] = {"small": load}
    plan = decode_json(msgspec.json.encode(document), GearPlan)
    return full_batches_s(plan, plan.families["family"], SLOTS)[gear]["small"]


BOTH = {"small": 1, "large": 1}


@pytest.mark.parametrize(
    ("where", "load", "expected_s"),
    [
        ({"a": BOTH}, None, 0.002),
        ({"b": BOTH}, None, 0.006),
        ({"a": BOTH, "b": {"large": 1}}, None, 0.002),
        # 500 batches a second on a, 2 x 166.7 on b
        ({"a": BOTH, "b": BOTH}, None, 3 / (1 / 0.002 + 2 / 0.006)),
        ({"a": BOTH, "b": BOTH}, {"a": 1.0}, 0.002),
        ({"a": BOTH, "b": BOTH}, {"a": 4.0, "b": 0.5}, 5 / (4 / 0.002 + 1 / 0.006)),
        # nowhere
        ({"a": {"large": 1}}, None, 0.002),
    ],
)
def test_endpoints_that_host_the_model_count_by_weight_and_slots(
    where: dict[str, Any], load: dict[str, float] | None, expected_s: float
) -> None:
    assert full_batch_s("calm", where=where, load=load) == pytest.approx(expected_s)


def test_the_batch_is_the_largest_that_the_gear_allows() -> None:
    """32 rows."""
    assert full_batch_s("busy", where={"b": BOTH}) == pytest.approx(0.003 + 0.003 * 31 / 63)
