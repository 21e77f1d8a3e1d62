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
        # those that never made a request, in the order in which they came
        self._silent: OrderedDict[T, None] = OrderedDict()

    def __iter__(self) -> Iterator[T]:
        """In any order."""
        return iter(self._all)

    def __len__(self) -> int:
        """How many."""
        return len(self._all)

    def add(self, connection: T) -> None:
        """It is open, and has made no request."""
        self._all.add(connection)
        self._silent[connection] = None

    def asked(self, connection: T) -> None:
        """It has made its first request."""
        self._silent.pop(connection, None)

    def leave(self, connection: T) -> None:
        """It is closed, or somebody else's."""
        self._all.discard(connection)
        self._silent.pop(connection, None)

    def make_room(self) -> bool:
        """Cut off a connection on which nothing is under way, if there is one: the oldest that never made a request.

        One for one: of many that are cut off at once, many are back at once. While any is silent, it takes no look at
        them all.
        """
        connection = next(iter(self._silent), None)
        if connection is None:
            connection = next((each for each in self._all if each.is_idle), None)
        if connection is None:
            return False
        connection.abort()
        self.leave(connection)
        return True
