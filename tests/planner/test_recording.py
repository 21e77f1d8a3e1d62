from __future__ import annotations

import asyncio
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from cascadeserve.errors import CascadeServeError, InvalidArtefact, UsageError
from cascadeserve.replay.payload import ModelSignature, TensorSignature
from cascadeserve.triton_config import model_digest
from planner.recording import (
    BLOCK_BATCHES,
    Chosen,
    Recorder,
    choose_models,
    partial_folder,
    read_rows_file,
    record_family,
    write_family,
)
from planner.records import CalibrationRecords, ModelAnswers, SearchRecords
from planner.records_files import read_search
from planner.triton_calls import ServedModel
from tests.fakes.tiny import LABEL_OFFSET, rows, write_version

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cascadeserve.replay.payload import InputRows

pytestmark = pytest.mark.looptime

BATCH = 4
BLOCK = BATCH * BLOCK_BATCHES
NUM_ROWS = 3 * BLOCK + 7
CHOSEN = {"small": Chosen(1, "sha256:s"), "large": Chosen(2, "sha256:l")}


class FakeServer:
    """Answers as the tiny family does, the later batches of a few in flight before the earlier ones."""

    def __init__(
        self, *, fail_at: int | None = None, outputs: tuple[str, ...] = ("label", "certainty", "scores")
    ) -> None:
        self.fail_at = fail_at
        self.signature = ModelSignature((TensorSignature("x", "FP32", (-1, 3)),), outputs)
        self.asked: list[tuple[str, list[int]]] = []
        self.in_flight = self.most_in_flight = 0

    async def server_version(self) -> str:
        return "2.51.0"

    async def describe(self, model: str, version: int) -> ServedModel:
        return ServedModel(
            model, "onnxruntime", 64, instances=1, dynamic_batching=False, signature=self.signature,
            version=version, versions=(version,),
        )  # fmt: skip

    async def answer(
        self, model: str, version: int, inputs: Sequence[InputRows], rows: list[int], *, want_scores: bool
    ) -> ModelAnswers:
        assert version == CHOSEN[model].version
        self.asked.append((model, rows))
        if len(self.asked) == self.fail_at:
            raise CascadeServeError("the server went away")
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        await asyncio.sleep(0.01 * (5 - len(self.asked) % 5))
        self.in_flight -= 1
        x = np.frombuffer(bytes(inputs[0].chunk(rows)), np.float32).reshape(-1, 3)
        scores = x.astype(np.float16) if want_scores else None
        return ModelAnswers(x[:, 0].astype(np.int64) + LABEL_OFFSET[model], x[:, 1].copy(), scores)


def write_rows(folder: Path, **more: Any) -> Path:
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 10, NUM_ROWS)
    path = folder / "rows.npz"
    np.savez(path, **{"input:x": rows(labels.tolist(), rng.random(NUM_ROWS).tolist()), "label": labels, **more})
    return path


def recorder(server: FakeServer, rows_path: Path, checkpoints: Path, **changes: Any) -> Recorder:
    plain = {"batch": BATCH, "keep_scores": False, "on_rows": lambda _model, _rows: None}
    return Recorder(server=server, rows_file=read_rows_file(rows_path), checkpoints=checkpoints, **(plain | changes))


async def record(recorder: Recorder, models: dict[str, Chosen] | None = None) -> SearchRecords:
    records = await record_family(recorder, models or CHOSEN, family="family", split="search", device_kind="cpu")
    assert isinstance(records, SearchRecords)
    return records


async def test_answers_stand_in_the_order_of_the_rows(tmp_path: Path) -> None:
    path = write_rows(tmp_path)
    server = FakeServer()
    told: list[int] = []
    records = await record(
        recorder(server, path, tmp_path / "p", keep_scores=True, on_rows=lambda _model, rows: told.append(rows))
    )
    with np.load(path) as sent:
        x, labels = sent["input:x"], sent["label"]
    assert list(records.models) == ["small", "large"]
    np.testing.assert_array_equal(records.models["large"].label, labels + LABEL_OFFSET["large"])
    np.testing.assert_array_equal(records.models["small"].certainty, x[:, 1])
    np.testing.assert_array_equal(records.models["small"].scores, x.astype(np.float16))
    np.testing.assert_array_equal(records.group_id, np.arange(NUM_ROWS))
    assert records.models["small"].provenance.digest == "sha256:s"
    assert records.models["small"].provenance.server_version == "2.51.0"
    assert sum(told) == 2 * NUM_ROWS
    assert 2 <= server.most_in_flight <= 8
    assert max(len(batch) for _, batch in server.asked) == BATCH


async def test_an_interrupted_run_asks_only_for_the_rest_and_ends_in_the_same_bytes(tmp_path: Path) -> None:
    path = write_rows(tmp_path)
    whole = FakeServer()
    write_family(tmp_path / "whole.npz", await record(recorder(whole, path, partial_folder(tmp_path / "whole.npz"))))
    output = tmp_path / "records.npz"
    broken = FakeServer(fail_at=len(whole.asked) // 2 + 3 * BLOCK_BATCHES // 2)
    with suppress(CascadeServeError):
        await record(recorder(broken, path, partial_folder(output)))
    kept = len(list(partial_folder(output).rglob("*.npz")))
    assert kept == 5  # all four blocks of the small model, one of the large one
    rest = FakeServer()
    write_family(output, await record(recorder(rest, path, partial_folder(output))))
    assert len(rest.asked) == len(whole.asked) - 4 * BLOCK_BATCHES - 2
    assert output.read_bytes() == (tmp_path / "whole.npz").read_bytes()
    assert not partial_folder(output).exists()
    assert len(read_search(output)) == NUM_ROWS


async def test_scores_of_a_model_that_returns_none_cannot_be_kept(tmp_path: Path) -> None:
    server = FakeServer(outputs=("label", "certainty"))
    path = write_rows(tmp_path)
    with pytest.raises(
        UsageError, match=r"^--keep-scores: model 'small' was exported without scores; leave the option"
    ):
        await record(recorder(server, path, tmp_path / "p", keep_scores=True))
    assert not server.asked
    await record(recorder(server, path, tmp_path / "p"))


async def test_a_cancelled_run_leaves_no_call_behind(tmp_path: Path) -> None:
    server = FakeServer()
    task = asyncio.create_task(record(recorder(server, write_rows(tmp_path), tmp_path / "p")))
    await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    asked = len(server.asked)
    await asyncio.sleep(1)
    assert len(server.asked) == asked


@pytest.mark.parametrize("change", ["rows", "model", "batch", "scores", "damaged"])
async def test_answers_of_something_else_are_not_taken(tmp_path: Path, change: str) -> None:
    path = write_rows(tmp_path)
    await record(recorder(FakeServer(), path, tmp_path / "p"))
    models, changes = dict(CHOSEN), {}
    if change == "rows":
        write_rows(tmp_path, group=np.arange(NUM_ROWS))
    elif change == "model":
        models["small"] = Chosen(1, "sha256:retrained")
    elif change == "batch":
        changes["batch"] = 2 * BATCH
    elif change == "scores":
        changes["keep_scores"] = True
    else:
        block = next((tmp_path / "p").glob("small-*/000001.npz"))
        block.write_bytes(block.read_bytes()[:100])
    server = FakeServer()
    await record(recorder(server, path, tmp_path / "p", **changes), models)
    asked = {model for model, _ in server.asked}
    assert asked == ({"small"} if change in ("model", "damaged") else {"small", "large"})
    if change == "damaged":
        assert [rows[0] for _, rows in server.asked] == list(range(BLOCK, 2 * BLOCK, BATCH))


async def test_groups_and_splits_come_from_the_caller(tmp_path: Path) -> None:
    group = np.arange(NUM_ROWS) // 2
    one = recorder(FakeServer(), write_rows(tmp_path, group=group), tmp_path / "p")
    records = await record_family(one, CHOSEN, family="family", split="calibration", device_kind="gpu")
    assert isinstance(records, CalibrationRecords)
    np.testing.assert_array_equal(records.group_id, group)
    assert records.models["large"].provenance.device_kind == "gpu"
    assert [answers.provenance.version for answers in records.models.values()] == [1, 2]


async def test_a_batch_that_the_model_does_not_take_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at most 64 rows"):
        await record(recorder(FakeServer(), write_rows(tmp_path), tmp_path / "p", batch=65))


async def test_rows_without_labels_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "rows.npz", **{"input:x": rows([1], [0.5])})
    with pytest.raises(InvalidArtefact, match="label: is missing"):
        await record(recorder(FakeServer(), tmp_path / "rows.npz", tmp_path / "p"))


@pytest.mark.parametrize(
    ("arrays", "match"),
    [
        ({"label": np.zeros(2, np.int64)}, "holds no array"),
        ({"input:x": np.zeros((2, 3)), "weight": np.zeros(2)}, "weight: is neither"),
        ({"input:x": np.zeros((2, 3)), "label": np.zeros(3, np.int64)}, "label: has 3 rows"),
        ({"input:x": np.zeros((2, 3)), "group": np.zeros(2)}, "group: has dtype float64"),
        ({"input:x": np.zeros((2, 3)), "label": np.zeros((2, 1), np.int64)}, "label: has dtype int64 and shape"),
        ({"input:x": np.zeros((0, 3))}, r"input:x: holds no rows: its shape is \(0, 3\)$"),
        ({"input:x": np.array([1j, 2j])}, "numbers, booleans or text"),
        ({"input:x": np.array([{}, {}])}, "no .npz file of plain numbers"),
    ],
)
def test_a_rows_file_that_cannot_be_used_is_refused(tmp_path: Path, arrays: dict[str, Any], match: str) -> None:
    np.savez(tmp_path / "rows.npz", **arrays)
    with pytest.raises(InvalidArtefact, match=match):
        read_rows_file(tmp_path / "rows.npz")


def test_what_is_no_rows_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArtefact, match="check the path"):
        read_rows_file(tmp_path / "nothing.npz")
    (tmp_path / "text.npz").write_text("text")
    with pytest.raises(InvalidArtefact, match=r"no \.npz file"):
        read_rows_file(tmp_path / "text.npz")
    np.save(tmp_path / "single.npy", np.zeros(3))
    with pytest.raises(InvalidArtefact, match="single array"):
        read_rows_file(tmp_path / "single.npy")


def test_models_are_named_once_and_exist() -> None:
    repository = Path(__file__).parents[2] / "model_repository"
    assert list(choose_models(repository, ["digits_mlp", "digits_linear"])) == ["digits_mlp", "digits_linear"]
    with pytest.raises(UsageError, match="holds no model 'nope'"):
        choose_models(repository, ["nope"])
    with pytest.raises(UsageError, match="twice"):
        choose_models(repository, ["digits_mlp", "digits_mlp:1"])


def test_the_newest_version_is_chosen_unless_another_is_named(tmp_path: Path) -> None:
    for version in (1, 2, 10):
        write_version(tmp_path, "small", version)
    (tmp_path / "small" / "config.pbtxt").write_text('name: "small"')
    newest, first = choose_models(tmp_path, ["small"])["small"], choose_models(tmp_path, ["small:1"])["small"]
    assert (newest.version, first.version) == (10, 1)
    assert first.digest == model_digest(tmp_path / "small", 1) != newest.digest == model_digest(tmp_path / "small")
    for text in ("small:3", "small:", "small:01", "small:x"):
        with pytest.raises(UsageError, match=f"{text}: the versions in .*small are 1, 2, 10"):
            choose_models(tmp_path, [text])
