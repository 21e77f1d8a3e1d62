"""A lease on endpoints, so that no two orchestrators change instance counts on one of them."""

from __future__ import annotations

import contextlib
import fcntl
from typing import TYPE_CHECKING

from cascadeserve.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path


@contextlib.contextmanager
def lease(repository: Path, endpoints: Iterable[str]) -> Iterator[None]:
    """Hold the endpoints that read `repository`, by locked files in it; the kernel lets go when the process ends.

    Orchestrators for different endpoints of one repository do not meet. Where it may not be written to, no orchestrator
    can change a count and there is nothing to hold.

    Raises:
        UsageError: another process holds one of them.

    """
    with contextlib.ExitStack() as held:
        for endpoint in sorted(endpoints):
            try:
                # kept when released: whoever removed it might remove it from under the next holder
                file = held.enter_context((repository / f".{endpoint}.lease").open("w"))
            except OSError:
                continue
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UsageError(
                    f"another orchestrator steers endpoint '{endpoint}' of {repository}; stop it first"
                ) from error
        yield
