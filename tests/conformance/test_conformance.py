"""Whatever Triton's clients ask, the orchestrator answers as Triton does, except as `docs/differences.md` lists.

The same cases go to a real Triton with a model of equal name, signature and values, and to the orchestrator in front of
it. A difference that is listed and does not occur fails as well.
"""

from __future__ import annotations

import asyncio
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.conformance.outcomes import Outcome, different
from tests.conformance.pair import make_stack
from tests.conformance.raw_cases import GRPC, HTTP, run_grpc, run_services
from tests.conformance.stock_cases import CASES, run, runs
from tests.fakes.servers import Stack, running, status_of
from tests.orchestrator.wire.stock_clients import CLIENTS, StockClient

pytestmark = [pytest.mark.triton, pytest.mark.timeout(120)]

LIST = Path(__file__).parents[2] / "docs" / "differences.md"
_TRIES = 3
_OK = 200
_CODE = re.compile(r"`([^`]+)`")


class Listed(NamedTuple):
    """A row of the list: `case aspect`, with * for any, and what both servers are said to say."""

    names: list[str]
    triton: list[list[str]]
    ours: list[list[str]]


def listed() -> list[Listed]:
    """Read the list; in the cells of both servers ", or " stands between alternatives."""
    rows = []
    for line in LIST.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| `"):
            assert len(cells) == 4, f"a row has the columns case, Triton, ours, why: {line}"
            assert cells[3], f"a difference needs a reason: {line}"
            said = [[_CODE.findall(way) for way in cell.split(", or ")] for cell in cells[1:3]]
            rows.append(Listed(_CODE.findall(cells[0]), *said))
    return rows


LISTED = listed()


def _said(ways: list[list[str]], value: Any) -> bool:
    return any(all(text in str(value) for text in way) for way in ways)


class Found(NamedTuple):
    """What both answered to one case of one client."""

    client: str
    case: str
    triton: Outcome
    ours: Outcome

    def differences(self) -> dict[str, tuple[Any, Any]]:
        """`case aspect` -> what Triton says, what we say."""
        aspects = self.triton.keys() | self.ours.keys()
        if self.triton["status"] != self.ours["status"]:
            # One refuses and the other does not, or otherwise: what follows from it is no difference of its own.
            aspects = {"status"}
        pairs = {aspect: (self.triton.get(aspect), self.ours.get(aspect)) for aspect in aspects}
        return {f"{self.case} {aspect}": pair for aspect, pair in pairs.items() if different(*pair, aspect)}


async def ask_all(http: str, grpc: str) -> dict[tuple[str, str], Outcome]:
    """What the server at these addresses answers, by client and case."""
    answers = {}
    for kind in CLIENTS:
        client = StockClient(kind, http if kind.startswith("http") else grpc)
        for name, case in CASES.items():
            if runs(name, kind):
                answers[kind, name.rpartition(":")[2]] = await run(case, client)
    answers |= {("plain http", name): request.run(http) for name, request in HTTP.items()}
    answers |= {("plain grpc", name): run_grpc(message, grpc) for name, message in GRPC.items()}
    return answers | {("plain grpc", name): outcome for name, outcome in run_services(grpc).items()}


def ask_triton(stack: Stack) -> dict[tuple[str, str], Outcome]:
    """What Triton answers: of one that lives through it, for what it refuses has been seen to end it now and then."""
    for _ in range(_TRIES):
        answers = asyncio.run(ask_all(*(f"127.0.0.1:{port}" for port in stack.ports["a"][:2])))
        if status_of(f"{stack.triton_url('a')}/v2/health/ready") == _OK:
            return answers
        stack.tritons["a"].stop()
        stack.start_triton("a")
    raise AssertionError(f"Triton ended {_TRIES} times while it was asked:\n{stack.tritons['a'].text()}")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    stack = make_stack(tmp_path_factory.mktemp("pair"))
    ours = f"127.0.0.1:{stack.http_port}", stack.grpc_address
    with running(stack):
        alone = asyncio.run(ask_all(*ours))
        assert stack.orchestrator is not None
        stack.orchestrator.stop()
        stack.start_orchestrator("--fronts=1")
        behind_front = asyncio.run(ask_all(*ours))
        triton = ask_triton(stack)
    assert triton.keys() == alone.keys() == behind_front.keys()
    return [
        Found(f"{client}{how}", case, outcome, answers[client, case])
        for how, answers in (("", alone), (", by a front", behind_front))
        for (client, case), outcome in triton.items()
    ]


def test_nothing_differs_that_is_not_listed(found: list[Found]) -> None:
    patterns = [pattern for row in LISTED for pattern in row.names]
    unlisted = {
        f"{each.client}: {name}": pair
        for each in found
        for name, pair in each.differences().items()
        if not any(fnmatchcase(name, pattern) for pattern in patterns)
    }
    assert unlisted == {}


@pytest.mark.parametrize("row", LISTED, ids=lambda row: row.names[0])
def test_what_is_listed_differs_as_listed(found: list[Found], row: Listed) -> None:
    for name in row.names:
        pairs = [pair for each in found for key, pair in each.differences().items() if fnmatchcase(key, name)]
        assert pairs, f"{name} does not differ any more; take it off the list"
        assert any(_said(row.triton, pair[0]) and _said(row.ours, pair[1]) for pair in pairs), (
            f"{name} differs otherwise than listed: {pairs}"
        )


def test_most_is_answered_alike(found: list[Found]) -> None:
    """A suite that compares two refusals with each other says little."""
    alike = [each for each in found if all(name.endswith(" parameters") for name in each.differences())]
    assert len(alike) > len(found) / 2
    assert sum(each.triton["status"] in ("ok", 200) for each in alike) > len(found) / 3
