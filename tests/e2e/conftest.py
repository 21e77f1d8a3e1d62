from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.fakes.servers import Stack, running
from tests.fakes.tiny import plan_document, write_repository

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The committed repository and plan, on one real Triton."""
    folder = tmp_path_factory.mktemp("digits")
    stack = Stack(folder, ROOT / "model_repository", ROOT / "examples" / "digits" / "gear_plan.json", ("triton0",))
    with running(stack):
        yield stack


def tiny_stack(folder: Path, endpoints: tuple[str, ...], document: dict[str, Any] | None = None) -> Stack:
    """The steerable family on real Tritons."""
    repository = folder / "repository"
    repository.mkdir()
    plan = folder / "plan.json"
    plan.write_text(json.dumps(document or plan_document(endpoints)))
    return Stack(folder, write_repository(repository), plan, endpoints)
