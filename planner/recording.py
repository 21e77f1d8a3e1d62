"""Recording: put every row to every model of a family, through Triton, and keep what each answered.

A run can be interrupted at any time. Answers are kept in blocks of batches, in files beside the output that are named
by everything the answers depend on: the rows, the model's folder, backend, server version, device kind, batch size. The
next run takes the blocks that fit and asks for the rest; blocks of other rows or models are never looked at. Batches
are cut at the same rows in every run, so that an interrupted recording ends in the same file as an uninterrupted one.
"""

from __future__ import annotations

import asyncio
import hashlib
import io
import shutil
import zipfile
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import msgspec
import numpy as np

from cascadeserve.artefacts import digest_bytes, write_atomically
from cascadeserve.errors import InvalidArtefact, UsageError
from cascadeserve.replay.payload import InputRows, match_inputs
from cascadeserve.replay.rows import Rows
from cascadeserve.triton_config import model_digest, model_versions
from planner.records import CalibrationRecords, HeldOutRecords, ModelAnswers, Provenance, SearchRecords
from planner.records_files import Split, write_records

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from planner.probing import ProbeRows
    from planner.triton_calls import ServedModel

AnyRecords = SearchRecords | CalibrationRecords | HeldOutRecords

RECORDS_TYPE: dict[Split, type[AnyRecords]] = {
    "search": SearchRecords,
    "calibration": CalibrationRecords,
    "test": HeldOutRecords,
}
# Batches per checkpoint: what an interruption can cost.
BLOCK_BATCHES = 32
# Enough to keep a device busy; answers do not depend on it.
_IN_FLIGHT = 4
_INPUT = "input:"


class Answering(Protocol):
    """What recording needs of a server; `triton_calls.TritonCalls` is the real one."""

    async def server_version(self) -> str:
        """Version of the server."""

    async def describe(self, model: str, version: int) -> ServedModel:
        """What is loaded under this name and version."""

    async def answer(
        self, model: str, version: int, inputs: Sequence[InputRows], rows: list[int], *, want_scores: bool
    ) -> ModelAnswers:
        """Answers of a version of a model to rows, as one batch."""


@dataclass(frozen=True, eq=False)
class RowsFile:
    """A rows file: inputs and labels, int64 [n] groups where the file has them, and the digest of the file."""

    rows: Rows
    group: NDArray[np.int64] | None
    digest: str


def read_rows_file(path: Path) -> RowsFile:
    """Read .npz with arrays `input:<TENSOR>` [n, ...], optionally `label` and `group`, both integers [n].

    `group` is equal for rows that are not independent of each other: the records' `group_id`.

    Raises:
        InvalidArtefact: naming the array.

    """
    try:
        with path.open("rb") as file:
            digest = f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
        arrays = _read_npz(path)
    except OSError as error:
        raise InvalidArtefact(f"cannot be read ({error.strerror or error}); check the path", path=path) from error
    except (ValueError, zipfile.BadZipFile, EOFError) as error:
        raise InvalidArtefact(f"is no .npz file of plain numbers or text ({error})", path=path) from error
    inputs = {key.removeprefix(_INPUT): array for key, array in arrays.items() if key.startswith(_INPUT)}
    if unknown := sorted(set(arrays) - {f"{_INPUT}{name}" for name in inputs} - {"label", "group"}):
        raise InvalidArtefact(f"is neither `{_INPUT}<TENSOR>` nor `label` nor `group`", path=path, field=unknown[0])
    if not inputs:
        raise InvalidArtefact(f"holds no array `{_INPUT}<TENSOR>`", path=path)
    for name, array in inputs.items():
        if array.size == 0:
            raise InvalidArtefact(f"holds no rows: its shape is {array.shape}", path=path, field=f"{_INPUT}{name}")
        if array.ndim == 0 or array.dtype.kind not in "biufSU":
            what = f"has dtype {array.dtype} and shape {array.shape}"
            what = f"{what}; it must be numbers, booleans or text of shape [n, ...]"
            raise InvalidArtefact(what, path=path, field=f"{_INPUT}{name}")
    count = len(next(iter(inputs.values())))
    for key, array in arrays.items():
        if len(array) != count:
            raise InvalidArtefact(f"has {len(array)} rows where the first input has {count}", path=path, field=key)
    rows = Rows(inputs, _integers(arrays, "label", path))
    return RowsFile(rows, _integers(arrays, "group", path), digest)


def _read_npz(path: Path) -> dict[str, NDArray[np.generic]]:
    with path.open("rb") as file:
        archive = np.load(file, allow_pickle=False)
        if not isinstance(archive, np.lib.npyio.NpzFile):
            raise ValueError("it holds a single array; save the rows with numpy.savez")  # noqa: TRY004 - of the file
        with archive:
            return {key: archive[key] for key in archive.files}


def _integers(arrays: dict[str, NDArray[np.generic]], key: str, path: Path) -> NDArray[np.int64] | None:
    array = arrays.get(key)
    if array is None:
        return None
    if array.ndim != 1 or array.dtype.kind not in "iu":
        what = f"has dtype {array.dtype} and shape {array.shape}; it must be int64 of shape [n]"
        raise InvalidArtefact(what, path=path, field=key)
    return array.astype(np.int64)


def partial_folder(output: Path) -> Path:
    """Folder in which an interrupted run leaves what it has."""
    return output.with_name(f"{output.name}.partial")


class Chosen(NamedTuple):
    """Which version of a model is asked, and the digest of its files."""

    version: int
    digest: str


def choose_models(repository: Path, named: Sequence[str]) -> dict[str, Chosen]:
    """Find what `--model` names, by name of the model: `NAME:VERSION`, or `NAME` for the newest in the repository.

    Raises:
        UsageError: it is not in the repository, or a model is named twice.

    """
    chosen: dict[str, Chosen] = {}
    for text in named:
        model, separator, number = text.partition(":")
        if model in chosen:
            raise UsageError(f"--model: {model!r} is named twice")
        if not (repository / model / "config.pbtxt").is_file():
            raise UsageError(f"--model: {repository} holds no model {model!r} (a folder with a config.pbtxt)")
        versions = model_versions(repository / model)
        if not versions or (separator and number not in map(str, versions)):
            held = ", ".join(map(str, versions)) or "none"
            raise UsageError(f"--model {text}: the versions in {repository / model} are {held}")
        version = int(number) if separator else max(versions)
        chosen[model] = Chosen(version, model_digest(repository / model, version))
    return chosen


@dataclass(frozen=True)
class Recorder:
    """Asks one server for the answers of models to the rows of a file, `batch` rows at a time.

    `checkpoints` is the folder for interrupted runs; `on_rows(model, rows)` is told of every batch that is done.
    """

    server: Answering
    rows_file: RowsFile
    batch: int
    keep_scores: bool
    checkpoints: Path
    on_rows: Callable[[str, int], None]

    async def record(self, model: str, chosen: Chosen, device_kind: str) -> ModelAnswers:
        """Answers of one model to all rows, from checkpoints as far as there are some."""
        served = await self.server.describe(model, chosen.version)
        if self.batch > served.max_batch:
            raise UsageError(
                f"--batch {self.batch}: model {model!r} takes at most {served.max_batch} rows in a batch; give less"
            )
        origin = Provenance(
            digest=chosen.digest,
            backend=served.backend,
            server_version=await self.server.server_version(),
            device_kind=device_kind,
            version=chosen.version,
        )
        if self.keep_scores and "scores" not in served.signature.outputs:
            raise UsageError(f"--keep-scores: model {model!r} was exported without scores; leave the option out")
        inputs = match_inputs(self.rows_file.rows, served.signature)
        folder = self.checkpoints / f"{model}-{self._key(origin)}"
        folder.mkdir(parents=True, exist_ok=True)
        blocks = []
        for number, rows in enumerate(self._blocks()):
            path = folder / f"{number:06d}.npz"
            block = _read_block(path, len(rows), with_scores=self.keep_scores)
            if block is None:
                block = await self._ask(model, chosen.version, inputs, rows)
                write_atomically(path, _encode_block(block))
            else:
                self.on_rows(model, len(rows))
            blocks.append(block)
        return replace(_joined(blocks), provenance=origin)

    def _key(self, origin: Provenance) -> str:
        """Short digest of all that the answers depend on."""
        parts = (self.rows_file.digest, origin, self.batch, self.keep_scores, BLOCK_BATCHES)
        return digest_bytes(msgspec.json.encode(parts)).removeprefix("sha256:")[:16]

    def _blocks(self) -> Iterator[range]:
        count = len(self.rows_file.rows)
        size = self.batch * BLOCK_BATCHES
        return (range(start, min(start + size, count)) for start in range(0, count, size))

    async def _ask(self, model: str, version: int, inputs: tuple[InputRows, ...], rows: range) -> ModelAnswers:
        batches = [rows[start : start + self.batch] for start in range(0, len(rows), self.batch)]
        answers: dict[int, ModelAnswers] = {}
        waiting = iter(enumerate(batches))

        async def ask_in_turn() -> None:
            for number, batch in waiting:
                answers[number] = await self.server.answer(
                    model, version, inputs, list(batch), want_scores=self.keep_scores
                )
                self.on_rows(model, len(batch))

        asking = [asyncio.create_task(ask_in_turn(), name=f"record {model}") for _ in range(_IN_FLIGHT)]
        try:
            await asyncio.gather(*asking)
        finally:
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)
        return _joined([answers[number] for number in range(len(batches))])


def _joined(parts: Sequence[ModelAnswers]) -> ModelAnswers:
    scores = [part.scores for part in parts if part.scores is not None]
    return ModelAnswers(
        np.concatenate([part.label for part in parts]),
        np.concatenate([part.certainty for part in parts]),
        np.concatenate(scores) if scores else None,
    )


def _encode_block(block: ModelAnswers) -> bytes:
    arrays: dict[str, NDArray[Any]] = {"label": block.label, "certainty": block.certainty}
    if block.scores is not None:
        arrays["scores"] = block.scores
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def _read_block(path: Path, num_rows: int, *, with_scores: bool) -> ModelAnswers | None:
    """Read a block of an earlier run; None where there is none that fits."""
    if not path.exists():
        return None
    try:
        arrays = _read_npz(path)
        block = ModelAnswers(
            arrays["label"].astype(np.int64, casting="safe"),
            arrays["certainty"].astype(np.float32, casting="safe"),
            arrays["scores"].astype(np.float16, casting="safe") if with_scores else None,
        )
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile):
        return None
    return block if len(block.label) == len(block.certainty) == num_rows else None


async def record_family(
    recorder: Recorder, models: dict[str, Chosen], *, family: str, split: Split, device_kind: str
) -> AnyRecords:
    """Records of a family, in the order of `models` (cheap to dear), each with its provenance.

    Raises:
        InvalidArtefact: the rows carry no labels.

    """
    rows_file = recorder.rows_file
    if rows_file.rows.labels is None:
        raise InvalidArtefact("is missing; records need the right label of every row", field="label")
    answers = {model: await recorder.record(model, chosen, device_kind) for model, chosen in models.items()}
    group = np.arange(len(rows_file.rows), dtype=np.int64) if rows_file.group is None else rows_file.group
    return RECORDS_TYPE[split](family, answers, rows_file.rows.labels, group)


def write_family(output: Path, records: AnyRecords, probe_rows: ProbeRows | None = None) -> None:
    """Write the records file, then drop the checkpoints it was made from."""
    write_records(output, records, probe_rows)
    shutil.rmtree(partial_folder(output), ignore_errors=True)
