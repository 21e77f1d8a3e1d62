"""Whether records, profiles and cluster fit each other: what holds for planning and for simulating alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cascadeserve.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from cascadeserve.cluster import Cluster
    from cascadeserve.gear_plan import GearPlan
    from planner.profile import Profile
    from planner.records import Records


def check_fit(
    records: Records, profiles: Mapping[str, Profile], cluster: Cluster, *, family: str, models: Iterable[str]
) -> dict[str, Profile]:
    """Check that all are of one family and of the same models, and that every kind of device has its profile.

    `profiles` is by device kind, `family` the one that is wanted, `models` are those of it that are asked for. Returns
    the profile of every endpoint by name, in the order of the cluster file.

    Raises:
        UsageError: they are not, or there is a profile too many.

    """
    if records.family != family:
        raise UsageError(f"the records are of family {records.family!r}, but {family!r} is wanted; give its records")
    for name in models:
        if name not in records.models:
            raise UsageError(f"model {name!r} is not in the records, which hold {', '.join(records.models)}; record it")
        for kind, profile in profiles.items():
            if name not in profile.models:
                raise UsageError(
                    f"model {name!r} is in the records but not in the profile of device kind {kind!r}; profile it"
                )
            _check_recorded(name, records, profile)
        _check_alike(name, profiles)
    devices: dict[str, Profile] = {}
    for endpoint in cluster.endpoints:
        if endpoint.kind not in profiles:
            raise UsageError(
                f"endpoint {endpoint.name!r} is of device kind {endpoint.kind!r}, but the profiles are of "
                f"{', '.join(profiles)}; profile it, or correct its device_kind"
            )
        profile = devices[endpoint.name] = profiles[endpoint.kind]
        if endpoint.slots != profile.slots:
            raise UsageError(
                f"endpoint {endpoint.name!r} has {endpoint.slots} slots, but the profile of its device kind "
                f"{endpoint.kind!r} was measured with {profile.slots}; profile it with the slots it has"
            )
    _check_used(profiles, cluster)
    return devices


def check_planned(plan: GearPlan, profiles: Mapping[str, Profile], cluster: Cluster) -> None:
    """Check that profiles, by device kind, are of devices of a cluster and of the models of a plan.

    Raises:
        UsageError: there is a profile too many, or a model changed since it was profiled.

    """
    _check_used(profiles, cluster)
    models = {name: model for family in plan.families.values() for name, model in family.models.items()}
    for kind, profile in profiles.items():
        for name, planned in models.items():
            profiled = profile.models.get(name)
            if profiled is None:
                raise UsageError(f"model {name!r} is in the plan but not in the profile of device kind {kind!r}")
            changed = planned.digest and profiled.digest and planned.digest != profiled.digest
            if changed or planned.version != profiled.version:
                raise UsageError(
                    f"model {name!r} is another one in the plan than in the profile of device kind {kind!r}; give the "
                    "profile that the plan was made with"
                )


def _check_used(profiles: Mapping[str, Profile], cluster: Cluster) -> None:
    kinds = dict.fromkeys(endpoint.kind for endpoint in cluster.endpoints)
    if unused := [kind for kind in profiles if kind not in kinds]:
        raise UsageError(
            f"no endpoint is of device kind {unused[0]!r}, of which there is a profile; they are of "
            f"{', '.join(kinds)}: leave it out, or set the device_kind of its endpoints"
        )


def _check_recorded(name: str, records: Records, profile: Profile) -> None:
    recorded, profiled = records.models[name].provenance, profile.models[name]
    if recorded.version and recorded.version != profiled.version:
        raise UsageError(
            f"model {name!r} is recorded in version {recorded.version} and profiled in version {profiled.version}; "
            f"give --model {name}:VERSION alike"
        )
    if recorded.digest and profiled.digest and recorded.digest != profiled.digest:
        raise UsageError(f"model {name!r} changed between recording and profiling; do both anew")


def _check_alike(name: str, profiles: Mapping[str, Profile]) -> None:
    """Check that all profiles are of the same model: records need not say which."""
    (first_kind, first), *others = ((kind, profile.models[name]) for kind, profile in profiles.items())
    for kind, other in others:
        if other.version != first.version:
            raise UsageError(
                f"model {name!r} is profiled in version {first.version} on device kind {first_kind!r} and in version "
                f"{other.version} on {kind!r}; give --model {name}:VERSION alike"
            )
        changed = first.digest and other.digest and first.digest != other.digest
        if changed or other.composed_of != first.composed_of:
            raise UsageError(
                f"model {name!r} changed between the profiles of device kind {first_kind!r} and {kind!r}; profile both"
            )
