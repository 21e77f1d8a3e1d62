"""The texts family on a real Triton: every stage is an ensemble of a tokenizer in Python and a classifier in ONNX.

What 2.51 does with ensembles, measured here and relied on by the reconciler: when the instances of a composing model
change, that model is updated in place (its counters go on) and every ensemble with it is made anew (its counters begin
again), while requests go on being answered and the index never shows it as not ready. Loading an ensemble loads its
models; unloading it leaves them; unloading one of them takes the ensemble out of service at once.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import urllib.request
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from click.testing import CliRunner

from cascadeserve.gear_plan import read_gear_plan
from cascadeserve.triton_config import instance_count, read_config
from export.cli import export
from export.config_lint import lint_repository
from export.verify_cli import verify
from planner.profile import read_profile
from planner.records_files import read_search
from tests.e2e.load import start_replay
from tests.fakes.servers import Process, Stack, wait_until_ready

pytest.importorskip("sklearn")
from examples.texts.data import PACKAGES, rows

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from numpy.typing import NDArray

pytestmark = [pytest.mark.triton, pytest.mark.loaded, pytest.mark.torch, pytest.mark.timeout(240)]

STAGES = {
    "texts_words": ("texts_count_words", "texts_words_classifier"),
    "texts_grams": ("texts_count_grams", "texts_grams_classifier"),
}
OUTPUTS = ("label", "certainty", "scores")
THRESHOLD = 0.3
NUM_ROWS = 600


def plan_document() -> dict[str, Any]:
    """Two layouts: the broad one has two instances of everything the dear stage is composed of."""
    narrow = {part: 1 for parts in STAGES.values() for part in parts}
    busy_s = {"texts_words": [[1, 0.001], [64, 0.004]], "texts_grams": [[1, 0.002], [64, 0.02]]}
    gear = {"ladder_entry": "cascade", "min_rate_per_s": 0.0}
    return {
        "schema_version": 1,
        "name": "texts",
        "families": {
            "texts": {
                "inputs": [{"name": "text", "datatype": "BYTES", "shape": [1]}],
                "num_classes": len(PACKAGES),
                "models": {
                    name: {"max_batch": 64, "busy_s": busy_s[name], "composed_of": dict.fromkeys(parts, 1)}
                    for name, parts in STAGES.items()
                },
                "reference_model": "texts_grams",
                "slo_s": 1.0,
                "max_rows_per_request": 64,
                "ladder": [
                    {
                        "name": "cascade",
                        "stages": [{"model": "texts_words", "threshold": THRESHOLD}, {"model": "texts_grams"}],
                        "reach": [1.0, 0.5],
                    }
                ],
                "gears": [
                    {"name": "calm", "layout": "narrow", "max_rate_per_s": 60.0, **gear},
                    {"name": "busy", "layout": "broad", "max_rate_per_s": 400.0, **gear},
                ],
            }
        },
        "layouts": [
            {"name": "narrow", "instances": {"triton0": narrow}},
            {"name": "broad", "instances": {"triton0": narrow | dict.fromkeys(STAGES["texts_grams"], 2)}},
        ],
        "switching": {"gear_dwell_s": 0.5, "layout_up_after_s": 0.3, "layout_down_after_s": 1.0},
    }


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The family as an export writes it, on one Triton, and no orchestrator yet."""
    folder = tmp_path_factory.mktemp("texts")
    repository = folder / "repository"
    done = CliRunner().invoke(export, ["examples.texts.family:family", "--repository", str(repository)])
    assert done.exit_code == 0, done.output
    verified = CliRunner().invoke(verify, ["examples.texts.family:family", "--repository", str(repository)])
    assert verified.exit_code == 0, verified.output
    (folder / "plan.json").write_text(json.dumps(plan_document()))
    drawn = rows("search", NUM_ROWS)
    np.savez(folder / "rows.npz", **{"input:text": drawn.inputs, "label": drawn.labels, "group": drawn.file_ids})
    stack = Stack(folder, repository, folder / "plan.json", ("triton0",))
    try:
        stack.start_triton("triton0")
        yield stack
    finally:
        stack.stop()


def ask(url: str, model: str, name: str, array: NDArray[Any], datatype: str, outputs: tuple[str, ...]) -> list[Any]:
    client = tritonclient.http.InferenceServerClient(url.removeprefix("http://"))
    try:
        tensor = tritonclient.http.InferInput(name, list(array.shape), datatype)
        tensor.set_data_from_numpy(array)
        wanted = [tritonclient.http.InferRequestedOutput(output) for output in outputs]
        result = client.infer(model, [tensor], outputs=wanted)
        return [result.as_numpy(output) for output in outputs]
    finally:
        client.close()


def ask_whole(stack: Stack, stage: str, texts: NDArray[Any]) -> list[NDArray[Any]]:
    return ask(stack.triton_url("triton0"), stage, "text", texts.astype(object), "BYTES", OUTPUTS)


def ask_parts(stack: Stack, stage: str, texts: NDArray[Any]) -> list[NDArray[Any]]:
    tokenizer, classifier = STAGES[stage]
    url = stack.triton_url("triton0")
    (counts,) = ask(url, tokenizer, "text", texts.astype(object), "BYTES", ("counts",))
    return ask(url, classifier, "counts", counts, "FP32", OUTPUTS)


def executions(stack: Stack, model: str) -> int:
    with urllib.request.urlopen(f"{stack.triton_url('triton0')}/v2/models/{model}/stats", timeout=10) as response:
        return int(json.load(response)["model_stats"][0]["execution_count"])


def batches_sent(stack: Stack, model: str) -> int:
    with urllib.request.urlopen(f"{stack.url}/metrics", timeout=10) as response:
        found = re.search(rf'cascadeserve_batch_rows_count{{.*model="{model}"}} (\d+)', response.read().decode())
    assert found is not None
    return int(found[1])


def run(*arguments: str) -> str:
    command = [sys.executable, "-m", "cascadeserve", *arguments]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_what_the_export_writes_is_what_native_triton_reads(stack: Stack) -> None:
    found = lint_repository(stack.repository)
    assert {path.partition("/")[0] for path in found} == {
        *STAGES,
        *(part for parts in STAGES.values() for part in parts),
    }
    assert {path: findings for path, findings in found.items() if findings} == {}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("size", [1, 64])
def test_an_ensemble_equals_its_parts_run_by_hand(stack: Stack, stage: str, size: int) -> None:
    texts = rows("replay", 64).inputs
    for start in range(0, 64, size) if size > 1 else range(8):
        batch = texts[start : start + size]
        for whole, parts in zip(ask_whole(stack, stage, batch), ask_parts(stack, stage, batch), strict=True):
            np.testing.assert_array_equal(whole, parts)


def test_counts_of_composing_models_change_under_load_and_no_request_fails(stack: Stack, tmp_path: Path) -> None:
    texts = rows("replay", 256).inputs

    def by_hand(stage: str) -> list[list[NDArray[Any]]]:
        return [ask_parts(stack, stage, texts[i : i + 64]) for i in range(0, 256, 64)]

    # what the cascade must say
    (cheap, certainty, _), (dear, _, _) = (
        [np.concatenate(each) for each in zip(*by_hand(stage), strict=True)] for stage in STAGES
    )
    # thresholds are never data values: what is too near to one may go either way in another batch
    clear = np.abs(certainty[:, 0] - THRESHOLD) > 1e-4
    label = np.where(certainty[:, 0] >= THRESHOLD, cheap[:, 0], dear[:, 0])
    assert 0.2 < np.mean(certainty >= THRESHOLD) < 0.9
    path = tmp_path / "rows.npz"
    np.savez(path, **{"input:text": texts[clear], "label": label[clear]})
    counted = {part: executions(stack, part) for part in STAGES["texts_grams"]}
    stack.start_orchestrator()
    assert stack.orchestrator is not None
    load = start_replay(tmp_path, stack.url, path, "--steps=2x20,5x150,8x20", "--slo=1", "--timeout=20", model="texts")
    report = load.result()
    ledger = report["ledger"]
    assert ledger["answered_correct"] == ledger["sent"] > 500
    assert ledger["refused"] == ledger["failed"] == ledger["lost"] == ledger["duplicated"] == 0
    assert {"calm", "busy"} <= {span["gear"] for span in report["gears"]}
    log = stack.orchestrator.text()
    for part in STAGES["texts_grams"]:
        assert f"endpoint triton0: {part}:1 1 -> 2 instances" in log
        assert f"endpoint triton0: {part}:1 2 -> 1 instances" in log
        # in place: a model that was loaded anew would have counted from 0 again
        assert executions(stack, part) - counted[part] >= batches_sent(stack, "texts_grams") > 50
        config = stack.state / "model_repository" / part / "configs" / "triton0.pbtxt"
        assert instance_count(read_config(config)) == 1


@pytest.mark.parametrize("protocol", ["http", "grpc"])
def test_stock_clients_send_text(stack: Stack, protocol: str) -> None:
    texts = rows("replay", 8).inputs.astype(object)
    library: Any = tritonclient.http if protocol == "http" else tritonclient.grpc
    client = library.InferenceServerClient(
        stack.url.removeprefix("http://") if protocol == "http" else stack.grpc_address
    )
    try:
        tensor = library.InferInput("text", [8, 1], "BYTES")
        tensor.set_data_from_numpy(texts)
        wanted = [library.InferRequestedOutput(name) for name in ("label", "stage")]
        result = client.infer("texts", [tensor], outputs=wanted)
    finally:
        client.close()
    stage = result.as_numpy("stage")[:, 0]
    labels = [ask_parts(stack, name, texts)[0][:, 0] for name in STAGES]
    np.testing.assert_array_equal(result.as_numpy("label")[:, 0], np.where(stage == 0, *labels))


def test_recorded_profiled_planned_and_served(stack: Stack, tmp_path: Path) -> None:
    if stack.orchestrator is not None:
        stack.orchestrator.stop()
        stack.orchestrator = None
    common = [f"--cluster={stack.cluster}", f"--repository={stack.repository}"]
    common += [f"--rows={stack.folder / 'rows.npz'}", *(f"--model={stage}" for stage in STAGES)]
    records, profile_path, plan_path = (tmp_path / name for name in ("search.npz", "profile.json", "plan.json"))
    run("record", *common, "--split=search", "--family=texts", f"--output={records}")
    run("profile", *common, "--quick", "--repeats=1", "--batches=1,8", "--allow-reload", f"--output={profile_path}")
    recorded = read_search(records)
    whole = np.concatenate(
        [
            ask_whole(stack, "texts_grams", rows("search", NUM_ROWS).inputs[i : i + 32])[0]
            for i in range(0, NUM_ROWS, 32)
        ]
    )
    np.testing.assert_array_equal(recorded.models["texts_grams"].label, whole[:, 0])

    measured = read_profile(profile_path)
    composed_of = {name: dict.fromkeys(parts, 1) for name, parts in STAGES.items()}
    assert {name: model.composed_of for name, model in measured.models.items()} == composed_of
    assert measured.parts.keys() == {part for parts in STAGES.values() for part in parts}
    assert all(part.load_s and part.memory_bytes for part in measured.parts.values())
    assert all(model.load_s is None for model in measured.models.values())

    goal = tmp_path / "goal.toml"
    goal.write_text(
        "schema_version = 1\n[families.texts]\nslo_s = 2.0\npercentile = 0.9\nbelow_reference = 0.05\n"
        "max_epsilon = 0.3\ndelta = 0.05\ndispersion = 1.0\n"
    )
    run(
        "plan", f"--goal={goal}", f"--profile={profile_path}", f"--cluster={stack.cluster}", f"--search={records}",
        f"--repository={stack.repository}", f"--output={plan_path}",
    )  # fmt: skip
    plan = read_gear_plan(plan_path)
    used = plan.families["texts"].models
    assert {name: model.composed_of for name, model in used.items()} == {name: composed_of[name] for name in used}
    standing = plan.layouts[0].instances["triton0"]
    assert standing == {part: 1 for name in used for part in STAGES[name]}

    served = Stack(tmp_path, stack.repository, plan_path, ("triton0",))
    up = Process(
        ["up", f"--plan={plan_path}", f"--cluster={served.cluster}", f"--repository={served.repository}",
         f"--state={served.state}", f"--http-port={served.http_port}", f"--grpc-port={served.grpc_port}"],
        tmp_path / "up.log",
    )  # fmt: skip
    up.start()
    try:
        wait_until_ready(f"{served.url}/v2/health/ready", up)
        texts = rows("replay", 32)
        label, _ = ask(served.url, "texts", "text", texts.inputs.astype(object), "BYTES", ("label", "certainty"))
        assert label.shape == (32, 1)
        assert np.mean(label[:, 0] == texts.labels) > 2 / len(PACKAGES)
    finally:
        up.stop()
