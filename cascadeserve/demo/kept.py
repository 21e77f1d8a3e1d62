"""Files that are made once and kept while what they were made from is unchanged."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
from typing import TYPE_CHECKING

import msgspec

from cascadeserve.artefacts import digest_bytes, write_atomically
from cascadeserve.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


@contextlib.contextmanager
def alone(state: Path) -> Iterator[None]:
    """Hold the state directory against another process that wants it the same way.

    Raises:
        UsageError: another process holds it.

    """
    with (state / "in-use").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UsageError(f"another demo runs in {state}; wait for it or choose another --state") from error
        yield


def digest_file(path: Path) -> str:
    """Digest `sha256:<hex>` of a file's bytes."""
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def digest_of(**made_from: object) -> str:
    """Digest of named values that JSON can hold."""
    return digest_bytes(msgspec.json.encode(made_from, order="sorted"))


def is_current(path: Path, made_from: str) -> bool:
    """Whether the file is there and was made from inputs of this digest; an outdated one is removed."""
    note = _note(path)
    if path.exists() and note.exists() and note.read_text() == made_from:
        return True
    note.unlink(missing_ok=True)
    path.unlink(missing_ok=True)
    return False


def keep(path: Path, made_from: str) -> None:
    """Note that the file, complete now, was made from inputs of this digest."""
    write_atomically(_note(path), made_from.encode())


def _note(path: Path) -> Path:
    return path.with_name(f"{path.name}.made-from")
