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


def test_the_oldest_on_which_nothing_came_makes_room() -> None:
    connections, each = opened(6)
    connections.asked(each[0])
    connections.leave(each[2])
    # what has begun comes later, and once only
    connections.begun(each[1])
    connections.begun(each[1])
    assert connections.cut_silent()
    assert connections.cut_silent()
    assert [connection.aborted for connection in each] == [False, False, False, True, True, False]
    assert set(connections) == {each[0], each[1], each[5]}


def test_the_oldest_of_which_a_request_has_begun_makes_room() -> None:
    connections, each = opened(4)
    for connection in (each[2], each[1], each[0]):
        connections.begun(connection)
    connections.asked(each[2])
    assert connections.cut_begun()
    assert [connection.aborted for connection in each] == [False, True, False, False]
    connections.leave(each[0])
    assert not connections.cut_begun()


def test_one_that_has_nothing_under_way_makes_room() -> None:
    connections, each = opened(3)
    for connection in each:
        connections.asked(connection)
        connection.is_idle = connection is each[1]
    assert not connections.cut_silent()
    assert connections.cut_idle()
    assert [connection.aborted for connection in each] == [False, True, False]
    assert not connections.cut_idle()
    assert len(connections) == 2
