from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.fakes.servers import Stack
from tests.fakes.tiny import plan_document, write_repository

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
# Runs a test of `digits` twice: with an orchestrator of one process, and with one that has front processes.
ONE_PROCESS_OR_FRONTS = pytest.mark.parametrize(
    "digits", [(), ("--fronts=2",)], ids=["one process", "fronts"], indirect=True, scope="module"
)


@pytest.fixture(scope="module")
def _digits_triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("digits")
    stack = Stack(folder, ROOT / "model_repository", ROOT / "examples" / "digits" / "gear_plan.json", ("triton0",))
    try:
        stack.start_triton("triton0")
        yield stack
    finally:
        stack.stop()


@pytest.fixture(scope="module")
def digits(_digits_triton: Stack, request: pytest.FixtureRequest) -> Iterator[Stack]:
    """The committed repository and plan, on one real Triton."""
    stack = _digits_triton
    stack.start_orchestrator(*getattr(request, "param", ()))
    yield stack
    assert stack.orchestrator is not None
    stack.orchestrator.stop()


def tiny_stack(folder: Path, endpoints: tuple[str, ...], document: dict[str, Any] | None = None) -> Stack:
    """The steerable family on real Tritons."""
    repository = folder / "repository"
    repository.mkdir()
    plan = folder / "plan.json"
    plan.write_text(json.dumps(document or plan_document(endpoints)))
    return Stack(folder, write_repository(repository), plan, endpoints)
