"""The demo's steps on the screen, and how long each took."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from rich.console import Console


class Steps:
    """Says which step is under way; `wall_s` holds the seconds of every finished one, in order."""

    def __init__(self, console: Console) -> None:
        self.wall_s: dict[str, float] = {}
        self._console = console

    @contextlib.contextmanager
    def timed(self, name: str) -> Iterator[Callable[[str], None]]:
        """Name a step and time it; yields a function that prints a line of its own about it."""
        self._console.rule(f"[bold]{name}", align="left")
        started_s = time.monotonic()
        try:
            # lines stay whole where the output is no terminal
            yield lambda text: self._console.print(text, soft_wrap=True, highlight=False)
        finally:
            self.wall_s[name] = self.wall_s.get(name, 0.0) + time.monotonic() - started_s
