"""A repository that is full, read-only or broken by hand while the layout shifts, on a real Triton.

What stood serves on, one alarm says why, and the layout comes once the fault is gone.
"""

from __future__ import annotations

import contextlib
import json
import re
import subprocess
import threading
import time
import urllib.error
import urllib.request
from typing import TYPE_CHECKING

import pytest

from tests.e2e.conftest import tiny_stack
from tests.fakes.servers import running
from tests.fakes.tiny import plan_document

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from tests.fakes.servers import Stack

pytestmark = [pytest.mark.triton, pytest.mark.timeout(180)]

_FAILING = 'cascadeserve_instance_change_failing{endpoint="a",model="large"}'
_STATE_BYTES = 32 << 20
_BEGINS = "the next test begins\n"


def _mount(*arguments: str) -> str:
    """Run mount; returns why it did not."""
    with contextlib.suppress(FileNotFoundError):
        done = subprocess.run(["mount", *arguments], check=False, capture_output=True, text=True)
        return "" if done.returncode == 0 else done.stderr.strip() or f"mount ended with {done.returncode}"
    return "there is no mount"


def _unmount(path: Path) -> None:
    subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.fixture(scope="module")
def _small_disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A folder that is a small file system of its own, or why it is none."""
    folder = tmp_path_factory.mktemp("faults")
    state = folder / "state"
    state.mkdir()
    refused = _mount("-t", "tmpfs", "-o", f"size={_STATE_BYTES}", "tmpfs", str(state))
    yield folder, refused
    if not refused:
        _unmount(state)


@pytest.fixture(scope="module")
def _running(_small_disk: tuple[Path, str]) -> Iterator[Stack]:
    document = plan_document()
    gears = document["families"]["family"]["gears"]
    # any load at all calls for the broad layout
    gears[0]["max_rate_per_s"] = gears[1]["min_rate_per_s"] = 2.0
    gears[1]["max_rate_per_s"] = 4.0
    document["switching"] = {"gear_dwell_s": 0.3, "layout_up_after_s": 0.3, "layout_down_after_s": 0.5}
    with running(tiny_stack(_small_disk[0], ("a",), document)) as stack:
        yield stack


@pytest.fixture
def stack(_running: Stack) -> Stack:
    """The narrow layout stands, and the log says where the test begins."""
    assert _running.orchestrator is not None
    wait_until(lambda: has_gone_back(_running), _running)
    with _running.orchestrator.log.open("a") as log:
        log.write(_BEGINS)
    return _running


@pytest.fixture
def may_mount(_small_disk: tuple[Path, str]) -> None:
    """Skip a test where nothing can be mounted."""
    if _small_disk[1]:
        pytest.skip(f"a file system that is full or read-only has to be mounted, which fails here: {_small_disk[1]}")


def metrics(stack: Stack) -> str:
    with urllib.request.urlopen(f"{stack.url}/metrics", timeout=5) as response:
        return str(response.read().decode())


def in_force(stack: Stack) -> str:
    found = re.search(r'^cascadeserve_layout_in_force\{layout="(\w+)"\} 1\.0', metrics(stack), re.MULTILINE)
    return found[1] if found else ""


def counted(stack: Stack) -> int:
    """Instances of the large model that Triton itself says it has."""
    with urllib.request.urlopen(f"{stack.triton_url('a')}/v2/models/large/config", timeout=5) as response:
        return sum(group["count"] for group in json.load(response)["instance_group"])


def has_gone_back(stack: Stack) -> bool:
    """Whether the narrow layout stands; Triton counts instances as gone before the change is over."""
    done = re.search(r'instance_changes_total\{endpoint="a",model="large",outcome="ok"\} ([\d.]+)', metrics(stack))
    return in_force(stack) == "narrow" and counted(stack) == 1 and (done is None or float(done[1]) % 2 == 0)


def config_path(stack: Stack) -> Path:
    return stack.state / "model_repository" / "large" / "configs" / "a.pbtxt"


def wait_until(reached: Callable[[], bool], stack: Stack, *, timeout_s: float = 30.0) -> None:
    assert stack.orchestrator is not None
    give_up_s = time.monotonic() + timeout_s
    while not reached():
        assert time.monotonic() < give_up_s, stack.orchestrator.text()
        time.sleep(0.1)


def alarms(stack: Stack) -> list[str]:
    """Lines of the orchestrator's log that somebody has to read; that a busy machine made it wait is not meant."""
    assert stack.orchestrator is not None
    lines = stack.orchestrator.text().rpartition(_BEGINS)[2].splitlines()
    return [line for line in lines if re.search(r" (WARNING|ERROR) (?!orchestrator\.health)", line)]


@contextlib.contextmanager
def asked(stack: Stack) -> Iterator[list[object]]:
    """Some 40 rows per second for as long as the body lasts; in the end all of them must have been answered right."""
    answers: list[object] = []
    over = threading.Event()

    def ask() -> None:
        while not over.wait(0.025):
            entry = {"name": "x", "datatype": "FP32", "shape": [1, 3], "data": [7.0, 0.1, 0.0]}
            body = json.dumps({"inputs": [entry]}).encode()
            request = urllib.request.Request(f"{stack.url}/v2/models/family/infer", body, method="POST")
            try:
                with urllib.request.urlopen(request, timeout=10) as response:
                    answers.append(json.load(response)["outputs"][0]["data"][0])
            except urllib.error.HTTPError as error:
                with error:
                    answers.append(error.read())
            except OSError as error:
                answers.append(error)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        yield answers
    finally:
        over.set()
        asking.join()
    assert set(answers) == {107}


def check_fault(stack: Stack, fault: Callable[[], None], mend: Callable[[], None], says: str) -> None:
    """Have the layout shift in spite of a fault: the narrow one serves on, with one alarm; mended, the broad one comes.

    The file of the model is as the fault left it until then.
    """
    fault()
    try:
        left = config_path(stack).read_bytes()
        with asked(stack) as answers:
            wait_until(lambda: bool(alarms(stack)), stack)
            before = len(answers)
            assert config_path(stack).read_bytes() == left
            assert f"{_FAILING} 1.0" in metrics(stack)
            time.sleep(1.5)  # it is tried again after 1 s
            wait_until(lambda: len(answers) > before + 10, stack)
            assert config_path(stack).read_bytes() == left
            assert in_force(stack) == "narrow", alarms(stack)
            assert counted(stack) == 1
            mend()
            wait_until(lambda: in_force(stack) == "broad", stack)
            assert counted(stack) == 2
            assert f"{_FAILING} 0.0" in metrics(stack)
        (alarm,) = alarms(stack)
        assert " ERROR " in alarm
        assert says in alarm
        # no file is left behind, and the load gone, the layout goes back
        assert {path.name for path in (stack.state / "model_repository").iterdir()} == {".a.lease", "large", "small"}
        wait_until(lambda: has_gone_back(stack), stack)
        assert len(alarms(stack)) == 1
    finally:
        mend()


@pytest.mark.usefixtures("may_mount")
def test_a_full_disk(stack: Stack) -> None:
    filler = stack.state / "filler"

    def fill() -> None:
        with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(4096))

    check_fault(
        stack, fill, lambda: filler.unlink(missing_ok=True), "a.pbtxt: cannot be replaced (No space left on device)"
    )


@pytest.mark.usefixtures("may_mount")
def test_a_read_only_repository(stack: Stack) -> None:
    repository = stack.state / "model_repository"
    mounted = []

    def make_read_only() -> None:
        assert not _mount("--bind", str(repository), str(repository))
        mounted.append(repository)
        assert not _mount("-o", "remount,bind,ro", str(repository))

    def mend() -> None:
        while mounted:
            _unmount(mounted.pop())

    check_fault(stack, make_read_only, mend, "a.pbtxt: cannot be replaced (Read-only file system)")


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (lambda text: text.replace("{", "", 1), "a.pbtxt: is no Triton model config"),
        # Triton loads these without a word, and the model answers nothing any more
        (lambda _: "", "a.pbtxt: differs from large/config.pbtxt"),
        (lambda text: text[: text.index("output")], "a.pbtxt: differs from large/config.pbtxt"),
    ],
    ids=["syntax", "emptied", "half of it"],
)
def test_a_config_that_was_broken_by_hand(stack: Stack, broken: Callable[[str], str], says: str) -> None:
    text = config_path(stack).read_text()
    assert broken(text) != text

    def write(content: str) -> None:
        config_path(stack).write_text(content)

    check_fault(stack, lambda: write(broken(text)), lambda: write(text), says)
