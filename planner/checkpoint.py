"""Predictions that are kept while a plan is made, so that an interrupted `plan` goes on where it was.

Making a plan takes long only because of what the simulator is asked, and it always gives the same answer to the same
question. So the answers are kept, and nothing else: made again from them, a plan takes the same turns and comes out
byte by byte as if it had not been interrupted. A file holds the answers of one predictor, under the digest of all that
they depend on, the planner's own code included.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

import planner
from cascadeserve import policy
from cascadeserve.artefacts import digest_bytes, digest_files
from planner.predict import Prediction

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cascadeserve.gear_plan import Gear
    from planner.predict import Effort, Predictor

_DIGITS = 32


class Checkpoint:
    """A folder of predictions; nothing is made of it before there is one."""

    def __init__(self, folder: Path) -> None:
        """`folder` may be there from a run before."""
        self.folder = folder

    def file(self, content: object) -> Path:
        """File for predictions that depend on `content`, which msgspec can encode, and on the code."""
        digest = digest_bytes(msgspec.json.encode([_code_digest(), content])).partition(":")[2]
        return self.folder / f"{digest[:_DIGITS]}.jsonl"

    def remove(self) -> None:
        """Remove the folder, since the plan is made."""
        shutil.rmtree(self.folder, ignore_errors=True)


class RememberedPredictions:
    """A predictor that asks another one, nothing twice, and writes down what it said."""

    def __init__(self, predictor: Predictor, file: Path | None) -> None:
        """`file` is read if it is there; None: remember only for as long as this object lives."""
        self._predictor = predictor
        self._file = file
        self._known = {} if file is None else _read(file)

    def gear(self, gear: Gear, rate_per_s: float, effort: Effort) -> Prediction:
        """Predict a gear that stays in force at a steady rate."""
        key = _key("gear", [gear], rate_per_s, *effort)
        if key not in self._known:
            self._remember(key, list(vars(self._predictor.gear(gear, rate_per_s, effort)).values()))
        return Prediction(*self._known[key])

    def share_in_force(self, gears: Sequence[Gear], rate_per_s: float) -> float:
        """Share of the time in which the gear whose range holds a steady rate is in force."""
        key = _key("share_in_force", gears, rate_per_s)
        if key not in self._known:
            self._remember(key, self._predictor.share_in_force(gears, rate_per_s))
        share: float = self._known[key]
        return share

    def comes_down(self, gears: Sequence[Gear], calm_per_s: float, surge_per_s: float) -> bool:
        """Whether, after a surge, the gear whose range holds the calm rate is in force again."""
        key = _key("comes_down", gears, calm_per_s, surge_per_s)
        if key not in self._known:
            self._remember(key, self._predictor.comes_down(gears, calm_per_s, surge_per_s))
        comes: bool = self._known[key]
        return comes

    def _remember(self, key: str, found: object) -> None:
        line = json.dumps([key, found], default=_plain)
        # as it will be read, so that both runs go on from the same
        self._known[key] = json.loads(line)[1]
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            # line by line, so that an interruption costs the line that was being written and no other
            with self._file.open("a", encoding="utf-8") as file:
                file.write(line + "\n")


def _plain(value: Any) -> object:  # noqa: ANN401
    """Turn a number of numpy into one of Python."""
    return value.item()


def _key(what: str, gears: Sequence[Gear], *numbers: float) -> str:
    # what was predicted of a gear changes nothing about what it does
    bare = [msgspec.structs.replace(gear, predicted=None) for gear in gears]
    return hashlib.sha256(msgspec.json.encode([what, bare, numbers])).hexdigest()[:_DIGITS]


def _read(file: Path) -> dict[str, Any]:
    """Read what an interrupted run wrote; a line that was cut off is left out."""
    known: dict[str, Any] = {}
    if not file.exists():
        return known
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
    for line in lines:
        with contextlib.suppress(ValueError):
            key, found = json.loads(line)
            known[key] = found
    if lines and not lines[-1].endswith("\n"):
        # what is written next must not be joined to it
        file.write_text("".join(lines[:-1]), encoding="utf-8")
    return known


@functools.cache
def _code_digest() -> str:
    folders = [*map(Path, planner.__path__), *map(Path, policy.__path__)]
    return digest_files(
        {
            f"{folder.name}/{path.relative_to(folder)}": path.read_bytes()
            for folder in folders
            for path in folder.rglob("*.py")
        }
    )
