"""Rows that make a model fail, end its process or kill the server, on two real Tritons: strangers are answered."""

from __future__ import annotations

import json
import re
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest

from tests.e2e.conftest import tiny_stack
from tests.fakes.servers import Stack, running
from tests.fakes.tiny import ERRS, EXITS, KILLS, mark_model

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.triton, pytest.mark.timeout(180)]

TIMEOUT_S = 20


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    stack = tiny_stack(tmp_path_factory.mktemp("isolation"), ("a", "b"))
    mark_model(stack.repository, "small")
    with running(stack):
        yield stack


def ask(stack: Stack, label: int, mark: float) -> tuple[int, str | int]:
    """Status, and the label or the error."""
    body = {
        "parameters": {"timeout": TIMEOUT_S * 1_000_000},
        "inputs": [
            {"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [label, 0.1 if label % 5 else 0.9, mark]}
        ],
    }
    request = urllib.request.Request(f"{stack.url}/v2/models/family/infer", json.dumps(body).encode(), method="POST")
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S + 1) as response:
            return response.status, json.load(response)["outputs"][0]["data"][0]
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.load(error)["error"]


def ask_all(stack: Stack, marks: dict[int, float], count: int) -> list[tuple[int, str | int]]:
    """Ask for labels 0 to count, 32 at a time."""
    with ThreadPoolExecutor(32) as pool:
        return list(pool.map(lambda label: ask(stack, label, marks.get(label, 0.0)), range(count)))


def right(label: int) -> tuple[int, int]:
    return 200, label + (100 if label % 5 else 0)


def test_rows_that_fail_are_refused_alone(stack: Stack) -> None:
    marks = dict.fromkeys((10, 150, 151, 290), ERRS)
    for label, answer in enumerate(ask_all(stack, marks, 400)):
        if label in marks:
            assert answer[0] == 500
            assert re.search("model 'small': row 0 of the request failed, alone: .*a row is marked", str(answer[1]))
        else:
            assert answer == right(label)


@pytest.mark.parametrize("mark", [KILLS, EXITS])
def test_a_row_that_crashes_does_so_twice_at_most_and_every_other_row_is_answered(stack: Stack, mark: float) -> None:
    crashes = stack.state / "crashes"
    crashes.unlink(missing_ok=True)
    over = threading.Event()

    def keep_up() -> None:
        while not over.wait(0.1):
            for name, process in list(stack.tritons.items()):
                assert process.process is not None
                if process.process.poll() is not None:
                    stack.start_triton(name)

    keeper = threading.Thread(target=keep_up)
    keeper.start()
    try:
        began_s = time.monotonic()
        answers = ask_all(stack, {100: mark}, 300)
        assert time.monotonic() - began_s < TIMEOUT_S
        assert "crashed it, alone" in str(answers[100][1])
        assert answers[100][0] == 500
        assert [answer for label, answer in enumerate(answers) if label != 100] == [
            right(label) for label in range(300) if label != 100
        ]
        ended = [label for line in crashes.read_text().splitlines() for label in json.loads(line)]
        assert Counter(ended)[100] == 2
        give_up_s = time.monotonic() + 15
        while ask(stack, 1, 0.0) != right(1) or endpoints_up(stack) < 2:
            assert time.monotonic() < give_up_s
            time.sleep(0.1)
    finally:
        over.set()
        keeper.join()


def endpoints_up(stack: Stack) -> int:
    with urllib.request.urlopen(f"{stack.url}/metrics", timeout=5) as response:
        return len(re.findall(r'cascadeserve_endpoint_up\{endpoint="\w"\} 1\.0', response.read().decode()))
