from __future__ import annotations

import io
import multiprocessing
import os
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays_of

import planner
from cascadeserve.errors import InvalidArtefact, UsageError
from planner.records import CalibrationRecords, HeldOutRecords, ModelAnswers, Provenance, Records, SearchRecords, arrays
from planner.records_files import (
    claim_delta,
    delta_available,
    ledger_path,
    read_calibration,
    read_held_out,
    read_ledger,
    read_search,
    write_records,
)

if TYPE_CHECKING:
    from collections.abc import Callable

READERS = {SearchRecords: read_search, CalibrationRecords: read_calibration, HeldOutRecords: read_held_out}
HEADER = {
    "schema_version": 1,
    "family": "tiny",
    "split": "search",
    "models": [
        {
            "name": "small",
            "digest": "sha256:1",
            "backend": "onnxruntime",
            "server_version": "2.51",
            "device_kind": "cpu",
        }
    ],
}


def make(kind: type[Records] = SearchRecords, rows: int = 5, *, scores: bool = True) -> Any:
    rng = np.random.default_rng(rows)
    models = {
        name: ModelAnswers(
            label=rng.integers(0, 3, rows),
            certainty=rng.random(rows, dtype=np.float32),
            scores=rng.random((rows, 3)).astype(np.float16) if scores and name == "small" else None,
            provenance=Provenance(
                digest=f"sha256:{name}", backend="onnxruntime", server_version="1", device_kind="cpu"
            ),
        )
        # not in the order of the alphabet, which must survive
        for name in ("small", "large", "huge-1.5")
    }
    return kind(family="tiny", models=models, truth=rng.integers(0, 3, rows), group_id=np.arange(rows))


def same(one: Records, other: Records) -> bool:
    left, right = dict(arrays(one)), dict(arrays(other))
    return (
        type(one) is type(other)
        and one.family == other.family
        and list(one.models) == list(other.models)
        and [a.provenance for a in one.models.values()] == [a.provenance for a in other.models.values()]
        and left.keys() == right.keys()
        and all(left[name].dtype == right[name].dtype and np.array_equal(left[name], right[name]) for name in left)
    )


def raw(**changes: Any) -> dict[str, Any]:
    """The arrays of a good file of one model; a change to None leaves the array out, "/" is written "__"."""
    content: dict[str, Any] = {
        "header": HEADER,
        "truth": np.array([0, 1, 2]),
        "group_id": np.arange(3),
        "small/label": np.array([0, 1, 1]),
        "small/certainty": np.array([0.5, 0.25, 1.0], np.float32),
    }
    content |= {name.replace("__", "/"): value for name, value in changes.items()}
    if isinstance(content["header"], dict):
        content["header"] = np.frombuffer(msgspec.json.encode(content["header"]), np.uint8)
    return {name: value for name, value in content.items() if value is not None}


@pytest.mark.parametrize("kind", READERS)
@pytest.mark.parametrize("scores", [True, False])
def test_what_was_written_is_read(tmp_path: Path, kind: type[Records], scores: bool) -> None:
    path = tmp_path / "new folder" / "records.npz"
    write_records(path, make(kind, scores=scores))
    assert same(READERS[kind](path), make(kind, scores=scores))  # type: ignore[index]
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
@given(
    truth=arrays_of.arrays(np.int64, st.shared(st.integers(1, 20), key="n"), elements=st.integers(0, 2**62)),
    group=arrays_of.arrays(np.int64, st.shared(st.integers(1, 20), key="n")),
    certainty=arrays_of.arrays(
        np.float32,
        st.shared(st.integers(1, 20), key="n"),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
    ),
)
def test_every_value_survives(tmp_path: Path, truth: Any, group: Any, certainty: Any) -> None:
    answers = ModelAnswers(label=truth[::-1].copy(), certainty=certainty)
    records = SearchRecords(family="any", models={"m": answers}, truth=truth, group_id=group)
    write_records(tmp_path / "any.npz", records)
    assert same(read_search(tmp_path / "any.npz"), records)


def test_the_same_records_are_the_same_bytes(tmp_path: Path) -> None:
    for name in ("a.npz", "b.npz"):
        write_records(tmp_path / name, make())
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


@pytest.mark.parametrize("written", READERS)
@pytest.mark.parametrize("asked", READERS)
def test_a_split_is_read_as_that_split_only(tmp_path: Path, written: type[Records], asked: type[Records]) -> None:
    path = tmp_path / "records.npz"
    write_records(path, make(written))
    if written is asked:
        assert type(READERS[asked](path)) is asked  # type: ignore[index]
    else:
        with pytest.raises(InvalidArtefact, match=r"records\.npz: header: \$\.split: is .* splits are never exchanged"):
            READERS[asked](path)  # type: ignore[index]


def header(**changes: Any) -> dict[str, Any]:
    return {**HEADER, **changes}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (raw(header=None), "header: is missing"),
        (raw(header=header(schema_version=2)), r"header: \$\.schema_version"),
        (raw(header=header(extra=1)), "header: .*extra"),
        (raw(header=header(split="validation")), r"header: \$\.split"),
        (raw(header=header(models=[])), r"header: \$\.models"),
        (raw(header=header(models=[*HEADER["models"], *HEADER["models"]])), "lists a model twice"),  # type: ignore[misc]
        (raw(header=header(models=[{"name": "a/b"}])), r"header: \$\.models\[0\]\.name"),
        (raw(header=np.frombuffer(b"{", np.uint8)), "header: .*truncated"),
        (raw(truth=None), "truth: is missing"),
        (raw(group_id=None), "group_id: is missing"),
        (raw(small__label=None), "small/label: is missing"),
        (raw(small__certainty=None), "small/certainty: is missing"),
        (raw(large__label=np.arange(3)), "large/label: is an unknown array"),
        (raw(remark=np.arange(3)), "remark: is an unknown array"),
        (raw(small__certainty=np.array([0.5, np.nan, np.nan], np.float32)), "small/certainty: is NaN .*2 rows.* row 1"),
        (raw(small__certainty=np.array([0.5, np.inf, 0], np.float32)), "small/certainty: is NaN or infinite in 1 row"),
        (raw(small__certainty=np.array([0.5, 0.5, 0.5])), "small/certainty: is float64, but must be float32"),
        (raw(small__certainty=np.zeros(2, np.float32)), "small/certainty: has 2 rows, but truth has 3"),
        (raw(small__certainty=np.zeros((3, 1), np.float32)), "small/certainty: has 2 axes, but must have 1"),
        (raw(small__label=np.array([0, -1, 1])), "small/label: is negative in 1 rows, first in row 1"),
        (raw(small__label=np.array([0, 1, 1], np.int32)), "small/label: is int32"),
        (raw(truth=np.array([0, 1, -5])), "truth: is negative"),
        (raw(truth=np.array([], np.int64)), "truth: is empty"),
        (raw(group_id=np.arange(4)), "group_id: has 4 rows"),
        (raw(small__scores=np.zeros((3, 2))), "small/scores: is float64, but must be float16"),
        (raw(small__scores=np.zeros((2, 2), np.float16)), "small/scores: has 2 rows"),
        (raw(small__scores=np.zeros(3, np.float16)), "small/scores: has 1 axes"),
        (raw(truth=np.array(3)), "truth: "),
    ],
)
def test_a_wrong_file_is_refused_with_its_path_and_the_array(
    tmp_path: Path, content: dict[str, Any], says: str
) -> None:
    path = tmp_path / "records.npz"
    np.savez(path, **content)
    with pytest.raises(InvalidArtefact, match=rf"^{path}: .*{says}") as caught:
        read_search(path)
    assert "\n" not in str(caught.value)


def pickled() -> bytes:
    file = io.BytesIO()
    np.savez(file, truth=np.array([{}], dtype=object), allow_pickle=True)
    return file.getvalue()


def twice() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as members:
        members.writestr("truth.npy", b"")
        with pytest.warns(UserWarning, match="Duplicate name"):
            members.writestr("truth.npy", b"")
    return file.getvalue()


def damaged() -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, **raw())
    data = bytearray(file.getvalue())
    data[60:120] = bytes(60)
    return bytes(data)


def array_file() -> bytes:
    file = io.BytesIO()
    np.save(file, np.arange(3))
    return file.getvalue()


@pytest.mark.parametrize("data", [lambda: b"", lambda: b"text", pickled, twice, damaged, array_file])
def test_what_is_no_file_of_plain_arrays_is_refused(tmp_path: Path, data: Callable[[], bytes]) -> None:
    path = tmp_path / "records.npz"
    path.write_bytes(data())
    with pytest.raises(InvalidArtefact, match=f"^{path}: "):
        read_search(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArtefact, match="cannot be read"):
        read_search(tmp_path / "none.npz")


def test_records_that_could_not_be_read_again_are_not_written(tmp_path: Path) -> None:
    good = make()
    bad = replace(good, truth=good.truth[:-1])
    odd = replace(good, models={"a/b": good.models["small"]})
    for records in (bad, odd):
        with pytest.raises(InvalidArtefact):
            write_records(tmp_path / "records.npz", records)
    assert list(tmp_path.iterdir()) == []


def test_only_the_certificate_reads_calibration_rows() -> None:
    """What could choose by calibration rows must not even be able to open them."""
    folder = Path(planner.__file__).parent
    users = {file.name for file in folder.rglob("*.py") if "read_calibration" in file.read_text()}
    assert users == {"certificate.py", "records_files.py"}


# The ledger.


@pytest.fixture
def calibration(tmp_path: Path) -> Path:
    path = tmp_path / "calibration.npz"
    write_records(path, make(CalibrationRecords))
    return path


def test_each_ladder_takes_half_of_what_is_left(calibration: Path) -> None:
    taken = [claim_delta(calibration, 0.08, f"sha256:{use}", spend=True) for use in range(20)]
    assert taken[:3] == pytest.approx([0.04, 0.02, 0.01])
    assert sum(taken) < 0.08
    assert [use.ladder_digest for use in read_ledger(calibration).uses] == [f"sha256:{use}" for use in range(20)]


def test_the_same_ladder_is_no_new_use(calibration: Path) -> None:
    assert claim_delta(calibration, 0.05, "sha256:a") == 0.025
    before = ledger_path(calibration).read_bytes()
    assert claim_delta(calibration, 0.05, "sha256:a") == 0.025
    # a greater total asked for later does not change what was said
    assert claim_delta(calibration, 0.5, "sha256:a") == 0.025
    assert ledger_path(calibration).read_bytes() == before


def test_another_ladder_needs_consent(calibration: Path) -> None:
    claim_delta(calibration, 0.05, "sha256:a")
    with pytest.raises(UsageError, match=r"certified another ladder on \d{4}-\d\d-\d\d; record fresh .* --spend"):
        claim_delta(calibration, 0.05, "sha256:b")
    assert claim_delta(calibration, 0.05, "sha256:b", spend=True) == pytest.approx(0.0125)
    # and the first one still stands
    assert claim_delta(calibration, 0.05, "sha256:a") == 0.025


def test_nothing_is_left_of_a_smaller_total(calibration: Path) -> None:
    claim_delta(calibration, 0.1, "sha256:a")
    with pytest.raises(UsageError, match=r"spent delta 0\.05 of 0\.05; record fresh"):
        claim_delta(calibration, 0.05, "sha256:b", spend=True)
    assert claim_delta(calibration, 0.06, "sha256:b", spend=True) == pytest.approx(0.005)


def test_asking_writes_nothing(calibration: Path) -> None:
    assert delta_available(calibration, 0.05, "sha256:a") == 0.025
    assert not ledger_path(calibration).exists()
    assert read_ledger(calibration).uses == ()


def test_rows_recorded_anew_keep_their_uses(calibration: Path) -> None:
    claim_delta(calibration, 0.05, "sha256:a")
    write_records(calibration, make(CalibrationRecords, rows=6))
    with pytest.raises(UsageError, match="another ladder"):
        delta_available(calibration, 0.05, "sha256:b")


def test_a_broken_ledger_is_not_an_empty_one(calibration: Path) -> None:
    ledger_path(calibration).write_text("{")
    with pytest.raises(InvalidArtefact, match=r"calibration\.npz\.uses\.json"):
        claim_delta(calibration, 0.05, "sha256:a")


@pytest.mark.parametrize("delta", [0.0, 1.0, -0.1, float("nan")])
def test_delta_must_be_a_probability(calibration: Path, delta: float) -> None:
    with pytest.raises(UsageError, match="between 0 and 1"):
        claim_delta(calibration, delta, "sha256:a")


def test_rows_that_do_not_exist_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(InvalidArtefact, match="cannot be read"):
        claim_delta(tmp_path / "none.npz", 0.05, "sha256:a")


def _claim(path: Path, start: Any, use: int) -> None:
    start.wait()
    claim_delta(path, 0.05, f"sha256:{use}", spend=True)
    os._exit(0)


def test_uses_from_two_processes_at_once_are_both_counted(calibration: Path) -> None:
    context = multiprocessing.get_context("fork")
    start = context.Barrier(4)
    processes = [context.Process(target=_claim, args=(calibration, start, use)) for use in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    deltas = [use.delta for use in read_ledger(calibration).uses]
    assert deltas == pytest.approx([0.025, 0.0125, 0.00625, 0.003125])


def test_a_link_to_a_calibration_file_is_the_same_file(calibration: Path) -> None:
    claim_delta(calibration, 0.05, "sha256:a")
    link = calibration.with_name("alias.npz")
    link.symlink_to(calibration)
    with pytest.raises(UsageError, match="certified another ladder"):
        claim_delta(link, 0.05, "sha256:b")
