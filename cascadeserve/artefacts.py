"""Reading and writing the files that the parts exchange: strict, atomic, with digests.

Unknown keys and wrong types are refused with the path of the field, because a typing error in a file that steers a
serving system must not pass for a default.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from pathlib import Path
from typing import TypeVar

import msgspec
from msgspec import inspect

from cascadeserve.errors import InvalidArtefact

T = TypeVar("T")

_WITH_FIELD = re.compile(r"^(?P<what>.*?) - at (?:`key` in )?`(?P<field>[^`]+)`$", re.DOTALL)


class Artefact(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, omit_defaults=False):
    """Base of everything that is stored in a file: immutable, keyword-only, no unknown keys."""


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidArtefact(f"cannot be read ({error.strerror}); check the path", path=path) from error


def _explain(
    error: msgspec.MsgspecError | UnicodeDecodeError, kind: type[object], path: Path | str | None
) -> InvalidArtefact:
    if isinstance(error, UnicodeDecodeError):
        return InvalidArtefact("is not UTF-8 text", path=path)
    text = str(error)
    match = _WITH_FIELD.match(text)
    if match:
        what = match["what"]
        if what.startswith("Invalid enum value") and (choices := _choices(kind, match["field"])):
            what += f"; it can be {', '.join(map(str, choices))}"
        return InvalidArtefact(what, path=path, field=match["field"])
    # Errors raised in __post_init__ name their own field as "$.a.b: what".
    if text.startswith("$"):
        field, _, what = text.partition(": ")
        return InvalidArtefact(what, path=path, field=field)
    return InvalidArtefact(text, path=path)


def _choices(kind: type[object], field: str) -> list[str | int]:
    """All that a field such as `$.models[0].variant` may hold, where its type lists it."""
    types = _alternatives(inspect.type_info(kind))
    for step in re.finditer(r"\.(\w+)|\[[^]]*\]", field):
        types = [inner for outer in types for inside in _inside(outer, step[1]) for inner in _alternatives(inside)]
    values = [value for each in types if isinstance(each, inspect.LiteralType) for value in each.values]
    return [value for value in values if value is not None]


def _alternatives(kind: inspect.Type) -> list[inspect.Type]:
    return list(kind.types) if isinstance(kind, inspect.UnionType) else [kind]


def _inside(outer: inspect.Type, name: str | None) -> list[inspect.Type]:
    """Type of a named field, or without a name of the items."""
    if isinstance(outer, inspect.StructType):
        return [field.type for field in outer.fields if field.encode_name == name]
    if isinstance(outer, inspect.DictType):
        return [outer.value_type]
    return [outer.item_type] if isinstance(outer, inspect.VarTupleType) else []


def decode_json(data: bytes, kind: type[T], *, path: Path | str | None = None) -> T:
    """Decode strict JSON into `kind`; `path` is only for the error text."""
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise _explain(error, kind, path) from error


def read_json(path: Path, kind: type[T]) -> T:
    """Read a JSON artefact.

    Raises:
        InvalidArtefact: the file cannot be read, is no JSON, or a field is unknown, missing or out of bounds.

    """
    return decode_json(_read_bytes(path), kind, path=path)


def read_toml(path: Path, kind: type[T]) -> T:
    """Read a TOML artefact; errors as in `read_json`."""
    try:
        return msgspec.toml.decode(_read_bytes(path), type=kind)
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise _explain(error, kind, path) from error


def write_atomically(path: Path, data: bytes, *, temporary_directory: Path | None = None) -> None:
    """Replace `path` by a complete file or leave it as it was.

    `temporary_directory` must be on the same file system as `path` (default: its folder). Triton's model folders need
    another one, since any extra file inside them counts as a change of the model.
    """
    directory = temporary_directory or path.parent
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=directory)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: object) -> None:
    """Write an artefact as indented JSON, atomically; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, msgspec.json.format(msgspec.json.encode(value), indent=2) + b"\n")


def digest_bytes(data: bytes) -> str:
    """Digest in the form `sha256:<hex>`."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def digest_files(files: dict[str, bytes]) -> str:
    """Digest of named contents; independent of their order, dependent on every name and byte."""
    total = hashlib.sha256()
    for name in sorted(files):
        total.update(f"{name}\0{len(files[name])}\0".encode())
        total.update(files[name])
    return f"sha256:{total.hexdigest()}"
