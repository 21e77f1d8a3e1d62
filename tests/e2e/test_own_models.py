"""A family of model files, exported without scores, through the cascade on a real Triton."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

pytest.importorskip("torch")

import tritonclient.http
from tritonclient.utils import InferenceServerException

from cascadeserve import cli
from export.family import Head
from export.heads import answers_of
from tests.e2e.conftest import tiny_stack
from tests.export.model_files import X, family_toml, onnx_file, rows_file, torchscript
from tests.export.tiny_torch import deep, exported, linear, model_of
from tests.fakes.servers import Stack, running

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.triton, pytest.mark.torch, pytest.mark.timeout(180)]

ROWS = X[:64]


def wanted(build: Any, head: Head) -> dict[str, Any]:
    return answers_of(exported(model_of(build))[1].run({"x": ROWS}), head)


SMALL, LARGE = wanted(linear, Head(certainty="max_probability")), wanted(deep, Head())
_ORDERED = np.sort(SMALL["certainty"][:, 0])
# between two rows in the middle, far from either
_GAP = 20 + int(np.diff(_ORDERED[20:44]).argmax())
THRESHOLD = float(_ORDERED[_GAP : _GAP + 2].mean())


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    document = {
        "schema_version": 1,
        "name": "own",
        "families": {
            "mine": {
                "inputs": [{"name": "x", "datatype": "FP32", "shape": [4]}],
                "num_classes": None,
                "models": {name: {"max_batch": 8, "busy_s": [[1, 0.001]]} for name in ("mine_small", "mine_large")},
                "reference_model": "mine_large",
                "slo_s": 1.0,
                "max_rows_per_request": 64,
                "ladder": [
                    {
                        "name": "both",
                        "stages": [{"model": "mine_small", "threshold": THRESHOLD}, {"model": "mine_large"}],
                        "reach": [1.0, 0.5],
                    }
                ],
                "gears": [
                    {
                        "name": "only",
                        "layout": "one",
                        "min_rate_per_s": 0.0,
                        "max_rate_per_s": 100.0,
                        "ladder_entry": "both",
                    }
                ],
            }
        },
        "layouts": [{"name": "one", "instances": {"a": {"mine_small": 1, "mine_large": 1}}}],
    }
    folder = tmp_path_factory.mktemp("own")
    stack = tiny_stack(folder, ("a",), document)
    models = folder / "mine"
    models.mkdir()
    onnx_file(models / "small.onnx")
    torchscript(models / "large.pt", deep)
    rows_file(models / "rows.npz")
    common = {"max_batch_size": 8, "keep_scores": False}
    path = family_toml(
        models / "family.toml",
        {"name": "mine_small", "file": "small.onnx", "certainty": "max_probability"} | common,
        {"name": "mine_large", "file": "large.pt"} | common,
    )
    cli.main(["export", str(path), "--repository", str(stack.repository)])
    with running(stack):
        yield stack


def test_rows_leave_where_their_model_is_certain(stack: Stack) -> None:
    client = tritonclient.http.InferenceServerClient(f"127.0.0.1:{stack.http_port}")
    given = tritonclient.http.InferInput("x", ROWS.shape, "FP32")
    given.set_data_from_numpy(ROWS)
    names = ("label", "certainty", "stage")
    result = client.infer("mine", [given], outputs=[tritonclient.http.InferRequestedOutput(name) for name in names])
    stays = SMALL["certainty"] >= THRESHOLD
    assert 0.2 < stays.mean() < 0.8
    np.testing.assert_array_equal(result.as_numpy("stage"), np.where(stays, 0, 1))
    np.testing.assert_array_equal(result.as_numpy("label"), np.where(stays, SMALL["label"], LARGE["label"]))
    np.testing.assert_allclose(
        result.as_numpy("certainty"), np.where(stays, SMALL["certainty"], LARGE["certainty"]), atol=1e-6
    )


def test_scores_are_refused_in_one_sentence(stack: Stack) -> None:
    client = tritonclient.http.InferenceServerClient(f"127.0.0.1:{stack.http_port}")
    given = tritonclient.http.InferInput("x", ROWS.shape, "FP32")
    given.set_data_from_numpy(ROWS)
    with pytest.raises(InferenceServerException, match="'scores' for model 'mine'; it has label, certainty, stage"):
        client.infer("mine", [given], outputs=[tritonclient.http.InferRequestedOutput("scores")])
