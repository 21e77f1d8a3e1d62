"""Which endpoint a batch leaves for."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

ROUND_ROBIN = 0
JOIN_SHORTEST_QUEUE = 1
POWER_OF_TWO = 2
LEAST_EXPECTED_WORK = 3
# as a plan names them, by number
BALANCERS = ("round_robin", "join_shortest_queue", "power_of_two", "least_expected_work")

_32_BITS = 0xFFFFFFFF


def choose_endpoint(
    balancer: int,
    turn: int,
    last: int,
    in_flight: Sequence[int],
    work_in_flight_s: Sequence[float],
    work_sent_s: Sequence[float],
    weights: Sequence[float],
    has_room: Sequence[bool],
    batch_work_s: Sequence[float],
) -> int:
    """Index of the endpoint that batch number `turn` leaves for, after one that left for `last`; -1 if none has room.

    All sequences are by endpoint. A weight of 0 excludes an endpoint. `in_flight` counts the batches there.
    """
    if balancer == ROUND_ROBIN:
        return round_robin(last, weights, has_room)
    if balancer == JOIN_SHORTEST_QUEUE:
        return join_shortest_queue(in_flight, work_sent_s, weights, has_room)
    if balancer == POWER_OF_TWO:
        return power_of_two(turn, in_flight, weights, has_room)
    return least_expected_work(work_in_flight_s, work_sent_s, weights, has_room, batch_work_s)


def round_robin(last: int, weights: Sequence[float], has_room: Sequence[bool]) -> int:
    """The next endpoint with room after the last one; weights only exclude."""
    for step in range(1, len(weights) + 1):
        index = (last + step) % len(weights)
        if has_room[index] and weights[index] > 0.0:
            return index
    return -1


def join_shortest_queue(
    in_flight: Sequence[int], work_sent_s: Sequence[float], weights: Sequence[float], has_room: Sequence[bool]
) -> int:
    """The endpoint with the fewest batches for its weight, this one included; of equals the one that was sent less."""
    best = -1
    best_length = 0.0
    best_sent = 0.0
    for index in range(len(weights)):
        if not has_room[index] or weights[index] <= 0.0:
            continue
        length = (in_flight[index] + 1) / weights[index]
        sent = work_sent_s[index] / weights[index]
        if best < 0 or length < best_length or (length == best_length and sent < best_sent):
            best = index
            best_length = length
            best_sent = sent
    return best


def power_of_two(turn: int, in_flight: Sequence[int], weights: Sequence[float], has_room: Sequence[bool]) -> int:
    """Of two endpoints with room, drawn by the number of the batch, the one with fewer batches for its weight."""
    open_ones = 0
    for index in range(len(weights)):
        if has_room[index] and weights[index] > 0.0:
            open_ones += 1
    if open_ones == 0:
        return -1
    drawn = scattered(turn)
    first = drawn % open_ones
    # another one, if there is another one
    second = (first + 1 + drawn // open_ones % max(open_ones - 1, 1)) % open_ones
    best = -1
    best_length = 0.0
    place = 0
    for index in range(len(weights)):
        if not has_room[index] or weights[index] <= 0.0:
            continue
        length = (in_flight[index] + 1) / weights[index]
        drawn_here = place in (first, second)
        if drawn_here and (best < 0 or length < best_length or (length == best_length and place == first)):
            best, best_length = index, length
        place += 1
    return best


def scattered(number: int) -> int:
    """A number below 2^32 that looks drawn at random, the same for the same number wherever it is computed."""
    mixed = number & _32_BITS
    mixed = ((mixed >> 16) ^ mixed) * 0x45D9F3B & _32_BITS
    mixed = ((mixed >> 16) ^ mixed) * 0x45D9F3B & _32_BITS
    return (mixed >> 16) ^ mixed


def least_expected_work(
    work_in_flight_s: Sequence[float],
    work_sent_s: Sequence[float],
    weights: Sequence[float],
    has_room: Sequence[bool],
    batch_work_s: Sequence[float],
) -> int:
    """Index of the endpoint with room whose work, this batch included, is least for its weight; -1 if none has room.

    All by endpoint. `batch_work_s` is device time that the batch would take there, more on a slower device;
    `work_in_flight_s` is what was sent and is not yet answered, `work_sent_s` all that was ever sent. A weight of 0
    excludes an endpoint. Among equals the one that was sent less takes it, so that a light load is spread too.
    """
    best = -1
    best_cost = 0.0
    best_sent = 0.0
    for index in range(len(weights)):
        if not has_room[index] or weights[index] <= 0.0:
            continue
        cost = (work_in_flight_s[index] + batch_work_s[index]) / weights[index]
        sent = work_sent_s[index] / weights[index]
        if best < 0 or cost < best_cost or (cost == best_cost and sent < best_sent):
            best = index
            best_cost = cost
            best_sent = sent
    return best
