"""What one family's plan is made from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from planner.rank_layouts import MOST_LAYOUTS

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cascadeserve.cluster import Cluster
    from cascadeserve.gear_plan import TensorSpec
    from planner.goal import FamilyGoal, RatePrior
    from planner.policies import Policy
    from planner.profile import Profile
    from planner.records import SearchRecords


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """All that one family's plan is made from, but the calibration rows.

    `profiles` is by device kind; `num_classes` is None where a model returns no scores; `largest_batch` is what the
    model configs allow, by model; `digests` are those of the files, by what they are. With `quickest` every rate gets
    the gear that answers soonest there, not the most accurate one; the goal then has a `max_rate_per_s`. The plan has
    up to `max_layouts` layouts. The family has `share` of the time of every device.
    """

    family: str
    goal: FamilyGoal
    prior: RatePrior | None
    profiles: Mapping[str, Profile]
    cluster: Cluster
    search: SearchRecords
    tensors: tuple[TensorSpec, ...]
    num_classes: int | None
    largest_batch: Mapping[str, int]
    digests: Mapping[str, str]
    policy: Policy = "cascade"
    quickest: bool = False
    max_layouts: int = MOST_LAYOUTS
    share: float = 1.0
    seed: int = 0
    name: str = ""

    def content(self) -> list[object]:
        """All that a prediction depends on, but the code."""
        return [
            self.family, self.goal, self.prior, dict(self.profiles), self.cluster, self.search.digest(), self.policy,
            dict(self.largest_batch), self.seed, self.max_layouts, self.share,
        ]  # fmt: skip
