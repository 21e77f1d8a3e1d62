"""Python's garbage collector in a process that serves or measures."""

from __future__ import annotations

import gc


def spare_what_lives() -> None:
    """Keep the collector from walking over what lives by now: in a process that runs on, that lives to the end.

    It walks in one go, for 20 ms in an orchestrator, and nothing else happens meanwhile.
    """
    gc.collect()
    gc.freeze()
