"""The two plans of the comparison, by `cascadeserve plan`: cascades, and the largest model alone."""

from __future__ import annotations

import functools
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

from cascadeserve.artefacts import Artefact, digest_files, read_json, write_json
from cascadeserve.demo.family import EXAMPLE, FAMILY, REFERENCE, REPOSITORY
from cascadeserve.demo.kept import digest_file, digest_of, is_current, keep
from cascadeserve.demo.offline import run_command
from cascadeserve.errors import CascadeServeError
from cascadeserve.gear_plan import read_gear_plan

if TYPE_CHECKING:
    from cascadeserve.gear_plan import GearPlan

GOAL = EXAMPLE / "goal.toml"
# it has the endpoint of `LocalStack`; ports do not matter to a plan
_CLUSTER = EXAMPLE / "cluster.toml"


@dataclass(frozen=True)
class PlanPair:
    """Where the plans of the cascade and of the largest model alone are, and the rates (rows/s) they predict."""

    cascade: Path
    single: Path
    slo_s: float
    cascade_per_s: float
    single_per_s: float

    @property
    def is_complete(self) -> bool:
        """Whether there are plans at all: where nothing keeps the SLO the rate is 0."""
        return self.cascade_per_s > 0 and self.single_per_s > 0


class _Seed(Artefact, frozen=True, kw_only=True):
    """Which stream of calibration rows is in use, and for what."""

    seed: int
    made_for: str


def calibration_path(state: Path, seed: int) -> Path:
    """Where the records of the calibration rows of a seed are."""
    return state / f"calibration-{seed}.npz"


def calibration_seed(state: Path, *, search: Path, profile: Path) -> int:
    """Seed of the calibration rows: a new one whenever a plan from other inputs has looked at the old rows.

    A certificate may look at its rows once: another profile gives another ladder, and that one needs rows of its own.
    """
    path = state / "calibration-seed.json"
    made_for = digest_of(inputs=_inputs(search, profile, GOAL))
    known = read_json(path, _Seed) if path.exists() else _Seed(seed=0, made_for=made_for)
    if known.made_for != made_for:
        # the planner keeps a ledger beside calibration records that it has looked at
        was_used = calibration_path(state, known.seed).with_suffix(".npz.uses.json").exists()
        known = _Seed(seed=known.seed + was_used, made_for=made_for)
    write_json(path, known)
    return known.seed


async def make_plan(
    output: Path, *options: str, goal: Path, search: Path, profile: Path, calibration: Path | None,
    log: IO[bytes] | None = None,
) -> GearPlan:  # fmt: skip
    """Make a plan by the command, or take the one that was made from the same files; `options` are the command's.

    What the command says goes to `log`, or to the screen.

    Raises:
        UsageError: the command refuses, as it does where the goal cannot be met.

    """
    inputs = [*_inputs(search, profile, goal), *([digest_file(calibration)] if calibration else [])]
    made_from = digest_of(inputs=inputs, options=options)
    if not is_current(output, made_from):
        certify = [f"--calibration={calibration}"] if calibration else []
        await run_command(
            "plan", f"--goal={goal}", f"--cluster={_CLUSTER}", f"--repository={REPOSITORY}", f"--profile={profile}",
            f"--search={search}", *certify, *options, f"--output={output}", log=log,
        )  # fmt: skip
        keep(output, made_from)
    plan = read_gear_plan(output)
    if (reference := plan.families[FAMILY].reference_model) != REFERENCE:
        raise CascadeServeError(
            f"{output} takes {reference} for the most accurate model, the demo {REFERENCE}; were the models changed?"
        )
    return plan


def planned_rate_per_s(plan: GearPlan) -> float:
    """Rate, in rows per second, up to which a plan has gears that are not degraded."""
    return max(plan.families[FAMILY].max_rate_per_s(layout.name) for layout in plan.layouts)


def _inputs(search: Path, profile: Path, goal: Path) -> list[str]:
    """Digests of what a plan is made from, and of what makes it: another planner makes another plan."""
    return [*(digest_file(path) for path in (search, profile, goal, _CLUSTER)), _planner_digest()]


@functools.cache
def _planner_digest() -> str:
    sources: dict[str, bytes] = {}
    for name in ("planner", "cascadeserve"):
        (folder,) = importlib.import_module(name).__path__
        sources |= {f"{name}/{path.relative_to(folder)}": path.read_bytes() for path in Path(folder).rglob("*.py")}
    return digest_files(sources)
