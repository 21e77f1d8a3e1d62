"""The open connections of a server, and which of them makes room when there are too many."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Iterator


class _Closable(Protocol):
    @property
    def is_idle(self) -> bool: ...

    def abort(self) -> None: ...


T = TypeVar("T", bound=_Closable)


class OpenConnections(Generic[T]):
    """Those that have not been left yet."""

    def __init__(self) -> None:
        """There are none."""
        self._all: set[T] = set()
        # those on which nothing came, in the order in which they were opened; and those of which a first request has
        # begun, in the order in which it did
        self._silent: OrderedDict[T, None] = OrderedDict()
        self._begun: OrderedDict[T, None] = OrderedDict()

    def __iter__(self) -> Iterator[T]:
        """In any order."""
        return iter(self._all)

    def __len__(self) -> int:
        """How many."""
        return len(self._all)

    def add(self, connection: T) -> None:
        """It is open, and nothing came on it."""
        self._all.add(connection)
        self._silent[connection] = None

    def begun(self, connection: T) -> None:
        """Its first request has begun."""
        if self._silent.pop(connection, self) is None:
            self._begun[connection] = None

    def asked(self, connection: T) -> None:
        """It has made its first request."""
        self._silent.pop(connection, None)
        self._begun.pop(connection, None)

    def leave(self, connection: T) -> None:
        """It is closed, or somebody else's."""
        self._all.discard(connection)
        self.asked(connection)

    def cut_silent(self) -> bool:
        """Cut off the oldest connection on which nothing ever came, if there is one; the same goes for the others.

        One for one: of many that are cut off at once, many are back at once. It takes no look at them all.
        """
        return self._cut(next(iter(self._silent), None))

    def cut_begun(self) -> bool:
        """Cut off the one whose first request began first, and is not there yet."""
        return self._cut(next(iter(self._begun), None))

    def cut_idle(self) -> bool:
        """Cut off any on which no request is under way."""
        return self._cut(next((each for each in self._all if each.is_idle), None))

    def _cut(self, connection: T | None) -> bool:
        if connection is None:
            return False
        connection.abort()
        self.leave(connection)
        return True
