from __future__ import annotations

from orchestrator.wire.open_connections import OpenConnections


class Connection:
    def __init__(self) -> None:
        self.is_idle = True
        self.aborted = False

    def abort(self) -> None:
        self.aborted = True


def opened(count: int) -> tuple[OpenConnections[Connection], list[Connection]]:
    connections: OpenConnections[Connection] = OpenConnections()
    each = [Connection() for _ in range(count)]
    for connection in each:
        connections.add(connection)
    return connections, each


def test_the_oldest_that_never_asked_makes_room() -> None:
    connections, each = opened(5)
    connections.asked(each[0])
    connections.leave(each[2])
    assert connections.make_room()
    assert connections.make_room()
    assert [connection.aborted for connection in each] == [False, True, False, True, False]
    assert set(connections) == {each[0], each[4]}


def test_then_one_that_has_nothing_under_way() -> None:
    connections, each = opened(3)
    for connection in each:
        connections.asked(connection)
        connection.is_idle = connection is each[1]
    assert connections.make_room()
    assert [connection.aborted for connection in each] == [False, True, False]
    assert not connections.make_room()
    assert len(connections) == 2
