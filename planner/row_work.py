"""What a row is taken to cost before anything is simulated: what the search weighs models by."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from planner.profile import batch_busy_s

if TYPE_CHECKING:
    from collections.abc import Mapping

    from planner.profile import Profile
    from planner.triggers import Device


def one_row_s(model: str, devices: Mapping[str, Profile]) -> float:
    """Busy time of a model for one row alone, on the fastest kind of device."""
    return min(batch_busy_s(profile.models[model], 1, 1) for profile in devices.values())


def row_work_s(device: Device, devices: Mapping[str, Profile], reference: str) -> dict[str, float]:
    """Slot-seconds per row by model, in batches that take no longer than one row of the reference model.

    `devices` is the profile by endpoint. It is the mean of one endpoint of each kind. So what is searched for depends
    neither on the SLO nor on the number of endpoints, and what serves with less serves with more.
    """
    first = {profile.device_kind: name for name, profile in reversed(list(devices.items()))}
    one_each = replace(device, slots={name: device.slots[name] for name in sorted(first.values())})
    limit_s = one_row_s(reference, devices)
    rows = {name: one_each.largest_within(name, limit_s) for name in device.models}
    return {name: one_each.batch_s(name, size) / size for name, size in rows.items()}
