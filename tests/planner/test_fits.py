from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import msgspec
import pytest

from cascadeserve.errors import InvalidArtefact, UsageError
from planner.fits import check_fit
from planner.profile import Profile, read_profiles
from planner.records import Provenance
from tests.fakes.planned import cluster, profile, records

if TYPE_CHECKING:
    from pathlib import Path

    from cascadeserve.cluster import Cluster


def of_kinds(**kinds: str) -> Cluster:
    """Endpoints by name, each of a kind."""
    (one,) = cluster().endpoints
    endpoints = tuple(msgspec.structs.replace(one, name=name, device_kind=kind) for name, kind in kinds.items())
    return msgspec.structs.replace(cluster(), endpoints=endpoints)


def changed(kind: str, **changes: Any) -> Profile:
    """Profile of a kind whose large model is changed."""
    models = profile().models
    large = msgspec.structs.replace(models["large"], **changes)
    return profile(device_kind=kind, models=models | {"large": large})


def fit(profiles: dict[str, Profile], to: Cluster, found: Any = None) -> dict[str, Profile]:
    return check_fit(found or records(), profiles, to, family="tiny", models=("small", "large"))


def test_every_endpoint_gets_the_profile_of_its_kind_in_the_order_of_the_cluster() -> None:
    profiles = {kind: profile(device_kind=kind) for kind in ("l4", "laptop")}
    devices = fit(profiles, of_kinds(c="laptop", a="l4", b="laptop"))
    found = [(name, each.device_kind) for name, each in devices.items()]
    assert found == [("c", "laptop"), ("a", "l4"), ("b", "laptop")]


L4, LAPTOP = (profile(device_kind=kind) for kind in ("l4", "laptop"))
WRONG: dict[str, tuple[dict[str, Profile], Cluster, str]] = {
    "no profile of a kind": (
        {"l4": L4},
        of_kinds(a="l4", b="laptop"),
        "endpoint 'b' is of device kind 'laptop', but the profiles are of l4; profile it, or correct its device_kind",
    ),
    "no endpoint of a kind": (
        {"l4": L4, "laptop": LAPTOP},
        of_kinds(a="l4"),
        "no endpoint is of device kind 'laptop', of which there is a profile; they are of l4: leave it out",
    ),
    "other slots": (
        {"l4": L4, "laptop": profile(device_kind="laptop", slots=2)},
        of_kinds(a="l4", b="laptop"),
        "endpoint 'b' has 1 slots, but the profile of its device kind 'laptop' was measured with 2",
    ),
    "model of one kind only": (
        {"l4": L4, "laptop": profile(device_kind="laptop", models={"small": LAPTOP.models["small"]})},
        of_kinds(a="l4", b="laptop"),
        "model 'large' is in the records but not in the profile of device kind 'laptop'",
    ),
    "other version": (
        {"l4": L4, "laptop": changed("laptop", version=2)},
        of_kinds(a="l4", b="laptop"),
        "'large' is profiled in version 1 on device kind 'l4' and in version 2 on 'laptop'; give --model large:VERSION",
    ),
    "other model": (
        {"l4": changed("l4", digest="sha256:1"), "laptop": changed("laptop", digest="sha256:2")},
        of_kinds(a="l4", b="laptop"),
        "model 'large' changed between the profiles of device kind 'l4' and 'laptop'; profile both",
    ),
    "made of other models": (
        {"l4": L4, "laptop": changed("laptop", composed_of={"tokens": 1})},
        of_kinds(a="l4", b="laptop"),
        "model 'large' changed between the profiles of device kind 'l4' and 'laptop'",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused_naming_endpoint_and_kind(case: str) -> None:
    profiles, to, sentence = WRONG[case]
    with pytest.raises(UsageError) as caught:
        fit(profiles, to)
    assert sentence in str(caught.value)


def test_records_are_held_against_every_profile() -> None:
    found = records()
    large = replace(found.models["large"], provenance=Provenance(digest="sha256:1"))
    found = replace(found, models=found.models | {"large": large})
    profiles = {"l4": L4, "laptop": changed("laptop", digest="sha256:2")}
    with pytest.raises(UsageError, match="'large' changed between recording and profiling"):
        fit(profiles, of_kinds(a="l4", b="laptop"), found)


def test_two_profiles_of_one_kind_are_refused(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("one.json", "two.json", "three.json")]
    for path, kind in zip(paths, ("cpu", "l4", "cpu"), strict=True):
        path.write_bytes(msgspec.json.encode(profile(device_kind=kind)))
    assert list(read_profiles(paths[:2])) == ["cpu", "l4"]
    with pytest.raises(InvalidArtefact, match="is 'cpu', of which another profile is given") as caught:
        read_profiles(paths)
    assert (caught.value.path, caught.value.field) == (paths[2], "$.device_kind")
