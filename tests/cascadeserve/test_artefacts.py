from __future__ import annotations

import os
from typing import TYPE_CHECKING, Literal

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascadeserve.artefacts import (
    Artefact,
    decode_json,
    digest_bytes,
    digest_files,
    read_json,
    write_atomically,
    write_json,
)
from cascadeserve.errors import InvalidArtefact

if TYPE_CHECKING:
    from pathlib import Path


class Sample(Artefact, frozen=True, kw_only=True):
    numbers: tuple[float, ...]
    note: str = "ü"


def test_an_artefact_survives_being_written_and_read(tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "sample.json"
    write_json(path, Sample(numbers=(0.1, 1e-300, 3.0)))
    assert read_json(path, Sample) == Sample(numbers=(0.1, 1e-300, 3.0))
    assert path.read_bytes().endswith(b"}\n")
    assert '"note": "ü"' in path.read_text(), "defaults are stored, so that a file says what was in force"


def test_a_written_file_is_whole_readable_by_all_and_alone_in_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"an older and longer content")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    assert path.stat().st_mode & 0o777 == 0o644
    assert list(tmp_path.iterdir()) == [path]


def test_the_temporary_file_is_made_in_the_folder_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, beside = tmp_path / "model", tmp_path / "beside"
    model.mkdir()
    beside.mkdir()
    seen: list[list[str]] = []

    def look(_: int) -> None:
        seen.append([[path.name for path in folder.iterdir()] for folder in (model, beside)])  # type: ignore[arg-type]

    monkeypatch.setattr(os, "fsync", look)
    write_atomically(model / "config", b"new", temporary_directory=beside)
    (in_model, in_beside) = seen[0]
    assert in_model == [], "an extra file in a model folder would count as a changed model"
    assert len(in_beside) == 1
    assert list(beside.iterdir()) == []


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    path = tmp_path / "file"
    path.write_bytes(b"old")
    with monkeypatch.context() as patched:
        patched.setattr(*((os, "fsync") if step == "fsync" else (type(path), "replace")), fail)  # type: ignore[arg-type]
        with pytest.raises(OSError, match="No space left"):
            write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_temporary_folder_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="absent"):
        write_atomically(path, b"new", temporary_directory=tmp_path / "absent")
    assert path.read_bytes() == b"old"


file_names = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=8)
folders = st.dictionaries(file_names, st.binary(max_size=8), max_size=4)


@given(folders, st.randoms())
def test_the_digest_of_files_does_not_depend_on_their_order(files: dict[str, bytes], random: object) -> None:
    names = list(files)
    random.shuffle(names)  # type: ignore[attr-defined]
    assert digest_files({name: files[name] for name in names}) == digest_files(files)


@given(folders, folders)
def test_files_have_the_same_digest_only_if_all_names_and_bytes_are_the_same(
    one: dict[str, bytes], other: dict[str, bytes]
) -> None:
    assert (digest_files(one) == digest_files(other)) == (one == other)


def test_bytes_moved_between_name_and_content_change_the_digest() -> None:
    assert digest_files({"ab": b"c"}) != digest_files({"a": b"bc"})
    assert digest_files({"a": b"", "b": b"x"}) != digest_files({"a": b"x", "b": b""})


def test_a_digest_names_its_algorithm() -> None:
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert digest_bytes(b"") == digest_files({}) == f"sha256:{empty}"


class Chosen(Artefact, frozen=True, kw_only=True):
    word: Literal["one", "two"] | None = None


class Nested(Artefact, frozen=True, kw_only=True):
    several: tuple[Chosen, ...] = ()
    named: dict[str, Chosen | None] = msgspec.field(default_factory=dict)
    pair: tuple[Literal["x"], int] | None = None


@pytest.mark.parametrize(
    ("document", "message"),
    [
        (b'{"several": [{"word": "three"}]}', "$.several[0].word: Invalid enum value 'three'; it can be one, two"),
        (b'{"named": {"a": {"word": "three"}}}', "$.named[...].word: Invalid enum value 'three'; it can be one, two"),
        # what is not looked into is said as before
        (b'{"pair": ["y", 1]}', "$.pair[0]: Invalid enum value 'y'"),
    ],
)
def test_a_word_that_is_none_of_the_allowed_is_refused_with_these(document: bytes, message: str) -> None:
    with pytest.raises(InvalidArtefact) as refused:
        decode_json(document, Nested)
    assert str(refused.value) == message
