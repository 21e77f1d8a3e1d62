from __future__ import annotations

from cascadeserve.policy.admission import NONE, PREDICTED_WORK, in_time


def test_what_cannot_be_answered_by_its_deadline_is_not_begun() -> None:
    assert in_time(PREDICTED_WORK, 1.0, 0.2, 0.5, 0.25)
    assert not in_time(PREDICTED_WORK, 1.0, 0.2, 0.5, 0.35)


def test_without_admission_everything_is() -> None:
    assert in_time(NONE, 1.0, 2.0, 5.0, 5.0)
