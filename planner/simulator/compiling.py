"""How the simulator is compiled, and where the machine code is kept.

Compiling takes some ten seconds, so the code is kept in the user's cache folder, under the digest of every source that
goes into it (numba itself looks only at the file of the outermost function).

_nrt=False leaves numba's reference counting out, which is 40 times faster here (measured: 0.12 to 4.9 million rows per
second) since nearly every access to an array of a tuple counts one up and down. In return the kernel may not make
arrays, only be given them.
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numba

from cascadeserve import policy
from cascadeserve.artefacts import digest_files

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_DIGITS = 16

Compiled = TypeVar("Compiled", bound="Callable[..., Any]")


def inlined(function: Compiled) -> Compiled:
    """Compile a function into those that call it.

    Python never calls it, and the wrappers with which it could take more than half of the time to compile (64 s, 27 s
    without them).
    """
    twin: Compiled = numba.njit(forceinline=True, _nrt=False, no_cpython_wrapper=True, no_cfunc_wrapper=True)(function)
    return twin


def cached(function: Compiled) -> Compiled:
    """Compile the outermost function at its first call, or take its code from the cache."""
    folder = _cache_folder()
    with _numba_cache_in(folder):
        twin: Compiled = numba.njit(_nrt=False, cache=folder is not None)(function)
    return twin


def _cache_folder() -> Path | None:
    """Folder for these sources, this numba and this Python; None where nothing can be written."""
    folders = [Path(__file__).parent, *map(Path, policy.__path__)]
    sources = {f"{folder.name}/{path.name}": path.read_bytes() for folder in folders for path in folder.glob("*.py")}
    digest = digest_files(sources | {"versions": f"{numba.__version__} {sys.version}".encode()}).partition(":")[2]
    home = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    folder = Path(home) / "cascadeserve" / f"simulator-{digest[:_DIGITS]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


@contextlib.contextmanager
def _numba_cache_in(folder: Path | None) -> Iterator[None]:
    before = numba.config.CACHE_DIR
    numba.config.CACHE_DIR = str(folder or "")
    try:
        yield
    finally:
        numba.config.CACHE_DIR = before
