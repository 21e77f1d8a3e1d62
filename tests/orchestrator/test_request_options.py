from __future__ import annotations

import math
from typing import Any

import pytest

from cascadeserve.errors import InvalidRequest
from orchestrator.request_options import NO_OPTIONS, RequestOptions, read_options
from tests.fakes import tiny


def fields(options: RequestOptions) -> dict[str, Any]:
    return {name: getattr(options, name) for name in RequestOptions.__slots__}


@pytest.mark.parametrize(
    ("parameters", "changed"),
    [
        ({}, {}),
        ({"timeout": 0, "priority": 0}, {}),
        ({"timeout": 250_000}, {"timeout_s": 0.25}),
        ({"priority": 3}, {"priority": 3}),
        ({"priority": 2**64 - 1}, {"priority": 2**64 - 1}),
        ({"cascade_reference": True}, {"reference": True}),
        ({"cascade_reference": False, "cascade_max_stage": 0}, {"max_stage": 0}),
        ({"cascade_max_stage": 1, "cascade_min_certainty": 0.9}, {"max_stage": 1, "min_certainty": 0.9}),
        ({"cascade_min_certainty": -3}, {"min_certainty": -3.0}),
        ({"work": 7}, {"work_per_row": 7.0}),
        ({"work": 0.5}, {"work_per_row": 0.5}),
        ({"work": "1, 2.5,5.5"}, {"work_per_row": 3.0}),
        # not ours, so ignored as Triton ignores them
        ({"colour": "red", "cascade": 1, "sequence_id": 4}, {}),
    ],
)
def test_parameters_are_read(parameters: dict[str, Any], changed: dict[str, Any]) -> None:
    assert fields(read_options(parameters, 3, max_work=10.0)) == fields(NO_OPTIONS) | changed


@pytest.mark.parametrize(
    ("parameters", "sentence"),
    [
        ({"timeout": "soon"}, "'timeout' must be a whole number of microseconds"),
        ({"timeout": -1}, "'timeout'"),
        ({"priority": -1}, "^invalid value for 'priority', expected value >= 0.$"),
        ({"priority": 1.0}, "^Unable to parse 'priority'"),
        ({"priority": "1"}, "^Unable to parse 'priority'"),
        ({"priority": True}, "^Unable to parse 'priority'"),
        ({"cascade_reference": 1}, "'cascade_reference' must be true or false"),
        ({"cascade_max_stage": -1}, "'cascade_max_stage' must be the number of a stage"),
        ({"cascade_max_stage": 1.0}, "'cascade_max_stage'"),
        ({"cascade_max_stage": True}, "'cascade_max_stage'"),
        ({"cascade_min_certainty": "0.5"}, "'cascade_min_certainty' must be a number"),
        ({"cascade_min_certainty": float("nan")}, "'cascade_min_certainty'"),
        ({"cascade_min_certainty": True}, "'cascade_min_certainty'"),
        ({"cascade_reference": True, "cascade_max_stage": 0}, "cannot go with it"),
        ({"cascade_maxstage": 0}, "no request parameter 'cascade_maxstage'; there are cascade_reference, "),
        ({"work": 0}, "'work' must be a number above 0, or a string of 3 of them"),
        ({"work": "1,2"}, "'work'"),
        ({"work": "1,2,x"}, "'work'"),
        ({"work": "1,2,nan"}, "'work'"),
        ({"work": "1,2,-1"}, "'work'"),
        ({"work": True}, "'work'"),
    ],
)
def test_what_cannot_be_is_refused_by_name(parameters: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidRequest, match=sentence):
        read_options(parameters, 3)


@pytest.mark.parametrize(
    ("options", "changes"),
    [
        (NO_OPTIONS, False),
        (RequestOptions(timeout_s=1.0, priority=1), False),
        (RequestOptions(max_stage=0), True),
        (RequestOptions(max_stage=1), False),
        (RequestOptions(min_certainty=tiny.THRESHOLD), False),
        (RequestOptions(min_certainty=tiny.THRESHOLD + 0.1), True),
    ],
)
def test_a_demand_changes_a_cascade_if_its_rows_may_go_another_way(options: RequestOptions, changes: bool) -> None:
    assert options.changes(tiny.plan().families["family"].entry("cascade")) is changes


@pytest.mark.parametrize("work", [1e308, 1_000_001, 300_000.0, "1,1,999999", "nan,1,1", math.inf])
def test_more_work_than_can_be_counted_beside_others_is_refused(work: float | str) -> None:
    with pytest.raises(InvalidRequest, match="1,000,000 at most for all rows together"):
        read_options({"work": work}, 4 if work == 300_000.0 else 3, max_work=1e9)
