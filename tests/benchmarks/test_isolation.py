from __future__ import annotations

import msgspec
import numpy as np
import pytest

from benchmarks.isolation import buckets, count_unanswered, plan_document, share_within
from benchmarks.json_load import JsonSender
from cascadeserve.artefacts import decode_json
from cascadeserve.errors import CascadeServeError
from cascadeserve.gear_plan import GearPlan
from cascadeserve.replay.payload import ModelSignature, Question, TensorSignature, match_inputs
from cascadeserve.replay.rows import Rows
from orchestrator.metrics import Metrics
from orchestrator.wire.codec_http import decode_request

LAG = "cascadeserve_event_loop_lag_seconds"


def test_the_plan_is_one() -> None:
    plan = decode_json(msgspec.json.encode(plan_document(min_batch=8)), GearPlan)
    assert plan.families["digits"].gears[0].triggers["digits_cnn"].min_batch == 8


def test_who_was_not_answered() -> None:
    records = {
        "outcome": np.array([1, 3, 1, 3, 2]),
        "outcome_names": np.array(["unsent", "answered", "refused", "failed", "lost"]),
        "row_index": np.array([0, 1, 2, 3, 1]),
    }
    poisoned = np.array([False, True, False, False])
    found = count_unanswered(records, poisoned)
    assert found == {"requests": 5, "poisoned": 2, "poisoned_answered": 0, "others_unanswered": 1}


def test_lags_are_read_from_the_metric() -> None:
    metrics = Metrics()
    metrics.loop_lag(0.2)
    before = buckets(metrics.render()[0].decode(), LAG)
    for lag_s in (-1e-4, 0.0004, 0.0051, 0.03):
        metrics.loop_lag(lag_s)
    after = buckets(metrics.render()[0].decode(), LAG)
    assert share_within(before, after, 0.005) == pytest.approx(0.5)
    with pytest.raises(CascadeServeError, match="nothing was observed"):
        share_within(after, after, 0.005)


async def test_json_requests_hold_what_binary_ones_do() -> None:
    images = np.random.default_rng(0).random((3, 1, 2, 2), dtype=np.float32)
    rows = Rows({"image": images}, None)
    signature = ModelSignature((TensorSignature("image", "FP32", (-1, 1, 2, 2)),), ("label", "stage"))
    question = Question("digits", match_inputs(rows, signature), ("label", "stage"), 0.5)
    sender = JsonSender("http://127.0.0.1:1", question, rows)
    head, _, body = sender._encode("id-1", [2, 0]).partition(b"\r\n\r\n")
    assert f"Content-Length: {len(body)}".encode() in head
    request = decode_request(body, None, model_name="digits")
    assert (request.id, request.parameters) == ("id-1", {"timeout": 500_000})
    np.testing.assert_array_equal(request.inputs[0].array, images[[2, 0]])
    assert [(output.name, output.binary) for output in request.outputs] == [("label", False), ("stage", False)]
    await sender.close()
