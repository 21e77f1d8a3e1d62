from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascadeserve.artefacts import write_json
from cascadeserve.errors import InvalidArtefact
from cascadeserve.gear_plan import PlannedModel
from planner.profile import (
    Host,
    Profile,
    batch_busy_s,
    busy_points,
    planned_busy_points,
    read_profile,
    rows_per_s,
    typical_spread_frac,
    work_rate,
)

if TYPE_CHECKING:
    from pathlib import Path


def cells(*busy: tuple[int, int, float]) -> list[dict[str, Any]]:
    return [{"batch": batch, "concurrency": concurrency, "busy_s": busy_s} for batch, concurrency, busy_s in busy]


def small_busy(*busy: tuple[int, int, float]) -> Any:
    return lambda changed: changed["models"]["small"].update(busy=cells(*busy))


def document() -> dict[str, Any]:
    return {
        "schema_version": 1,
        "device_kind": "cpu",
        "models": {
            "small": {"busy": cells((1, 1, 0.001), (8, 1, 0.002), (1, 2, 0.002), (8, 2, 0.004))},
            "large": {"busy": cells((1, 1, 0.010), (8, 1, 0.080))},
        },
        "pairs": [{"models": ["small", "large"], "batches": [8, 8], "interval_s": [0.008, 0.160]}],
    }


def read(folder: Path, changed: dict[str, Any]) -> Profile:
    path = folder / "profile.json"
    path.write_bytes(msgspec.json.encode(changed))
    return read_profile(path)


def test_what_a_person_writes_by_hand_is_enough(tmp_path: Path) -> None:
    hand = {"schema_version": 1, "device_kind": "gpu", "models": {"m": {"busy": cells((1, 1, 0.004), (16, 1, 0.010))}}}
    profile = read(tmp_path, hand)
    assert (profile.slots, profile.host, profile.pairs) == (1, None, ())
    assert profile.models["m"].memory_bytes is None
    # concurrency 2 was not measured: what there is stands in for it
    assert planned_busy_points(profile, "m") == ((1, 0.004), (16, 0.010))


def test_a_written_profile_reads_back_equal(tmp_path: Path) -> None:
    profile = msgspec.structs.replace(read(tmp_path, document()), host=Host(cpu_model="some CPU", num_cores=2))
    write_json(tmp_path / "again.json", profile)
    assert read_profile(tmp_path / "again.json") == profile


@pytest.mark.parametrize(
    ("change", "field"),
    [
        (small_busy((8, 1, 0.002), (1, 1, 0.001)), "$.models.small.busy[1].batch"),
        (small_busy((1, 1, 0.1), (1, 1, 0.1)), "$.models.small.busy[1].batch"),
        (small_busy((1, 2, 0.1)), "$.models.small.busy[0].concurrency"),
        (small_busy((1, 1, 0.1), (1, 3, 0.1)), "$.models.small.busy[1].concurrency"),
        (small_busy((1, 1, 0.1), (8, 1, 0.04)), "$.models.small.busy[1].busy_s"),
        (small_busy(), "$.models[...].busy"),
        (lambda d: d["models"]["small"]["busy"][0].update(busy_s=0.0), "$.models[...].busy[0].busy_s"),
        (lambda d: d["models"]["small"]["busy"][0].update(busy_s=-1.0), "$.models[...].busy[0].busy_s"),
        (lambda d: d["models"]["small"]["busy"][0].update(batch=0), "$.models[...].busy[0].batch"),
        (lambda d: d["models"]["small"].update(memory_bytes=-1), "$.models[...].memory_bytes"),
        (lambda d: d["models"]["small"].update(speed=1), "$.models[...]"),
        (lambda d: d.update(models={}), "$.models"),
        (lambda d: d.update(device_kind="two words"), "$.device_kind"),
        (lambda d: d.update(schema_version=2), "$.schema_version"),
        (lambda d: d["pairs"][0].update(models=["small", "nobody"]), "$.pairs[0].models"),
        (lambda d: d["pairs"][0].update(models=["small", "small"]), "$.pairs[0].models"),
        (lambda d: d["pairs"].append(d["pairs"][0]), "$.pairs[1]"),
        (lambda d: d["pairs"].append(d["pairs"][0] | {"models": ["large", "small"]}), "$.pairs[1]"),
    ],
)  # fmt: skip
def test_what_cannot_be_right_is_refused_with_its_path(tmp_path: Path, change: Any, field: str) -> None:
    changed = document()
    change(changed)
    with pytest.raises(InvalidArtefact) as refused:
        read(tmp_path, changed)
    assert refused.value.field == field
    assert "profile.json" in str(refused.value)


def test_a_small_dip_is_noise_and_is_smoothed(tmp_path: Path) -> None:
    noisy = document()
    noisy["models"]["small"]["busy"] = cells((1, 1, 0.0010), (2, 1, 0.0014), (4, 1, 0.0012), (8, 1, 0.0030))
    model = read(tmp_path, noisy).models["small"]
    assert dict(busy_points(model, 1)) == pytest.approx({1: 0.0010, 2: 0.0013, 4: 0.0013, 8: 0.0030})


@given(st.lists(st.floats(0.01, 0.0149), min_size=1, max_size=8))
def test_smoothed_times_never_fall_and_keep_their_sum(values: list[float]) -> None:
    busy = cells(*((2**index, 1, value) for index, value in enumerate(values)))
    plain = {"schema_version": 1, "device_kind": "cpu", "models": {"m": {"busy": busy}}}
    model = msgspec.convert(plain, Profile).models["m"]
    smooth = [busy_s for _, busy_s in busy_points(model, 1)]
    assert smooth == sorted(smooth)
    assert sum(smooth) == pytest.approx(sum(values))


@pytest.mark.parametrize(
    ("rows", "concurrency", "busy_s"),
    [(1, 1, 0.001), (4, 1, 0.001 + 0.001 * 3 / 7), (8, 1, 0.002), (16, 1, 0.004), (8, 2, 0.004), (8, 9, 0.004)],
)
def test_times_between_and_beyond_the_points(tmp_path: Path, rows: int, concurrency: int, busy_s: float) -> None:
    assert batch_busy_s(read(tmp_path, document()).models["small"], rows, concurrency) == pytest.approx(busy_s)


def test_a_plan_gets_the_times_under_load(tmp_path: Path) -> None:
    profile = read(tmp_path, document())
    points = planned_busy_points(profile, "small")
    assert points == ((1, 0.002), (8, 0.004))
    planned = PlannedModel(max_batch=profile.models["small"].max_batch, busy_s=points)
    assert planned.batch_busy_s(8) == batch_busy_s(profile.models["small"], 8, profile.slots + 1)
    assert rows_per_s(profile, "small", 8) == pytest.approx(8 / 0.004)


def test_throughput_counts_the_slots_that_have_an_instance(tmp_path: Path) -> None:
    changed = document()
    changed["slots"] = 4
    changed["models"]["small"]["instances"] = 2
    # 2 slot-seconds pass per second, since two of the four slots can hold a batch of this model
    assert rows_per_s(read(tmp_path, changed), "small", 8) == pytest.approx(2 * 8 / 0.004)


def test_work_rate_is_one_where_two_models_share_without_loss(tmp_path: Path) -> None:
    profile = read(tmp_path, document())
    # 0.004 s of work every 0.008 s, and 0.080 s of work every 0.160 s
    assert work_rate(profile, profile.pairs[0]) == pytest.approx(1.0)


def test_spread_is_unknown_where_nothing_was_repeated(tmp_path: Path) -> None:
    assert typical_spread_frac(read(tmp_path, document())) == 0.0
    changed = document()
    changed["models"]["large"]["busy"][0]["spread_frac"] = 0.3
    assert typical_spread_frac(read(tmp_path, changed)) == 0.3
