from __future__ import annotations

from benchmarks.int8 import made_dear, most_reaching
from planner.profile import BusyEntry, ModelProfile, PairEntry, Profile
from tests.fakes import tiny


def test_only_the_one_model_becomes_dear() -> None:
    busy = (BusyEntry(batch=1, concurrency=1, busy_s=0.01, wall_s=0.02), BusyEntry(batch=8, concurrency=1, busy_s=0.04))
    models = {name: ModelProfile(busy=busy) for name in ("a", "b")}
    pair = PairEntry(models=("a", "b"), batches=(1, 1), in_flight=(1, 1), interval_s=(0.02, 0.02))
    profile = Profile(schema_version=1, device_kind="cpu", slots=1, models=models, pairs=(pair,))
    dear = made_dear(profile, "b", 3.0)
    assert dear.models["a"] == profile.models["a"]
    assert [(entry.busy_s, entry.wall_s) for entry in dear.models["b"].busy] == [(0.03, 0.06), (0.12, None)]
    assert dear.pairs == ()


def test_the_gear_that_sends_most_rows_to_a_model_counts() -> None:
    document = tiny.plan_document()
    document["families"] = {"digits": document["families"]["family"]}
    plan = tiny.plan(document)
    assert most_reaching(plan, "small") == 1.0
    assert 0.0 < most_reaching(plan, "large") < 1.0
    assert most_reaching(plan, "absent") == 0.0
