"""Rules of the house that import-linter cannot state."""

from __future__ import annotations

import ast
import importlib.util
import re
import shutil
import socket
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from benchmarks.suite import LOADED_TESTS, TRITON_TESTS

ROOT = Path(__file__).parents[1]
PACKAGES = [
    name
    for name in ("cascadeserve", "orchestrator", "export", "planner", "examples")
    if (ROOT / name / "__init__.py").exists()
]
FILES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
# they run only inside Triton's stub, or run the program when they are imported
NOT_IMPORTABLE = {
    "cascadeserve/local_triton/onnxruntime_backend/model.py",
    "cascadeserve/__main__.py",
    "export/python_model/model.py",
}
TALKS_TO_TRITON = re.compile(
    r"cascadeserve/triton_config\.py|cascadeserve/replay/grpc\w*\.py|orchestrator/triton\.py"
    r"|orchestrator/wire/(rpc|codec_grpc)\w*\.py|planner/triton_calls\.py|export/served\.py"
)
MAX_LINES = 400

# Imported first, so that every module of ours can be imported in a fork of its own at little cost.
IMPORT_EACH = """
import importlib, os, sys, warnings
for name in sys.argv[1].split(","):
    try:
        importlib.import_module(name)
    except ImportError:
        pass
warnings.simplefilter("error")
failed = 0
for name in sys.argv[2:]:
    child = os.fork()
    if child == 0:
        try:
            importlib.import_module(name)
        except BaseException as error:
            print(f"{name}: {error!r}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    failed |= os.waitpid(child, 0)[1]
sys.exit(1 if failed else 0)
"""
SERVING = (
    "aiohttp.web,click,google.protobuf.text_format,grpc.aio,jinja2,matplotlib.figure,msgspec,numba,numpy,"
    "prometheus_client,rich.console,scipy.optimize,scipy.special,tritonclient.grpc"
)


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_name(path: Path) -> str:
    return relative(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@cache
def imports(path: Path) -> set[str]:
    """Top-level names of all that a file imports, wherever in the file and by whichever statement."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(), filename=str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.partition(".")[0])
    return names


def test_the_packages_are_found() -> None:
    assert {"cascadeserve", "orchestrator"} <= set(PACKAGES)
    assert len(FILES) > 40


def test_no_file_is_longer_than_can_be_read_in_one_go() -> None:
    assert {relative(path): n for path in FILES if (n := len(path.read_text().splitlines())) > MAX_LINES} == {}


def test_no_module_is_a_drawer_for_everything() -> None:
    drawers = {"utils", "util", "common", "helpers", "helper", "misc", "shared"}
    assert [relative(path) for path in FILES if {path.stem, path.parent.name} & drawers] == []


def test_only_the_modules_that_talk_to_triton_import_its_client() -> None:
    users = [relative(path) for path in FILES if "tritonclient" in imports(path)]
    assert [user for user in users if not TALKS_TO_TRITON.fullmatch(user)] == []
    assert "orchestrator/triton.py" in users


def test_torch_is_needed_only_where_models_are_exported() -> None:
    training = {"torch", "torchvision", "onnx", "onnxscript"}
    users = [relative(path) for path in FILES if imports(path) & training]
    assert [user for user in users if not user.startswith(("export/", "examples/"))] == []


@pytest.mark.parametrize(
    ("packages", "third_party"),
    [
        (("cascadeserve", "orchestrator", "planner"), SERVING),
        pytest.param(("export", "examples"), f"{SERVING},torch,onnx,sklearn.datasets", marks=pytest.mark.torch),
    ],
    ids=["serving", "export"],
)
def test_every_module_can_be_imported_first(packages: tuple[str, ...], third_party: str) -> None:
    """A module that works only after another one was imported hides a circle."""
    if "export" in packages and importlib.util.find_spec("torch") is None:
        pytest.skip("needs the [export] extra")
    names = [
        module_name(path) for path in FILES if relative(path).partition("/")[0] in packages
        if relative(path) not in NOT_IMPORTABLE
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_EACH, third_party, *names], cwd=ROOT, check=False, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_every_package_that_is_installed_is_listed_and_nothing_else() -> None:
    """The list in pyproject.toml is written by hand: a folder forgotten there is missing from the wheel only."""
    text = (ROOT / "pyproject.toml").read_text()
    listed = set(ast.literal_eval("[" + text.partition("\npackages = [")[2].partition("]")[0] + "]"))
    installed = ("cascadeserve/", "orchestrator/", "export/", "planner/")
    present = {
        module_name(path) for path in FILES if path.name == "__init__.py" and relative(path).startswith(installed)
    }
    assert listed == present


def test_sessions_that_are_told_where_to_look_leave_no_test_out() -> None:
    """`make test` and the benchmark of it collect tests on a Triton only where they are: to import all takes long."""
    for mark, places in (("triton", TRITON_TESTS), ("loaded", LOADED_TESTS)):
        assert f"\n{mark.upper()}_TESTS := {' '.join(places)}\n" in (ROOT / "Makefile").read_text()
        marked = [
            relative(path) for path in (ROOT / "tests").rglob("*.py") if re.search(rf"mark\.{mark}\b", path.read_text())
        ]
        assert [name for name in marked if not any(name.startswith(place) for place in places)] == []


def test_tracked_files_name_no_machine_and_no_place_on_one() -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("needs the git checkout")
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True)
    # written in two parts, so that this file passes its own test
    patterns = ["/" + r"(home|Users)/[a-z]\w*/", "/" + r"root/\w", "/" + r"work/(main|shared)\b"]
    if len(host := socket.gethostname()) > 4 and host != "localhost":
        patterns.append(rf"\b{re.escape(host)}\b")
    personal = re.compile("|".join(patterns))
    found = []
    for name in filter(None, listing.stdout.split("\0")):
        path = ROOT / name
        if not path.is_file() or b"\0" in (data := path.read_bytes()):
            continue
        for number, line in enumerate(data.decode(errors="replace").splitlines(), start=1):
            if match := personal.search(line):
                found.append(f"{name}:{number}: {match[0]}")
    assert found == []
