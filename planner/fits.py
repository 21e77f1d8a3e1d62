"""Whether records, profile and cluster fit each other: what holds for planning and for simulating alike."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cascadeserve.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from cascadeserve.cluster import Cluster
    from planner.profile import Profile
    from planner.records import Records


def check_fit(records: Records, profile: Profile, cluster: Cluster, *, family: str, models: Iterable[str]) -> None:
    """Check that all three are of one family, of the same models and of the same kind of device.

    `family` is the one that is wanted, `models` are those of it that are asked for.

    Raises:
        UsageError: they are not.

    """
    if records.family != family:
        raise UsageError(f"the records are of family {records.family!r}, but {family!r} is wanted; give its records")
    for name in models:
        if name not in records.models:
            raise UsageError(f"model {name!r} is not in the records, which hold {', '.join(records.models)}; record it")
        if name not in profile.models:
            raise UsageError(f"model {name!r} is in the records but not in the profile; profile it")
        recorded, profiled = records.models[name].provenance, profile.models[name]
        if recorded.version and recorded.version != profiled.version:
            raise UsageError(
                f"model {name!r} is recorded in version {recorded.version} and profiled in version {profiled.version}; "
                f"give --model {name}:VERSION alike"
            )
        if recorded.digest and profiled.digest and recorded.digest != profiled.digest:
            raise UsageError(f"model {name!r} changed between recording and profiling; do both anew")
    for endpoint in cluster.endpoints:
        kind = type(endpoint.device).__name__.removesuffix("Device").lower()
        if kind != profile.device_kind:
            raise UsageError(f"endpoint {endpoint.name!r} is a {kind}, but the profile is of a {profile.device_kind}")
        if endpoint.slots != profile.slots:
            raise UsageError(
                f"endpoint {endpoint.name!r} has {endpoint.slots} slots, but the profile was measured with "
                f"{profile.slots}; profile it with the slots it has"
            )
