from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from cascadeserve.errors import UsageError
from orchestrator.lease import lease

if TYPE_CHECKING:
    from pathlib import Path


def test_endpoints_are_steered_by_one_at_a_time(tmp_path: Path) -> None:
    with lease(tmp_path, ["a", "b"]):
        refused = pytest.raises(UsageError, match=r"^another orchestrator steers endpoint 'b' of .*; stop it first$")
        with refused, lease(tmp_path, ["b", "c"]):
            pass
        with lease(tmp_path, ["c"]):  # what was refused holds nothing
            pass
    with lease(tmp_path, ["a", "b"]):
        pass


def test_where_nothing_can_be_written_there_is_nothing_to_hold(tmp_path: Path) -> None:
    with lease(tmp_path / "absent", ["a"]), lease(tmp_path / "absent", ["a"]):
        pass
