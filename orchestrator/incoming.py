"""What another plan needs before it can come into force."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import asyncio

    from orchestrator.reconcile import Instances


class CannotBringIn(Exception):  # noqa: N818 - named by what happened
    """The models of another plan do not stand on all of its endpoints."""


@dataclass(slots=True)
class Incoming:
    """The instances that are wanted, and the future that is done when they stand."""

    wanted: Instances
    stands: asyncio.Future[None]

    def fail(self, why: str) -> None:
        """They cannot stand."""
        if not self.stands.done():
            self.stands.set_exception(CannotBringIn(why))
