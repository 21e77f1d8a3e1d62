from __future__ import annotations

import random
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascadeserve.policy.demand import MAX_WINDOW_S, WINDOW_REQUESTS, ArrivalWindow, demand_per_s, window_start

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

TICK_S = 0.1
ONE_ROW = (1,)
# a tenth of the requests are batches
SPREAD = (1, 2, 3, 4, 1, 2, 3, 4, 1, 16)


def poisson(
    per_s: float, seconds: float, *, seed: int, sizes: Sequence[int] = ONE_ROW, start_s: float = 0.0
) -> Iterator[tuple[float, int]]:
    """Arrival times and rows of requests."""
    rng = random.Random(seed)
    now_s = start_s + rng.expovariate(per_s)
    while now_s < start_s + seconds:
        yield now_s, rng.choice(sizes)
        now_s += rng.expovariate(per_s)


def ticked(
    window: ArrivalWindow, arrivals: Iterator[tuple[float, int]], until_s: float, *, start_s: float = 0.0
) -> Iterator[tuple[float, float]]:
    """(time, rate) at each tick of a gear loop that the arrivals come to."""
    pending = next(arrivals, None)
    for tick in range(1, round((until_s - start_s) / TICK_S) + 1):
        now_s = start_s + tick * TICK_S
        while pending is not None and pending[0] <= now_s:
            window.add(*pending)
            pending = next(arrivals, None)
        yield now_s, window.rate_per_s(now_s)[0]


def test_no_arrivals_are_no_load() -> None:
    assert ArrivalWindow().rate_per_s(5.0)[0] == 0.0


def test_a_first_request_alone_is_no_burst() -> None:
    window = ArrivalWindow()
    window.add(10.0, 3)
    assert window.rate_per_s(10.0)[0] == 3.0, "counted over the whole window, not over the moment since it came"


@given(per_s=st.floats(1.0, 3000.0), rows=st.integers(1, 64))
def test_even_arrivals_are_measured_to_a_few_percent_at_any_rate(per_s: float, rows: int) -> None:
    window = ArrivalWindow()
    seconds = max(150 / per_s, 3.0)
    for index in range(int(seconds * per_s) + 1):
        window.add(index / per_s, rows)
    assert window.rate_per_s(int(seconds * per_s) / per_s)[0] == pytest.approx(per_s * rows, rel=0.05)


@pytest.mark.parametrize("per_s", [1.0, 5.0, 25.0])
def test_at_a_low_rate_the_window_reaches_back_over_a_minute(per_s: float) -> None:
    """The standard error of 60 Poisson arrivals is 13 %; a window of 1 s would be wrong by 100 % at 1 request/s."""
    rates = [
        rate
        for now_s, rate in ticked(ArrivalWindow(), poisson(per_s, 1000 / per_s, seed=1), 1000 / per_s)
        if now_s > 100 / per_s
    ]
    mean = sum(rates) / len(rates)
    deviation = (sum((rate - mean) ** 2 for rate in rates) / len(rates)) ** 0.5
    assert mean == pytest.approx(per_s, rel=0.1)
    assert deviation < 0.25 * per_s


def test_a_lower_rate_is_followed_once_it_is_significant() -> None:
    window = ArrivalWindow()
    for index in range(2000):
        window.add(index / 1000, 1)
    for index in range(100):
        window.add(2.0 + index / 50, 1)
    assert window.rate_per_s(4.0)[0] == pytest.approx(50, rel=0.1)


@pytest.mark.parametrize("dispersion", [1.0, 9.0])
def test_the_window_holds_at_least_its_requests_and_at_least_a_second(dispersion: float) -> None:
    wanted = int(WINDOW_REQUESTS * dispersion)
    slow = [index / 20 for index in range(20_000)]
    kept = len(slow) - window_start(slow, 0, len(slow), slow[-1], dispersion)
    assert kept == pytest.approx(min(wanted, 20 * MAX_WINDOW_S), abs=1)
    fast = [index / 80_000 for index in range(160_000)]
    assert len(fast) - window_start(fast, 0, len(fast), fast[-1], dispersion) == pytest.approx(80_000, abs=1)


@pytest.mark.parametrize("load", [0.75, 0.9])
@pytest.mark.parametrize("per_s", [30.0, 200.0, 1000.0])
def test_a_steady_rate_stays_below_the_end_of_its_gear(per_s: float, load: float) -> None:
    seconds = 300.0 if per_s < 500 else 60.0
    rates = [rate for now_s, rate in ticked(ArrivalWindow(), poisson(per_s, seconds, seed=5), seconds) if now_s > 30.0]
    assert sum(rate > per_s / load for rate in rates) <= 0.01 * len(rates)


@pytest.mark.parametrize("per_s", [20.0, 1000.0])
def test_the_rate_falls_to_nothing_by_itself_when_arrivals_stop(per_s: float) -> None:
    window = ArrivalWindow()
    rates = [rate for _, rate in ticked(window, poisson(per_s, 5.0, seed=2), 65.0)]
    assert max(rates[60:]) < 0.5 * per_s
    assert max(rates[100:]) < 1.0
    assert rates[-1] == 0.0


@pytest.mark.parametrize("sizes", [ONE_ROW, SPREAD], ids=["one row", "spread"])
@pytest.mark.parametrize("per_s", [50.0, 200.0, 1000.0])
def test_a_jump_to_five_times_the_rate_is_seen_within_three_tenths_of_a_second(
    per_s: float, sizes: Sequence[int]
) -> None:
    late = 0
    for seed in range(20):
        window = ArrivalWindow()
        jump_s = 2.0 + seed * TICK_S / 20  # at every phase of the ticks
        for _ in ticked(window, poisson(per_s, jump_s, seed=seed, sizes=sizes), 2.0):
            pass
        after = poisson(5 * per_s, 1.0, seed=100 + seed, sizes=sizes, start_s=jump_s)
        seen_s = next(
            now_s
            for now_s, rate in ticked(window, after, 3.0, start_s=2.0)
            if rate > 2.5 * per_s * sum(sizes) / len(sizes)
        )
        late += seen_s - jump_s > 0.3 + 1e-9
    assert late <= (2 if sizes is SPREAD else 0)


@pytest.mark.parametrize("sizes", [ONE_ROW, SPREAD], ids=["one row", "spread"])
@pytest.mark.parametrize("per_s", [5.0, 20.0, 50.0, 200.0, 1000.0])
def test_steady_poisson_load_is_hardly_ever_taken_for_a_jump(per_s: float, sizes: Sequence[int]) -> None:
    """At most 3 of 1000 ticks show over twice the load there is."""
    seconds = 300.0 if per_s < 100 else 60.0
    mean = per_s * sum(sizes) / len(sizes)
    settled_s = 60 / per_s + 2
    rates = [
        rate
        for now_s, rate in ticked(ArrivalWindow(), poisson(per_s, seconds, seed=3, sizes=sizes), seconds)
        if now_s > settled_s
    ]
    assert sum(rate > 2 * mean for rate in rates) <= 0.003 * len(rates)


def test_bursts_that_the_plan_expects_are_no_jump() -> None:
    """The same 40 requests in 0.1 s after 100/s: a jump for Poisson arrivals, usual for a plan with dispersion 4."""
    rates = {}
    for dispersion in (1.0, 4.0):
        window = ArrivalWindow(dispersion=dispersion)
        for index in range(200):
            window.add(index / 100, 1)
        for index in range(40):
            window.add(2.0 + index / 400, 1)
        rates[dispersion] = window.rate_per_s(2.1)[0]
    assert rates[1.0] == pytest.approx(400.0, rel=0.05)
    assert rates[4.0] < 150.0


def test_a_handful_of_requests_after_silence_is_no_jump() -> None:
    window = ArrivalWindow()
    for when_s in (*map(float, range(60)), *(100.0 + index / 1000 for index in range(7))):
        window.add(when_s, 1)
    assert window.rate_per_s(100.09)[0] < 10.0


@pytest.mark.parametrize("before", [0, 60], ids=["at the start", "after silence"])
@pytest.mark.parametrize("per_s", [100.0, 1000.0])
def test_load_that_sets_in_from_nothing_is_seen_within_three_tenths_of_a_second(per_s: float, before: int) -> None:
    window = ArrivalWindow()
    for index in range(before):
        window.add(float(index), 1)
    onset = ticked(window, poisson(per_s, 1.0, seed=4, start_s=100.0), 101.0, start_s=100.0)
    assert max(rate for now_s, rate in onset if now_s < 100.35) > per_s / 2


@given(
    arrival=st.floats(0.0, 1e5),
    queued=st.floats(0.0, 100.0),
    planned=st.floats(0.0, 100.0),
    work=st.floats(1e-6, 1.0),
    drain=st.floats(0.01, 10.0),
)
def test_demand_is_the_arrival_rate_until_more_is_queued_than_planned(
    arrival: float, queued: float, planned: float, work: float, drain: float
) -> None:
    demand = demand_per_s(arrival, queued, planned, work, drain)
    if queued <= planned:
        assert demand == arrival
    else:
        assert demand == pytest.approx(arrival + (queued - planned) / work / drain)


def test_a_cascade_that_costs_nothing_does_not_divide_by_zero() -> None:
    assert demand_per_s(10.0, 0.0, 0.0, 0.0, 0.5) == 10.0
