"""Labels through the orchestrator equal those of the same stages run by hand with onnxruntime."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http

from cascadeserve.gear_plan import read_gear_plan

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
import onnxruntime as ort

from examples.digits.data import rows

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from tests.fakes.servers import Stack

pytestmark = [pytest.mark.triton, pytest.mark.timeout(180)]

ROOT = Path(__file__).parents[2]
PLAN = ROOT / "examples" / "digits" / "gear_plan.json"
# twice every image of the image-disjoint test set
NUM_ROWS = 720
# Certainties this close to a threshold may fall on either side: kernels sum in another order in another batch.
NEAR = 1e-5


@cache
def by_hand() -> dict[str, tuple[NDArray[np.int64], NDArray[np.float32]]]:
    """(label, certainty) of every model for every row of the test set."""
    inputs = rows("test", NUM_ROWS).inputs
    answers = {}
    for model in read_gear_plan(PLAN).families["digits"].models:
        path = ROOT / "model_repository" / model / "1" / "model.onnx"
        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        label, certainty = session.run(["label", "certainty"], {"image": inputs})
        answers[model] = (label[:, 0], certainty[:, 0])
    return answers


def expected(gear: str, index: NDArray[np.intp]) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.bool_]]:
    """(label, stage, whether a threshold is too near to call) of rows under a gear."""
    family = read_gear_plan(PLAN).families["digits"]
    entry = family.entry(next(each for each in family.gears if each.name == gear).ladder_entry)
    label = np.full(len(index), -1)
    stage = np.full(len(index), -1, np.int32)
    near = np.zeros(len(index), np.bool_)
    for position, each in enumerate(entry.stages):
        answers, certainty = (array[index] for array in by_hand()[each.model])
        undecided = stage < 0
        threshold = -np.inf if each.threshold is None else np.float32(each.threshold)
        near |= undecided & (np.abs(certainty - threshold) < NEAR)
        taken = undecided & (certainty >= threshold)
        label[taken] = answers[taken]
        stage[taken] = position
    return label, stage, near


def ask(transport: str, stack: Stack, batch: NDArray[np.float32]) -> Any:
    module: Any = getattr(tritonclient, transport)
    address = stack.url.removeprefix("http://") if transport == "http" else stack.grpc_address
    client = module.InferenceServerClient(address)
    try:
        tensor = module.InferInput("image", list(batch.shape), "FP32")
        tensor.set_data_from_numpy(batch)
        outputs = [module.InferRequestedOutput(name) for name in ("label", "stage", "certainty")]
        result = client.infer("digits", [tensor], outputs=outputs, timeout=30_000_000)
    finally:
        client.close()
    response = result.get_response()
    gear = response["parameters"]["gear"] if transport == "http" else response.parameters["gear"].string_param
    return result, gear


@pytest.mark.parametrize("transport", ["http", "grpc"])
def test_every_row_of_the_test_set_in_batches_of_1_to_64(digits: Stack, transport: str) -> None:
    inputs = rows("test", NUM_ROWS).inputs
    sizes = [*range(1, 65)]
    start = checked = 0
    seen = np.zeros(NUM_ROWS, np.bool_)
    gears = set()
    while sizes or not seen.all():
        size = sizes.pop(0) if sizes else 64
        index = np.arange(start, start + size) % NUM_ROWS
        start = (start + size) % NUM_ROWS
        result, gear = ask(transport, digits, inputs[index])
        gears.add(gear)
        assert result.as_numpy("label").shape == (size, 1)
        got = np.stack([result.as_numpy("label")[:, 0], result.as_numpy("stage")[:, 0]])
        # a request that was split while the gear shifted has rows of both gears, and names both
        right = np.zeros(size, np.bool_)
        near = np.zeros(size, np.bool_)
        for each in gear.split(","):
            label, stage, undecidable = expected(each, index)
            right |= (got == np.stack([label, stage])).all(axis=0)
            near |= undecidable
        assert (right | near).all()
        assert right.mean() > 0.9
        seen[index] = True
        checked += int((~near).sum())
    assert checked > 0.99 * sum(range(1, 65))
