"""Transitions in a plan: what leads from one layout to another, and what is refused."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from cascadeserve.errors import InvalidArtefact
from cascadeserve.gear_plan import Transition, read_gear_plan
from tests.fakes.tiny import plan_document

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

Document = dict[str, Any]


def with_transitions() -> Document:
    """Tiny's two layouts differ in a second instance of the large model on `a`."""
    step = {"endpoint": "a", "model": "large", "present": 1, "wanted": 2}
    up = {
        "from_layout": "narrow", "to_layout": "broad", "gears": {"family": "busy"}, "steps": [step], "duration_s": 1.0,
        "least_rate_per_s": {"family": 900.0},
    }  # fmt: skip
    down = up | {
        "from_layout": "broad", "to_layout": "narrow", "gears": {"family": "wide"}, "duration_s": 0.0,
        "steps": [step | {"present": 2, "wanted": 1}],
    }  # fmt: skip
    return plan_document() | {"transitions": [up, down]}


def read(folder: Path, document: Document) -> Any:
    path = folder / "plan.json"
    path.write_text(json.dumps(document))
    return read_gear_plan(path)


def test_they_are_found_by_the_layouts_they_join(tmp_path: Path) -> None:
    plan = read(tmp_path, with_transitions())
    up = plan.transition("narrow", "broad")
    assert up.gears == {"family": "busy"}
    assert up.states(plan.layout("narrow").instances) == [{"a": {"small": 1, "large": 2}}]
    assert plan.transition("narrow", "narrow") is None


def test_what_is_unloaded_is_in_no_state() -> None:
    steps = [
        {"endpoint": "a", "model": "small", "present": 1, "wanted": 0},
        {"endpoint": "b", "model": "small", "present": 0, "wanted": 1},
    ]
    transition = msgspec.convert(with_transitions()["transitions"][0] | {"steps": steps}, Transition)
    assert transition.states({"a": {"small": 1, "large": 1}}) == [
        {"a": {"large": 1}},
        {"a": {"large": 1}, "b": {"small": 1}},
    ]


WRONG: dict[str, tuple[Callable[[Document], Any], str, str]] = {
    "unknown layout": (
        lambda d: d["transitions"][0].update(to_layout="wide"),
        "$.transitions[0]",
        "unknown layout wide; layouts are broad, narrow",
    ),
    "twice": (
        lambda d: d["transitions"].append(d["transitions"][0]),
        "$.transitions[2]",
        "the second one from layout 'narrow' to 'broad'",
    ),
    "not what stands": (
        lambda d: d["transitions"][0]["steps"][0].update(present=0),
        "$.transitions[0].steps[0].present",
        "is 0, but 1 stand by then",
    ),
    "a step that changes nothing": (
        lambda d: d["transitions"][0]["steps"][0].update(wanted=1),
        "$.transitions[0].steps[0].wanted",
        "changes nothing",
    ),
    "leads elsewhere": (
        lambda d: d["transitions"][0].update(steps=[]),
        "$.transitions[0].steps",
        "do not lead to layout 'broad' on endpoint 'a'",
    ),
    "no gear": (
        lambda d: d["transitions"][0].update(gears={}),
        "$.transitions[0].gears.family",
        "must name a gear of layout 'narrow', which are busy, calm",
    ),
    "gear of the other layout": (
        lambda d: d["transitions"][0].update(gears={"family": "wide"}),
        "$.transitions[0].gears.family",
        "must name a gear of layout 'narrow'",
    ),
    "a model in use is gone for a while": (
        lambda d: d["transitions"][0].update(
            steps=[
                {"endpoint": "a", "model": "large", "present": 1, "wanted": 0},
                {"endpoint": "a", "model": "large", "present": 0, "wanted": 2},
            ]
        ),
        "$.transitions[0].gears.family",
        "uses 'large', which stands nowhere after one of the steps",
    ),
    "unknown key": (lambda d: d["transitions"][0].update(cost=1), "$.transitions[0]", "unknown"),
}


@pytest.mark.parametrize(("change", "field", "problem"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_refused(change: Callable[[Document], Any], field: str, problem: str, tmp_path: Path) -> None:
    document = with_transitions()
    change(document)
    with pytest.raises(InvalidArtefact) as caught:
        read(tmp_path, document)
    assert caught.value.field == field
    assert problem in str(caught.value)
