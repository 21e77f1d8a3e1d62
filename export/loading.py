"""Finds the family that a reference names: a file, or `MODULE:ATTRIBUTE`."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from cascadeserve.errors import CascadeServeError, ExportRefused, UsageError
from export.family import Family
from export.family_file import read_family
from export.reasons import reason_of


def load_family(reference: str) -> Family:
    """Read a family file, or import a family, from the working directory too.

    What ends in .toml, or names an existing file, is a file.

    Raises:
        UsageError: the reference is malformed, or names nothing that is a Family.
        InvalidArtefact: the file is missing or wrong, or a file that it names is.
        ExportRefused: the module ends in an error of its own.

    """
    path = Path(reference)
    if path.suffix == ".toml" or path.is_file():
        if path.suffix == ".py":
            raise UsageError(f"{reference!r} is Python: name the family in it, such as {path.stem}:family")
        return read_family(path)
    module_name, colon, attribute = reference.partition(":")
    if not (module_name and colon and attribute) or module_name.startswith("."):
        raise UsageError(
            f"{reference!r} is neither a file nor of the form MODULE:ATTRIBUTE, such as examples.digits.family:family"
        )
    # console scripts do not have the working directory on their path, `python -m` has
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is not None and (module_name == error.name or module_name.startswith(f"{error.name}.")):
            raise UsageError(f"{reference!r}: there is no module {error.name!r} here; run from its folder") from error
        raise UsageError(f"{reference!r}: {module_name} needs {error.name!r}, which is not installed") from error
    except (CascadeServeError, KeyboardInterrupt):
        raise
    except BaseException as error:  # SystemExit too: a module may run as a script
        raise ExportRefused(
            f"{reference!r}: {module_name} cannot be imported ({type(error).__name__}: {reason_of(error)}); mend it"
        ) from error
    family = getattr(module, attribute, None)
    if not isinstance(family, Family):
        found = "nothing" if family is None else f"a {type(family).__name__}"
        raise UsageError(f"{reference!r} names {found}, but an export.family.Family is needed")
    return family
