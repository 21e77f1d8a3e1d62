from __future__ import annotations

import pytest

from benchmarks.time_shares import part_of, shares

BELOW = (
    "run (asyncio/runners.py:190);BaseEventLoop.run_forever (asyncio/base_events.py:607);"
    "BaseEventLoop._run_once (asyncio/base_events.py:1922);Handle._run (asyncio/events.py:80)"
)


@pytest.mark.parametrize(
    ("frames", "part"),
    [
        ("_SelectorSocketTransport.write (asyncio/selector_events.py:1085)", "socket writes"),
        ("_SelectorSocketTransport._read_ready__data_received (asyncio/selector_events.py:995)", "socket reads"),
        ("Dispatcher._send (orchestrator/dispatcher.py:303);ModelQueue.take (orchestrator/rows.py:168)", "dispatcher"),
        (
            "Dispatcher.pump (orchestrator/dispatcher.py:238);due_reason (cascadeserve/policy/batching.py:20)",
            "dispatcher",
        ),
        ("infer (orchestrator/triton_http.py:140);_request (cascadeserve/http_connection.py:80)", "batches"),
        ("decode_request (orchestrator/wire/codec_http.py:120);loads (json/__init__.py:346)", "JSON"),
        ("PlainHttp._parse (orchestrator/wire/plain_http.py:200)", "HTTP"),
        ("wait (asyncio/tasks.py:424);iscoroutine (asyncio/coroutines.py:39)", "event loop"),
        ("", "event loop"),
    ],
)
def test_a_sample_counts_for_its_innermost_known_frame(frames: str, part: str) -> None:
    assert part_of(f"{BELOW};{frames}" if frames else BELOW).startswith(part)


def test_shares_of_all_samples() -> None:
    lines = [f"{BELOW};_Transport.write (asyncio/selector_events.py:1085) 3", f"{BELOW} 1", "main (somewhere.py:1) 4"]
    assert shares(lines) == {"other": 0.5, "socket writes": 0.375, "event loop: tasks, callbacks, timers": 0.125}
