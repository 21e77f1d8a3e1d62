"""Whether files are those that a plan was made from, by their digests."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cascadeserve.artefacts import digest_bytes

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from cascadeserve.gear_plan import GearPlan


def changed_inputs(plan: GearPlan, cluster: Path | None, profiles: Mapping[str, Path]) -> str | None:
    """Say in a sentence which files are not those that the plan was made from; `profiles` is by device kind.

    None: none is, or the plan does not say what it was made from.
    """
    known = {} if plan.made_from is None else plan.made_from.digests
    given = [] if cluster is None else [("cluster", "cluster file", cluster)]
    # a plan that had one profile does not say of which kind
    given += [
        ("profile" if "profile" in known else f"profile.{kind}", f"profile of {kind!r}", path)
        for kind, path in profiles.items()
    ]
    changed = [
        f"{path} is not the {words}"
        for what, words, path in given
        if what in known and digest_bytes(path.read_bytes()) != known[what]
    ]
    if not changed:
        return None
    return f"{' and '.join(changed)} that the plan was made from, so what is said with it may not be what was planned."
