from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from cascadeserve.errors import ExportRefused, UsageError
from export.loading import load_family

if TYPE_CHECKING:
    from collections.abc import Iterator

MODULE = """
from export.family import Family, FamilyModel, TensorSpec
family = Family(
    name="{name}",
    inputs=(TensorSpec(name="x", datatype="FP32", shape=(1,)),),
    classes=2,
    models=(FamilyModel(name="m", build=lambda: None, max_batch_size=1),),
    sample=lambda n: {{}},
)
number = 3
nothing = None
"""


@pytest.fixture(autouse=True)
def _working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty working directory whose modules are forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry])
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    yield
    for name in [name for name in sys.modules if name.startswith("loading_")]:
        del sys.modules[name]


def write(path: str, content: str = "") -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(content)


def refusal(reference: str) -> str:
    with pytest.raises(UsageError) as caught:
        load_family(reference)
    assert caught.value.exit_code == 2
    sentence = str(caught.value)
    assert repr(reference) in sentence
    assert "\n" not in sentence
    return sentence


def test_a_family_is_found_in_the_working_directory() -> None:
    write("loading_a.py", MODULE.format(name="here"))
    assert load_family("loading_a:family").name == "here"


def test_a_family_is_found_inside_a_package() -> None:
    write("loading_b/__init__.py")
    write("loading_b/inner/family.py", MODULE.format(name="inner"))
    assert load_family("loading_b.inner.family:family").name == "inner"


@pytest.mark.parametrize("reference", ["", ":", "module", "module:", ":family", "examples.digits.family"])
def test_a_reference_of_another_form_is_refused_with_an_example(reference: str) -> None:
    assert "is neither a file nor of the form MODULE:ATTRIBUTE, such as examples.digits.family:family" in refusal(
        reference
    )


@pytest.mark.parametrize("reference", [".family:family", "..:family"])
def test_a_relative_reference_is_refused_in_words(reference: str) -> None:
    refusal(reference)


@pytest.mark.parametrize(
    ("reference", "missing"),
    [
        ("loading_nowhere:family", "loading_nowhere"),
        ("loading_nowhere.inner:family", "loading_nowhere"),
        ("json.loading_nowhere:family", "json.loading_nowhere"),
        ("loading_nowhere/family.py:family", "loading_nowhere/family"),
    ],
)
def test_a_missing_module_is_named(reference: str, missing: str) -> None:
    assert f"there is no module {missing!r} here" in refusal(reference)


def test_a_package_that_the_module_needs_is_told_from_the_module_itself() -> None:
    write("loading_c.py", "import loading_not_installed.part\n")
    sentence = refusal("loading_c:family")
    assert "loading_c needs 'loading_not_installed', which is not installed" in sentence
    assert "no module" not in sentence


@pytest.mark.parametrize(
    ("attribute", "found"),
    [("absent", "nothing"), ("nothing", "nothing"), ("number", "a int"), ("Family", "a type"), ("a:b", "nothing")],
)
def test_an_attribute_that_is_no_family_is_refused(attribute: str, found: str) -> None:
    write("loading_d.py", MODULE.format(name="d"))
    assert f"names {found}, but an export.family.Family is needed" in refusal(f"loading_d:{attribute}")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("1 / 0", "ZeroDivisionError: division by zero"),
        (r"raise ValueError('first\nsecond')", "ValueError: first"),
        ("def", "SyntaxError: invalid syntax (loading_e.py, line 1)"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("from json import nothing", "ImportError: cannot import name 'nothing' from 'json'"),
    ],
)
def test_an_error_inside_the_module_is_one_sentence(content: str, reason: str) -> None:
    write("loading_e.py", f"{content}\n")
    with pytest.raises(ExportRefused) as refused:
        load_family("loading_e:family")
    sentence = str(refused.value)
    assert refused.value.exit_code == 1
    assert sentence.startswith(f"'loading_e:family': loading_e cannot be imported ({reason}")
    assert sentence.endswith("); mend it")
    assert "\n" not in sentence


@pytest.mark.parametrize(
    ("content", "passing"),
    [
        ("raise KeyboardInterrupt", KeyboardInterrupt),
        ("from cascadeserve.errors import UsageError\nraise UsageError('in words')", UsageError),
    ],
)
def test_what_is_said_in_words_and_ctrl_c_pass(content: str, passing: type[BaseException]) -> None:
    write("loading_f.py", f"{content}\n")
    with pytest.raises(passing):
        load_family("loading_f:family")
