from __future__ import annotations

import json
import os
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import bars
from benchmarks.bars import TIERS, Bar, Bars, resolve
from cascadeserve.artefacts import read_toml

ROOT = Path(__file__).parents[2]
# the example of RFC 6901, section 5
RFC = {
    "foo": ["bar", "baz"], "": 0, "a/b": 1, "c%d": 2, "e^f": 3, "g|h": 4, "i\\j": 5, 'k"l': 6, " ": 7, "m~n": 8,
}  # fmt: skip


@pytest.mark.parametrize(
    ("pointer", "value"),
    [
        ("", RFC), ("/foo", ["bar", "baz"]), ("/foo/0", "bar"), ("/", 0), ("/a~1b", 1), ("/c%d", 2), ("/e^f", 3),
        ("/g|h", 4), ("/i\\j", 5), ('/k"l', 6), ("/ ", 7), ("/m~0n", 8), ("/foo/1", "baz"),
    ],
)  # fmt: skip
def test_a_pointer_finds_what_rfc_6901_says(pointer: str, value: Any) -> None:
    assert resolve(RFC, pointer) == value


@given(st.text(max_size=8), st.text(max_size=8))
def test_any_key_can_be_pointed_at(outer: str, inner: str) -> None:
    escaped = "".join("/" + key.replace("~", "~0").replace("/", "~1") for key in (outer, inner))
    assert resolve({outer: {inner: 5}}, escaped) == 5


@pytest.mark.parametrize(
    "pointer", ["/bar", "/foo/2", "/foo/x", "/foo/-", "/foo/0/0", "/foo/0/x", "/a~1b/c", "/a/b", "/foo/", "//"]
)
def test_a_pointer_to_nothing_is_a_key_error(pointer: str) -> None:
    with pytest.raises(KeyError):
        resolve(RFC, pointer)


@pytest.mark.parametrize("pointer", ["/foo/-1", "/foo/01", "/foo/ 1", "/foo/+1", "/foo/1_0", "foo"])
def test_what_rfc_6901_does_not_allow_is_a_key_error_too(pointer: str) -> None:
    """An index has only digits and no leading zero, and a pointer starts with a slash."""
    with pytest.raises(KeyError):
        resolve({**RFC, "foo": list(range(11))}, pointer)


def bar(**changes: Any) -> Bar:
    fields = {"id": "a.b", "says": "", "tier": "quick", "command": "true", "result": "r.json", "pointer": "/v"}
    return Bar(**(fields | {"comparator": "==", "wanted": 0} | changes))


@pytest.mark.parametrize(
    ("value", "comparator", "wanted", "verdict"),
    [
        (0, "==", 0, "PASS"),
        (1, "==", 0, "FAIL"),
        (0.0, "==", 0, "PASS"),
        (True, "==", True, "PASS"),
        (False, "==", True, "FAIL"),
        (True, "==", 1, "FAIL"),
        (False, "==", 0, "FAIL"),
        (1, "==", True, "FAIL"),
        (False, "<=", 600.0, "FAIL"),
        (600.0, "<=", 600.0, "PASS"),
        (600.1, "<=", 600.0, "FAIL"),
        (600.0, "<", 600.0, "FAIL"),
        (5000, ">=", 5000, "PASS"),
        (4999, ">=", 5000, "FAIL"),
        (5000, ">", 5000, "FAIL"),
        ("abc", "==", "abc", "PASS"),
        ("abc", "==", 0, "FAIL"),
        (None, "==", 0, "NOT RUN"),
        (None, "==", False, "NOT RUN"),
    ],
)
def test_a_value_is_judged_by_its_kind_and_size(value: Any, comparator: str, wanted: Any, verdict: str) -> None:
    assert bars._verdict(bar(comparator=comparator, wanted=wanted), value) == verdict


@pytest.mark.parametrize("value", ["fast", [1], {"a": 1}])
def test_a_value_that_cannot_be_compared_fails(value: Any) -> None:
    assert bars._verdict(bar(comparator="<=", wanted=600.0), value) == "FAIL"


class Checkout:
    """A checkout with bars of its own."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.lines: list[str] = []

    def add(self, identifier: str, command: str, **fields: Any) -> None:
        given = {"id": identifier, "says": "It holds.", "tier": "quick", "command": command, "result": "r.json"}
        given |= {"pointer": "/value", "comparator": "==", "wanted": 1} | fields
        self.lines += ["[[bars]]", *(f"{key} = {json.dumps(value)}" for key, value in given.items())]

    def run(self, *arguments: str) -> tuple[int, dict[str, Any]]:
        """Exit status and the result file."""
        (self.root / "bars.toml").write_text("\n".join(self.lines))
        status = CliRunner().invoke(bars.main, list(arguments)).exit_code
        tier = arguments[arguments.index("--tier") + 1] if "--tier" in arguments else "quick"
        return status, json.loads((self.root / "results" / f"bars-{tier}.json").read_text())


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Checkout:
    monkeypatch.setattr(bars, "ROOT", tmp_path)
    monkeypatch.setattr(bars, "BARS", tmp_path / "bars.toml")
    monkeypatch.setattr(bars, "RESULTS", tmp_path / "results")
    return Checkout(tmp_path)


def writing(content: str, *, status: int = 0) -> str:
    """A command that writes r.json, and counts its runs."""
    return f"bash -c {shlex.quote(f'echo {shlex.quote(content)} > r.json; echo run >> runs; exit {status}')}"


def test_when_all_bars_hold_the_exit_status_is_0(checkout: Checkout) -> None:
    checkout.add("one.holds", writing('{"value": 1, "all": true}'))
    checkout.add("one.flag", writing('{"value": 1, "all": true}'), pointer="/all", wanted=True)
    status, verdicts = checkout.run()
    assert status == 0
    assert verdicts["one.holds"] == {"verdict": "PASS", "value": 1, "wanted": "== 1"}
    assert verdicts["one.flag"]["verdict"] == "PASS"


def test_bars_of_the_same_command_share_one_run(checkout: Checkout) -> None:
    for name in ("one.a", "one.b", "one.c"):
        checkout.add(name, writing('{"value": 1}'))
    checkout.run()
    assert (checkout.root / "runs").read_text() == "run\n"


def test_one_bar_that_fails_makes_the_exit_status_1(checkout: Checkout) -> None:
    checkout.add("one.holds", writing('{"value": 1}'))
    checkout.add("one.fails", writing('{"value": 1}'), wanted=2)
    status, verdicts = checkout.run()
    assert status == 1
    assert [entry["verdict"] for entry in verdicts.values()] == ["PASS", "FAIL"]


def test_the_result_file_decides_and_not_the_exit_status_of_the_command(checkout: Checkout) -> None:
    checkout.add("one.holds", writing('{"value": 1}', status=3))
    assert checkout.run()[0] == 0


@pytest.mark.parametrize(
    "command",
    [
        "true",  # writes nothing
        writing('{"other": 1}'),
        writing('{"value": null}'),
        writing("no JSON"),
        writing(""),
        "no-such-command-anywhere",
    ],
)
def test_a_command_that_leaves_no_value_is_not_run_with_exit_status_1(checkout: Checkout, command: str) -> None:
    checkout.add("one.absent", command)
    status, verdicts = checkout.run()
    assert status == 1
    assert (verdicts["one.absent"]["verdict"], verdicts["one.absent"]["value"]) == ("NOT RUN", None)


def test_a_file_from_before_the_run_says_nothing(checkout: Checkout) -> None:
    stale = checkout.root / "r.json"
    stale.write_text('{"value": 1}')
    os.utime(stale, (stale.stat().st_mtime - 5,) * 2)
    checkout.add("one.stale", "true")
    status, verdicts = checkout.run()
    assert status == 1
    assert verdicts["one.stale"]["verdict"] == "NOT RUN"


def test_the_time_of_a_command_is_a_value_too(checkout: Checkout) -> None:
    checkout.add("one.quick", "sleep 0.05", result="wall_s", pointer="", comparator="<=", wanted=60.0)
    checkout.add("one.slow", "sleep 0.05", result="wall_s", pointer="", comparator="<=", wanted=0.01)
    status, verdicts = checkout.run()
    assert status == 1
    assert [entry["verdict"] for entry in verdicts.values()] == ["PASS", "FAIL"]
    assert verdicts["one.quick"]["value"] == verdicts["one.slow"]["value"] >= 0.05


def test_only_the_bars_of_the_tier_and_the_prefix_run(checkout: Checkout) -> None:
    checkout.add("one.quick", writing('{"value": 1}'))
    checkout.add("two.quick", writing('{"value": 2}'))
    checkout.add("one.full", writing('{"value": 3}'), tier="full", wanted=3)
    assert list(checkout.run("--only", "one.")[1]) == ["one.quick"]
    assert list(checkout.run("--tier", "full")[1]) == ["one.full"]


def test_python_is_this_interpreter(checkout: Checkout) -> None:
    code = "import json, sys, pathlib; pathlib.Path('r.json').write_text(json.dumps({'value': sys.prefix}))"
    checkout.add("one.python", f"python -c {shlex.quote(code)}", wanted=sys.prefix)
    assert checkout.run()[0] == 0


COMMITTED = read_toml(ROOT / "benchmarks" / "bars.toml", Bars).bars


def test_every_committed_bar_has_an_id_of_its_own_and_says_something() -> None:
    assert COMMITTED
    assert len({bar.id for bar in COMMITTED}) == len(COMMITTED)
    assert all(bar.says.endswith(".") for bar in COMMITTED)
    assert {bar.tier for bar in COMMITTED} <= set(TIERS)


@pytest.mark.parametrize("committed", COMMITTED, ids=lambda bar: bar.id)
def test_a_committed_bar_reads_what_its_command_writes_and_names_tests_that_exist(committed: Bar) -> None:
    command = shlex.split(committed.command)
    if command[:2] == ["python", "-m"]:
        module = ROOT / command[2].replace(".", "/")
        assert module.with_suffix(".py").exists() or (module / "__main__.py").exists()
    if committed.result == "wall_s":
        assert committed.pointer == ""
        return
    assert committed.pointer.startswith("/")
    if "--result" in command:
        assert committed.result == command[command.index("--result") + 1]
    parts = [part.replace("~1", "/").replace("~0", "~") for part in committed.pointer.split("/")[1:]]
    for part in parts:
        if part.startswith("tests/"):
            assert (ROOT / part).is_file()
            assert parts == ["files", part, "all_passed"]
    if "benchmarks.suite" in command and parts[0] == "files":
        assert committed.wanted is True
